"""The pipeline with references: what it adds, and that it takes nothing from its parent."""

from typing import Any

import pytest
import torch
from diffusers.callbacks import SDXLCFGCutoffCallback
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from PIL import Image

from mip.errors import CheckpointError, ConfigError, ReferencesError
from mip.model.pipeline import MIPAdapterXLPipeline
from mip.model.references import ReferenceMaps
from mip.model.request import Reference

# diffusers' Euler scheduler with numpy 2.4.


PROMPT = "a cat, a dog, a red hat"


def draw(pipeline, prompt: Any = PROMPT, seeds=(0,), **kwargs) -> torch.Tensor:
    """Latents; every image of a batch starts from a seed of its own."""
    settings = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "latent"}
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(prompt, generator=generator, **(settings | kwargs)).images


def seen_references(pipeline, monkeypatch, **kwargs):
    """The References that the UNet receives."""
    seen = []
    forward = pipeline.unet.forward

    def spy(*args, **call):
        seen.append((call["cross_attention_kwargs"] or {}).get("references"))
        return forward(*args, **call)

    monkeypatch.setattr(pipeline.unet, "forward", spy)
    draw(pipeline, **kwargs)
    return seen


@pytest.mark.parametrize("references", [None, [], [[]]])
def test_without_references_it_is_the_parent_bit_for_bit(build_pipeline, pipe, references):
    parent = StableDiffusionXLPipeline(**{k: v for k, v in build_pipeline().components.items()})
    parent.set_progress_bar_config(disable=True)
    assert torch.equal(draw(pipe, references=references), draw(parent))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0, 0.0])
def test_any_number_of_references_with_and_without_guidance(pipe, objects, count, guidance_scale):
    images = draw(pipe, references=objects[:count], guidance_scale=guidance_scale)
    assert images.shape == (1, 4, 8, 8) and bool(images.isfinite().all())
    assert not torch.allclose(images, draw(pipe, guidance_scale=guidance_scale), atol=1e-3)


def test_prompts_of_one_batch_may_have_different_numbers_of_references(pipe, objects):
    pipe.to(torch.float64)  # the tiny UNet turns float32's rounding into 1e-3
    prompts, rows = ["a cat", "a dog", "a cat, a dog, a red hat"], [objects[:1], [], objects]
    together = draw(pipe, prompts, seeds=(0, 1, 2), references=rows)
    for index, row in enumerate(rows):
        alone = draw(pipe, prompts[index], seeds=(index,), references=row)
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-4, rtol=1e-5)


def test_several_images_per_prompt_share_its_references(pipe, objects):
    prompts, rows = ["a cat", "a dog, a red hat"], [objects[:1], objects[1:]]
    images = draw(pipe, prompts, seeds=(0, 1, 2, 3), references=rows, num_images_per_prompt=2)
    alone = draw(pipe, prompts[1], seeds=(3,), references=rows[1])
    torch.testing.assert_close(images[3:], alone, atol=2e-3, rtol=0)


