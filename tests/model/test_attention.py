"""Properties of the maps, the gate and the merge, alone and inside a UNet."""

import logging

import pytest
import torch

from mip.errors import ReferencesError
from mip.model.attention import attend_together, attend_weighted, gate, log_word_maps, relevance
from mip.model.references import ReferenceCache, ReferenceMaps

WORDS_12W = torch.tensor([[[True, True, False], [True, False, False]]])


def random_log_maps(batch=2, count=3, positions=9):
    return torch.randn(batch, count, positions)


def test_each_word_map_spreads_one_unit_of_mass_over_the_image():
    log_map_BNQ = log_word_maps(torch.randn(1, 2, 9, 4), torch.randn(1, 2, 2, 3, 4), WORDS_12W)
    torch.testing.assert_close(log_map_BNQ.exp().sum(dim=-1), torch.ones(1, 2))


def test_word_maps_are_the_mean_over_heads_and_words_of_the_softmax_over_positions():
    q_BHQD, k_BNHWD = torch.randn(1, 2, 9, 4).double(), torch.randn(1, 2, 2, 3, 4).double()
    maps_BNHWQ = (torch.einsum("bhqd,bnhwd->bnhwq", q_BHQD, k_BNHWD) / 2).softmax(dim=-1)
    expected_BNQ = torch.stack(
        [maps_BNHWQ[:, 0, :, :2].mean(dim=(1, 2)), maps_BNHWQ[:, 1, :, :1].mean(dim=(1, 2))], dim=1
    )
    torch.testing.assert_close(log_word_maps(q_BHQD, k_BNHWD, WORDS_12W).exp(), expected_BNQ)


def test_tokens_outside_the_name_change_nothing():
    q_BHQD, k_BNHWD = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 2, 3, 4)
    other_BNHWD = torch.where(WORDS_12W[:, :, None, :, None], k_BNHWD, torch.randn_like(k_BNHWD))
    torch.testing.assert_close(log_word_maps(q_BHQD, k_BNHWD, WORDS_12W), log_word_maps(q_BHQD, other_BNHWD, WORDS_12W))


def test_relevance_sums_to_1_over_references():
    relevance_BNQ = relevance(random_log_maps(), torch.zeros(2, 3, 1))
    torch.testing.assert_close(relevance_BNQ.sum(dim=1), torch.ones(2, 9))


def test_relevance_of_a_lone_reference_is_exactly_1():
    assert bool((relevance(random_log_maps(count=1), torch.zeros(2, 1, 1)) == 1).all())


def test_relevance_of_a_forbidden_reference_is_exactly_0_and_the_others_share_1():
    prior_BNQ = torch.tensor([0.0, -torch.inf, 0.0]).expand(2, 3)[..., None]
    relevance_BNQ = relevance(random_log_maps(), prior_BNQ)
    assert bool((relevance_BNQ[:, 1] == 0).all())
    torch.testing.assert_close(relevance_BNQ.sum(dim=1), torch.ones(2, 9))


def test_relevance_is_0_where_every_reference_is_forbidden():
    assert bool((relevance(random_log_maps(), torch.full((2, 3, 1), -torch.inf)) == 0).all())


def test_relevance_survives_maps_far_below_the_smallest_float():
    relevance_BNQ = relevance(torch.tensor([[[-500.0], [-501.0]]]), torch.zeros(1, 2, 1))
    torch.testing.assert_close(relevance_BNQ[0, :, 0], torch.tensor([0.0, -1.0]).softmax(dim=0))


def test_gate_is_the_sigmoid_over_its_mean():
    logits_BQ = torch.randn(2, 9).double()
    torch.testing.assert_close(gate(logits_BQ), logits_BQ.sigmoid() / logits_BQ.sigmoid().mean(dim=1, keepdim=True))


@pytest.mark.parametrize("shift", [0.0, -200.0, 200.0])
def test_gate_has_mean_1_however_small_the_sigmoid_is(shift):
    gate_BQ = gate(torch.randn(2, 16, dtype=torch.float16) + shift)
    torch.testing.assert_close(gate_BQ.mean(dim=1), torch.ones(2))


def test_merge_is_the_weighted_sum_of_the_attention_to_each_reference():
    q_BHQD, (k_BNHRD, v_BNHRD) = torch.randn(2, 2, 9, 4).double(), torch.randn(2, 2, 3, 2, 5, 4).double()
    weight_BNQ = torch.rand(2, 3, 9).double()
    images_BNHQD = (q_BHQD[:, None] @ k_BNHRD.mT / 2).softmax(dim=-1) @ v_BNHRD
    expected_BHQD = torch.einsum("bnhqd,bnq->bhqd", images_BNHQD, weight_BNQ)
    k_BHXD, v_BHXD = (t_BNHRD.transpose(1, 2).flatten(2, 3) for t_BNHRD in (k_BNHRD, v_BNHRD))
    torch.testing.assert_close(attend_weighted(q_BHQD, k_BHXD, v_BHXD, weight_BNQ), expected_BHQD)


