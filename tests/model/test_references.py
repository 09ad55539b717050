"""How references are checked, joined and moved."""

import pytest
import torch

from mip.errors import ReferencesError
from mip.model.references import References, layer_grid


def test_stack_pads_with_absent_slots(make_references):
    stacked = References.stack([make_references([1]), make_references([3])])
    assert stacked.present_BN.tolist() == [[True, False, False], [True, True, True]]
    assert not stacked.image_BNRE[0, 1:].any() and not stacked.words_BNT[0, 1:].any()


def test_stack_gives_whole_regions_to_rows_without(make_references):
    half_BNHW = torch.full((1, 2, 4, 4), 0.5)
    stacked = References.stack(
        [
            make_references([1], latent_size=(8, 8)),
            make_references([2], latent_size=(8, 8), regions_BNHW=half_BNHW),
        ]
    )
    assert stacked.regions_BNHW is not None
    assert bool((stacked.regions_BNHW[0, 0] == 1).all()) and bool((stacked.regions_BNHW[1] == 0.5).all())


@pytest.mark.parametrize("change", [{"merge": "mean"}, {"is_gated": False}, {"latent_size": (8, 8)}])
def test_stack_refuses_rows_with_other_settings(make_references, change):
    with pytest.raises(ReferencesError, match=next(iter(change))):
        References.stack([make_references([1]), make_references([1], **change)])


def test_stack_refuses_nothing():
    with pytest.raises(ReferencesError, match="at least one row"):
        References.stack([])


def test_the_negative_half_comes_first_and_can_be_left_out(make_references):
    positive, negative = make_references([2, 1]), make_references([2, 1], seed=8)
    both = positive.with_negative(negative)
    assert (both.batch, both.negatives) == (4, 2)
    assert torch.equal(both.image_BNRE[:2], negative.image_BNRE)
    assert torch.equal(both.rows(2).image_BNRE, positive.image_BNRE)
    assert both.rows(4) is both


def test_repeat_keeps_the_rows_of_a_prompt_together(make_references):
    references = make_references([1, 2])
    assert references.repeat(2).present_BN.tolist() == [[True, False]] * 2 + [[True, True]] * 2


def test_to_casts_embeddings_and_keeps_scales_in_float32(make_references):
    moved = make_references([1], regions_BNHW=torch.ones(1, 1, 2, 2), latent_size=(8, 8)).to(dtype=torch.float16)
    assert moved.image_BNRE.dtype == moved.phrase_BNTE.dtype == torch.float16
    assert moved.scale_BN.dtype == torch.float32 and moved.present_BN.dtype == torch.bool
    assert moved.regions_BNHW is not None and moved.regions_BNHW.dtype == torch.float32


def test_names_gathers_the_tokens_of_the_name_in_their_order(make_references):
    words_BNT = torch.zeros(1, 2, 77, dtype=torch.bool)
    words_BNT[0, 0, [2, 5]], words_BNT[0, 1, 1] = True, True
    references = make_references([2], words_BNT=words_BNT)
    phrase_BNWE, words_BNW = references.names
    assert words_BNW.tolist() == [[[True, True], [True, False]]]
    assert torch.equal(phrase_BNWE[0, 0], references.phrase_BNTE[0, 0, [2, 5]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_BNRE": torch.zeros(1, 1, 4, 12)}, "image_BNRE of shape"),
        ({"image_BNRE": torch.zeros(1, 2, 4, 5)}, "T and E must agree"),
        ({"phrase_BNTE": torch.zeros(1, 2, 5, 12)}, "T and E must agree"),
        ({"words_BNT": torch.ones(1, 2, 77)}, "give torch.bool"),
        ({"words_BNT": torch.zeros(1, 2, 77, dtype=torch.bool)}, "without name tokens"),
        ({"merge": "sum"}, "give one of weighted"),
        ({"scale_BN": torch.tensor([[1.0, torch.nan]])}, "finite"),
        ({"regions_BNHW": torch.ones(1, 2, 8, 8)}, "latent_size"),
        ({"regions_BNHW": -torch.ones(1, 2, 8, 8), "latent_size": (8, 8)}, "negative"),
        ({"oracle_BNHW": torch.full((1, 2, 8, 8), torch.inf), "latent_size": (8, 8)}, "finite"),
    ],
)
def test_contradictions_are_refused(make_references, change, message):
    with pytest.raises(ReferencesError, match=message):
        make_references([2], **change)


def test_a_name_without_tokens_is_fine_where_no_word_maps_are_used(make_references):
    make_references([2], words_BNT=torch.zeros(1, 2, 77, dtype=torch.bool), merge="mean")


@pytest.mark.parametrize(
    ("latent_size", "positions", "grid"),
    [((128, 128), 4096, (64, 64)), ((96, 160), 960, (24, 40)), ((9, 7), 20, (5, 4)), ((8, 8), 64, (8, 8))],
)
def test_layer_grid_halves_and_rounds_up(latent_size, positions, grid):
    assert layer_grid(latent_size, positions) == grid


def test_layer_grid_refuses_the_size_of_another_input():
    with pytest.raises(ReferencesError, match="15 positions"):
        layer_grid((8, 8), 15)