@pytest.mark.parametrize("size", [(16, 24), (40, 16)])
def test_any_size_with_regions(pipe, photos, size):
    region = torch.zeros(10, 10)
    region[:, :5] = 1
    references = [Reference("cat", [photos[0]], region=region), Reference("dog", [photos[1]])]
    images = draw(pipe, references=references, height=size[0], width=size[1])
    assert images.shape[-2:] == (size[0] // 2, size[1] // 2)


def test_a_reference_acts_only_in_its_region(pipe, photos):
    nowhere = [Reference("cat", photos[:1], region=torch.zeros(4, 4))]
    everywhere = [Reference("cat", photos[:1], region=torch.ones(4, 4))]
    assert torch.equal(draw(pipe, references=nowhere), draw(pipe))
    assert torch.equal(draw(pipe, references=everywhere), draw(pipe, references=[Reference("cat", photos[:1])]))


def test_given_latents_decide_the_size(pipe, objects):
    latents = torch.randn(1, 4, 6, 10)
    references = [Reference("cat", objects[0].images, region=torch.ones(4, 4))]
    assert draw(pipe, references=references, latents=latents).shape == latents.shape


def test_image_tokens_of_one_object_are_averaged(pipe, photos):
    twice = draw(pipe, references=[Reference("cat", [photos[0], photos[0]])])
    torch.testing.assert_close(twice, draw(pipe, references=[Reference("cat", [photos[0]])]), atol=1e-3, rtol=0)
    both = draw(pipe, references=[Reference("cat", photos[:2])])
    assert not torch.allclose(both, twice, atol=1e-3)


def test_several_photos_give_the_mean_of_their_tokens(pipe, photos, monkeypatch):
    one, other, both = (
        seen_references(pipe, monkeypatch, prompt="a cat", references=[Reference("cat", own)])[0].image_BNRE[-1]
        for own in (photos[:1], photos[1:2], photos[:2])
    )
    torch.testing.assert_close(both, (one + other) / 2)
    assert not torch.allclose(one, other, atol=1e-2)


def test_scale_0_is_the_base_and_scales_multiply(pipe, photos):
    assert torch.equal(draw(pipe, references=[Reference("cat", photos)], scale=0.0), draw(pipe))
    product = draw(pipe, references=[Reference("cat", photos, scale=0.5)], scale=0.5)
    assert torch.equal(product, draw(pipe, references=[Reference("cat", photos)], scale=0.25))


def test_concat_and_mean_agree_on_one_reference(pipe, objects):
    concat, mean = (draw(pipe, references=objects[:1], merge=merge) for merge in ("concat", "mean"))
    torch.testing.assert_close(concat, mean, atol=1e-3, rtol=0)


def test_gated_false_leaves_the_gate_out(pipe, objects):
    assert torch.equal(
        draw(pipe, references=objects[:1], gated=False), draw(pipe, references=objects[:1], merge="mean")
    )
    assert torch.equal(draw(pipe, references=objects, gated=True), draw(pipe, references=objects))


def test_a_plain_ip_adapter_has_no_gate_to_use(build_pipeline, adapter_files, objects):
    pipeline = build_pipeline()
    pipeline.load_mip_adapter(adapter_files["plain"])
    assert torch.equal(draw(pipeline, references=objects), draw(pipeline, references=objects, gated=False))
    with pytest.raises(ConfigError, match="gated=True"):
        draw(pipeline, references=objects, gated=True)


def test_oracle_regions_replace_the_word_maps(pipe, photos):
    whole, nothing = torch.ones(8, 8), torch.zeros(8, 8)
    references = [Reference("cat", [photos[0]], region=whole), Reference("dog", [photos[1]], region=nothing)]
    swapped_name = [Reference("red hat", [photos[0]], region=whole), references[1]]
    images = draw(pipe, references=references, oracle=True)
    torch.testing.assert_close(images, draw(pipe, references=swapped_name, oracle=True), atol=1e-3, rtol=0)
    with pytest.raises(ReferencesError, match="no region for dog"):
        draw(pipe, references=[references[0], Reference("dog", [photos[1]])], oracle=True)


@pytest.mark.parametrize("variant", ["sdxl", "sdxl_plus"])
def test_the_negative_half_has_no_image_no_name_and_the_same_lengths(
    build_pipeline, adapter_files, objects, monkeypatch, variant
):
    pipeline = build_pipeline()
    pipeline.load_mip_adapter(adapter_files[variant], variant=variant)
    references, *_ = seen_references(pipeline, monkeypatch, references=objects[:2])
    assert (references.batch, references.negatives) == (2, 1)
    assert torch.equal(references.words_BNT[0], references.words_BNT[1])
    assert torch.equal(references.phrase_BNTE[0, 0], references.phrase_BNTE[0, 1])
    assert torch.equal(references.scale_BN[0], references.scale_BN[1])
    with torch.no_grad():
        zeros_X3HW = torch.zeros(1, 3, 32, 32)
        features = pipeline.mip_adapter.variant.features(pipeline.image_encoder, zeros_X3HW)
        features = torch.zeros_like(features) if variant == "sdxl" else features
        expected_RE = pipeline.mip_adapter.image_tokens(features)[0]
    torch.testing.assert_close(references.image_BNRE[0], expected_RE.expand(2, -1, -1))


def test_references_are_encoded_once_per_call(pipe, objects, monkeypatch):
    passes = []
    pipe.image_encoder.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    draw(pipe, [PROMPT, PROMPT], seeds=(0, 1), references=objects, num_inference_steps=3)
    assert passes == [3]


def test_nothing_of_a_call_stays_on_the_pipeline(pipe, objects):
    draw(pipe, references=objects)
    assert pipe.cross_attention_kwargs is None


def test_maps_can_be_recorded(pipe, objects):
    maps = ReferenceMaps()
    draw(pipe, references=objects, cross_attention_kwargs={"reference_maps": maps})
    for recorded in maps.relevance.values():
        assert [relevance_BNQ.shape for relevance_BNQ in recorded] == [(2, 3, 16)] * 2
    assert set(maps.mass) == {processor.name for processor in pipe.mip_adapter.processors.values()}


def test_guidance_may_be_cut_off_by_a_callback(pipe, objects):
    cutoff = SDXLCFGCutoffCallback(cutoff_step_ratio=0.4)
    images = draw(pipe, references=objects, num_inference_steps=3, callback_on_step_end=cutoff)
    assert images.shape == (1, 4, 8, 8)


def test_inference_mode_draws_the_same(pipe, objects):
    with torch.inference_mode():
        drawn = draw(pipe, references=objects)
    assert torch.equal(drawn, draw(pipe, references=objects))


def test_the_prompt_is_projected_once_and_anew_when_a_callback_replaces_it(pipe, objects):
    calls = []
    layer = next(p for p in pipe.mip_adapter.processors.values())
    to_v = pipe.unet.get_submodule(layer.name.removesuffix(".processor")).to_v
    to_v.register_forward_hook(lambda *_: calls.append(None))
    draw(pipe, references=objects, num_inference_steps=4)
    assert len(calls) == 1

    def replace(_pipe, step, _time, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] * 2} if step == 1 else {}

    changed = {"callback_on_step_end": replace, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    other = draw(pipe, references=objects, num_inference_steps=4, **changed)
    assert len(calls) == 3
    assert not torch.allclose(other, draw(pipe, references=objects, num_inference_steps=4), atol=1e-4)


def test_embedded_prompts_are_counted(pipe, objects):
    prompts = [PROMPT, f"{PROMPT} on a mat"]
    embedded = pipe.encode_prompt(prompts, do_classifier_free_guidance=True)
    names = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    images = draw(pipe, None, seeds=(0, 1), references=objects, **dict(zip(names, embedded, strict=True)))
    torch.testing.assert_close(images, draw(pipe, prompts, seeds=(0, 1), references=objects), atol=1e-3, rtol=0)


def test_half_precision_pipelines_take_references(build_pipeline, adapter_files, objects):
    pipeline = build_pipeline().to(torch.bfloat16)
    pipeline.load_mip_adapter(adapter_files["sdxl_plus"])
    images = draw(pipeline, references=objects)
    assert images.dtype == torch.bfloat16 and bool(images.isfinite().all())


def test_unloading_restores_the_unet_and_loading_again_replaces(build_pipeline, adapter_files, objects):
    pipeline = build_pipeline()
    processors = pipeline.unet.attn_processors
    for name in ("sdxl", "sdxl_plus"):
        pipeline.load_mip_adapter(adapter_files[name])
    assert pipeline.mip_adapter.variant.name == "sdxl_plus"
    pipeline.unload_mip_adapter()
    assert pipeline.unet.attn_processors == processors
    with pytest.raises(ConfigError, match="call load_mip_adapter first"):
        draw(pipeline, references=objects)


def test_a_failed_load_keeps_the_adapter_before(pipe, adapter_files):
    before = pipe.mip_adapter
    with pytest.raises(CheckpointError):
        pipe.load_mip_adapter(adapter_files["sdxl"], variant="sdxl_plus")
    assert pipe.mip_adapter is before and before.is_installed


def test_an_encoder_of_another_adapter_is_refused(build_pipeline, adapter_files, make_image_encoder):
    pipeline = build_pipeline()
    with pytest.raises(ConfigError, match="features of width 9, expected 6"):
        pipeline.load_mip_adapter(adapter_files["sdxl"], image_encoder=make_image_encoder(projection_dim=9))
    with pytest.raises(ConfigError, match="features of width 4, expected 8"):
        pipeline.load_mip_adapter(adapter_files["sdxl_plus"], image_encoder=make_image_encoder(hidden_size=4))
    assert pipeline.mip_adapter is None


def test_a_saved_pipeline_and_encoder_are_loaded_from_folders(build_pipeline, adapter_files, objects, tmp_path):
    original = build_pipeline()
    original.image_encoder.save_pretrained(tmp_path / "adapters" / "encoder")
    original.save_pretrained(tmp_path / "base")
    pipeline = MIPAdapterXLPipeline.from_pretrained(tmp_path / "base", image_encoder=None)
    pipeline.set_progress_bar_config(disable=True)
    folder = adapter_files["sdxl"].parent
    with pytest.raises(ConfigError, match="image_encoder"):
        pipeline.load_mip_adapter(folder, weight_name="sdxl.safetensors")
    pipeline.load_mip_adapter(
        folder,
        weight_name="sdxl.safetensors",
        image_encoder=tmp_path / "adapters",
        image_encoder_subfolder="encoder",
    )
    original.load_mip_adapter(adapter_files["sdxl"])
    # Weights mapped from a file may be aligned otherwise in memory, and kernels then add in another order.
    torch.testing.assert_close(
        draw(pipeline, references=objects), draw(original, references=objects), rtol=1e-5, atol=1e-2
    )


def test_a_missing_file_is_reported_in_one_line(build_pipeline, tmp_path):
    with pytest.raises(CheckpointError, match="weight_name") as error:
        build_pipeline().load_mip_adapter(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="no such file"):
        build_pipeline().load_mip_adapter(tmp_path, weight_name="no.bin")


@pytest.mark.parametrize(
    ("name", "images", "region", "match"),
    [
        ("  ", [Image.new("RGB", (4, 4))], None, "give the noun"),
        ("cat", [], None, "one or more"),
        ("cat", Image.new("RGB", (4, 4)), None, "as a list"),
        ("cat", [Image.new("RGB", (4, 4))], torch.ones(1, 4, 4), "height, width"),
    ],
)
def test_incomplete_references_are_refused(name, images, region, match):
    with pytest.raises(ReferencesError, match=match):
        Reference(name, images, region=region)


def test_references_that_do_not_fit_the_prompts_are_refused(pipe, objects):
    with pytest.raises(ReferencesError, match="2 lists of references for 1 prompts"):
        draw(pipe, references=[objects, objects])
    with pytest.raises(ReferencesError, match="one flat list"):
        draw(pipe, ["a cat", "a dog"], seeds=(0, 1), references=[objects[0], objects])
    with pytest.raises(ReferencesError, match="give Reference"):
        draw(pipe, references=[["cat"]])


def test_misspelt_arguments_are_refused(pipe, objects):
    with pytest.raises(TypeError, match="reference_images"):
        draw(pipe, reference_images=objects)