def test_attention_to_all_tokens_of_one_reference_is_attention_to_each():
    q_BHQD, k_BHXD, v_BHXD = torch.randn(2, 2, 9, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    together_BHQD = attend_together(q_BHQD, k_BHXD, v_BHXD, torch.zeros(2, 1, 1))
    torch.testing.assert_close(together_BHQD, attend_weighted(q_BHQD, k_BHXD, v_BHXD, torch.ones(2, 1, 9)))


@pytest.mark.parametrize("kwargs", [{}, {"references": None}])
def test_without_references_an_installed_adapter_leaves_the_base_bit_for_bit(make_unet, installed, run_unet, kwargs):
    torch.testing.assert_close(run_unet(installed, **kwargs), run_unet(make_unet()), rtol=0, atol=0)


@pytest.mark.parametrize("merge", ["weighted", "concat", "mean"])
def test_rows_without_references_are_the_base_bit_for_bit(make_unet, installed, run_unet, make_references, merge):
    references = make_references([0, 2], merge=merge)
    base, adapted = run_unet(make_unet(), 2), run_unet(installed, 2, references=references)
    assert torch.equal(base[0], adapted[0])
    assert not torch.allclose(base[1], adapted[1], atol=1e-3)


def test_references_with_no_slots_are_the_base_bit_for_bit(make_unet, installed, run_unet, make_references):
    references = make_references([0, 0])
    assert references.count == 0
    assert torch.equal(run_unet(installed, 2, references=references), run_unet(make_unet(), 2))


@pytest.mark.parametrize("merge", ["weighted", "concat", "mean"])
def test_the_order_of_the_references_does_not_matter(installed, run_unet, make_references, merge):
    references = make_references([3], merge=merge)
    names = ("image_BNRE", "phrase_BNTE", "words_BNT", "present_BN", "scale_BN")
    turned = make_references([3], merge=merge, **{name: getattr(references, name).flip(1) for name in names})
    torch.testing.assert_close(
        run_unet(installed, references=references), run_unet(installed, references=turned), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("merge", ["weighted", "concat", "mean"])
def test_absent_slots_contribute_nothing_even_if_they_hold_nan(installed, run_unet, make_references, merge):
    plain, padded = make_references([2], merge=merge), make_references([2], slots=4, merge=merge)
    for name in ("image_BNRE", "phrase_BNTE", "scale_BN"):
        getattr(padded, name)[:, :2] = getattr(plain, name)
        getattr(padded, name)[:, 2:] = torch.nan
    torch.testing.assert_close(
        run_unet(installed, references=plain), run_unet(installed, references=padded), atol=1e-4, rtol=0
    )


def test_a_mixed_batch_equals_its_rows_alone(installed, run_unet, make_references):
    rows = [make_references([count], seed=count) for count in (1, 3, 2)]
    together = run_unet(installed, 3, references=type(rows[0]).stack(rows))
    for index, row in enumerate(rows):
        others = [make_references([1]) if i != index else row for i in range(3)]
        alone = run_unet(installed, 3, references=type(row).stack(others))
        torch.testing.assert_close(together[index], alone[index], atol=1e-4, rtol=0)


@pytest.mark.parametrize("merge", ["weighted", "concat", "mean"])
def test_a_region_of_zeros_removes_that_reference(installed, run_unet, make_references, merge):
    regions_BNHW = torch.tensor([1.0, 0.0])[None, :, None, None].expand(1, 2, 8, 8)
    both = make_references([2], regions_BNHW=regions_BNHW, latent_size=(8, 8), merge=merge)
    first = make_references([2], present_BN=torch.tensor([[True, False]]), merge=merge)
    torch.testing.assert_close(
        run_unet(installed, references=both), run_unet(installed, references=first), atol=1e-4, rtol=0
    )


def test_a_region_confines_a_lone_reference(installed, run_unet, make_references):
    regions_BNHW = torch.zeros(1, 1, 8, 8)
    regions_BNHW[..., 4:] = 1
    maps = ReferenceMaps()
    references = make_references([1], regions_BNHW=regions_BNHW, latent_size=(8, 8))
    run_unet(installed, references=references, reference_maps=maps)
    for (relevance_BNQ,) in maps.relevance.values():
        assert torch.equal(relevance_BNQ.unflatten(-1, (4, 4))[0, 0], torch.tensor([0.0, 0, 1, 1]).expand(4, 4))


def test_oracle_weights_replace_the_word_maps_and_are_normalised(installed, run_unet, make_references):
    oracle_BNHW = torch.zeros(1, 2, 8, 8)
    oracle_BNHW[0, 0, :, :4], oracle_BNHW[0, 1, :, :2] = 3, 1
    maps = ReferenceMaps()
    references = make_references([2], oracle_BNHW=oracle_BNHW, latent_size=(8, 8))
    run_unet(installed, references=references, reference_maps=maps)
    for (relevance_BNQ,) in maps.relevance.values():
        columns_NX = relevance_BNQ.unflatten(-1, (4, 4))[0, :, 0]
        torch.testing.assert_close(columns_NX, torch.tensor([[0.75, 1, 0, 0], [0.25, 0, 0, 0]]))


@pytest.mark.parametrize("merge", ["weighted", "concat", "mean"])
def test_scale_0_is_the_base_bit_for_bit(make_unet, installed, run_unet, make_references, merge):
    references = make_references([2], scale_BN=torch.zeros(1, 2), merge=merge)
    assert torch.equal(run_unet(installed, references=references), run_unet(make_unet()))


def test_scale_acts_after_normalisation(installed, run_unet, make_references):
    silenced = make_references([2], scale_BN=torch.tensor([[1.0, 0.0]]))
    alone = make_references([2], scale_BN=torch.ones(1, 2), present_BN=torch.tensor([[True, False]]))
    difference = run_unet(installed, references=silenced) - run_unet(installed, references=alone)
    assert difference.abs().max() > 1e-3  # renormalising would make them equal


def test_concat_and_mean_agree_on_one_reference(installed, run_unet, make_references):
    concat, mean = (run_unet(installed, references=make_references([1], merge=m)) for m in ("concat", "mean"))
    torch.testing.assert_close(concat, mean, atol=1e-4, rtol=0)


def test_without_gate_a_lone_reference_is_a_plain_ip_adapter(installed, run_unet, make_references):
    training_free, mean = make_references([1], is_gated=False), make_references([1], merge="mean")
    assert torch.equal(run_unet(installed, references=training_free), run_unet(installed, references=mean))
    assert not torch.equal(
        run_unet(installed, references=training_free), run_unet(installed, references=make_references([1]))
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("merge", ["weighted", "concat", "mean"])
def test_half_precision_stays_finite_with_extreme_references(
    make_unet, make_adapter, run_unet, make_references, dtype, merge
):
    unet = make_unet().to(dtype)
    make_adapter(unet).install(unet, dtype=dtype)
    references = make_references([3, 0], merge=merge)
    references = make_references(
        [3, 0],
        merge=merge,
        phrase_BNTE=references.phrase_BNTE * 200,  # logits far apart: most maps underflow
    ).to(dtype=dtype)
    assert bool(run_unet(unet, 2, references=references).isfinite().all())


def test_float32_adapters_train_under_autocast(unet, make_adapter, run_unet, make_references):
    adapter = make_adapter(unet).install(unet)
    for parameter in adapter.trainable_parameters():
        parameter.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        run_unet(unet, references=make_references([2])).float().square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) and p.grad.any() for p in adapter.trainable_parameters())


@pytest.mark.parametrize("size", [(8, 12), (6, 8), (16, 4)])
def test_any_latent_size_works(installed, run_unet, make_references, size):
    height, width = size
    references = make_references([2], regions_BNHW=torch.rand(1, 2, 30, 20), latent_size=size)
    assert run_unet(installed, height=height, width=width, references=references).shape[-2:] == size


def test_no_gradient_flows_through_the_map(installed, run_unet, make_references):
    references = make_references([2])
    phrase_BNTE = references.phrase_BNTE.clone().requires_grad_()
    image_BNRE = references.image_BNRE.clone().requires_grad_()
    run_unet(
        installed, references=make_references([2], phrase_BNTE=phrase_BNTE, image_BNRE=image_BNRE)
    ).sum().backward()
    assert phrase_BNTE.grad is None
    assert image_BNRE.grad is not None and image_BNRE.grad.abs().sum() > 0


def test_a_recorder_may_ask_for_the_gradient_of_the_mass(installed, run_unet, make_references):
    phrase_BNTE = make_references([2]).phrase_BNTE.clone().requires_grad_()
    maps = ReferenceMaps(has_gradient=True)
    output = run_unet(installed, references=make_references([2], phrase_BNTE=phrase_BNTE), reference_maps=maps)
    torch.stack([mass_BNQ[..., 0].sum() for (mass_BNQ,) in maps.mass.values()]).sum().backward()
    assert phrase_BNTE.grad is not None and bool(phrase_BNTE.grad.isfinite().all()) and phrase_BNTE.grad.any()
    assert torch.equal(output, run_unet(installed, references=make_references([2])))


def test_such_a_recorder_lets_no_gradient_of_the_output_through_the_map(installed, run_unet, make_references):
    phrase_BNTE = make_references([2]).phrase_BNTE.clone().requires_grad_()
    image_BNRE = make_references([2]).image_BNRE.clone().requires_grad_()
    references = make_references([2], phrase_BNTE=phrase_BNTE, image_BNRE=image_BNRE)
    run_unet(installed, references=references, reference_maps=ReferenceMaps(has_gradient=True)).sum().backward()
    assert image_BNRE.grad is not None and phrase_BNTE.grad is None


def test_recorded_mass_is_a_distribution_over_positions_and_0_if_absent(installed, run_unet, make_references):
    maps = ReferenceMaps()
    run_unet(installed, 2, references=make_references([1, 2]), reference_maps=maps)
    assert set(maps.mass) == {name for name in installed.attn_processors if "attn2" in name}
    for (mass_BNQ,) in maps.mass.values():
        torch.testing.assert_close(mass_BNQ.sum(dim=-1), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))


def test_a_recorder_may_name_its_layers(installed, run_unet, make_references):
    (layer, *_) = (name for name in installed.attn_processors if "attn2" in name)
    maps = ReferenceMaps(layers={layer})
    run_unet(installed, references=make_references([2], merge="concat"), reference_maps=maps)
    assert set(maps.mass) == {layer} and not maps.relevance


def test_the_cache_changes_nothing(installed, run_unet, make_references):
    references = make_references([2])
    cache = ReferenceCache(references)
    with torch.no_grad():
        first, second = (run_unet(installed, references=references, reference_cache=cache) for _ in range(2))
        assert torch.equal(first, run_unet(installed, references=references))
    assert torch.equal(first, second)


def test_a_cache_for_other_references_is_refused(installed, run_unet, make_references):
    cache = ReferenceCache(make_references([1]))
    with torch.no_grad(), pytest.raises(ReferencesError, match="other references"):
        run_unet(installed, references=make_references([1]), reference_cache=cache)


def test_a_cache_is_refused_while_gradients_are_on(installed, run_unet, make_references):
    references = make_references([1])
    with pytest.raises(ReferencesError, match="gradients"):
        run_unet(installed, references=references, reference_cache=ReferenceCache(references))


def test_guidance_may_stop_midway(installed, run_unet, make_references):
    positive = make_references([2])
    guided = positive.with_negative(make_references([2], seed=9))
    cache = ReferenceCache(guided)
    with torch.no_grad():
        run_unet(installed, 2, references=guided, reference_cache=cache)
        rest = run_unet(installed, 1, references=guided, reference_cache=cache)
        assert torch.equal(rest, run_unet(installed, 1, references=positive))


def test_references_for_another_batch_are_refused(installed, run_unet, make_references):
    with pytest.raises(ReferencesError, match="references for 3 rows"):
        run_unet(installed, 2, references=make_references([1, 1, 1]))


def test_self_attention_takes_the_arguments_without_a_warning(installed, run_unet, make_references, caplog):
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    run_unet(installed, references=make_references([1]), reference_maps=ReferenceMaps())
    logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_the_scale_of_loras_does_not_collide(installed, run_unet, make_references):
    references = make_references([2])
    assert torch.equal(
        run_unet(installed, references=references, scale=1.0), run_unet(installed, references=references)
    )


def test_gradient_checkpointing_changes_nothing(installed, run_unet, make_references):
    grads = []
    for _ in range(2):
        image_BNRE = make_references([2]).image_BNRE.clone().requires_grad_()
        run_unet(installed, references=make_references([2], image_BNRE=image_BNRE)).sum().backward()
        grads.append(image_BNRE.grad)
        installed.train().enable_gradient_checkpointing()
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-4)


def test_the_prompt_keys_are_kept_for_this_very_text_only(make_references):
    text_BTE, calls = torch.randn(1, 3, 4), []

    def build() -> int:
        calls.append(len(calls))
        return len(calls)

    cache = ReferenceCache(make_references([1]))
    assert [cache.get_of_text("a", text_BTE, build), cache.get_of_text("a", text_BTE, build)] == [1, 1]
    assert cache.get_of_text("b", text_BTE, build) == 2
    assert cache.get_of_text("a", text_BTE.clone(), build) == 3
    text_BTE += 1
    assert cache.get_of_text("a", text_BTE, build) == 4
