"""What users of diffusers expect to work beside references: each test would fail if the feature did nothing."""

import warnings

import numpy as np
import pytest
import torch
from diffusers.callbacks import SDXLCFGCutoffCallback
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.utils.constants import SAFETENSORS_WEIGHTS_NAME
from peft import LoraConfig
from safetensors.torch import load_file

from mip.errors import ConfigError, ReferencesError
from mip.model.checkpoint import read_adapter
from mip.model.pipeline import MIPAdapterXLPipeline
from mip.model.references import ReferenceMaps
from mip.model.request import Reference
from mip.visualize import overlay

PROMPT = "a cat, a dog, a red hat"


def run(pipeline, prompt: str | list[str] = PROMPT, seeds=(0,), **kwargs):
    settings = {"num_inference_steps": 4, "height": 16, "width": 16, "output_type": "latent"}
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(prompt, generator=generator, **(settings | kwargs))


def draw(pipeline, **kwargs):
    return run(pipeline, **kwargs).images


# The steps in which references act


def steps_with_references(pipe, monkeypatch, **kwargs):
    seen, forward = [], pipe.unet.forward

    def spy(*args, **call):
        seen.append("references" in (call["cross_attention_kwargs"] or {}))
        return forward(*args, **call)

    monkeypatch.setattr(pipe.unet, "forward", spy)
    draw(pipe, **kwargs)
    return seen


@pytest.mark.parametrize(
    ("window", "expected"),
    [((0, 1), range(10)), ((0.3, 1), range(3, 10)), ((0, 0.7), range(7)), ((0.5, 0.6), range(5, 6))],
)
def test_references_act_in_their_share_of_the_steps(pipe, objects, monkeypatch, window, expected):
    start, end = window
    seen = steps_with_references(
        pipe, monkeypatch, references=objects, reference_start=start, reference_end=end, num_inference_steps=10
    )
    assert seen == [step in expected for step in range(10)]


def test_the_share_counts_the_steps_that_are_really_taken(pipe, objects, monkeypatch):
    late = {"references": objects, "reference_start": 0.5}
    seen = steps_with_references(pipe, monkeypatch, **late, denoising_end=0.4, num_inference_steps=10)
    assert seen == [False, False, True, True]


def test_a_step_without_references_is_the_bases(pipe, objects):
    late = {"references": objects, "reference_start": 0.75}
    before_last = {}

    def keep(_pipe, step, _time, tensors):
        before_last[step] = tensors["latents"]
        return {}

    draw(pipe, **late, callback_on_step_end=keep)
    with_references = dict(before_last)
    draw(pipe, callback_on_step_end=keep)
    assert torch.equal(with_references[2], before_last[2])
    assert not torch.equal(with_references[3], before_last[3])
    assert pipe.cross_attention_kwargs is None


def test_callbacks_work_beside_a_window(pipe, objects):
    cutoff = SDXLCFGCutoffCallback(cutoff_step_ratio=0.5)
    window = {"references": objects, "reference_end": 0.75}
    cut = draw(pipe, **window, callback_on_step_end=cutoff)
    assert not torch.equal(cut, draw(pipe, **window))
    changed = draw(pipe, **window, callback_on_step_end=lambda p, n, t, k: {"latents": k["latents"] * 0})
    assert bool((changed == 0).all())


@pytest.mark.parametrize("window", [(0.5, 0.5), (0.6, 0.4), (-0.1, 1), (0, 1.1)])
def test_a_window_without_steps_is_refused(pipe, objects, window):
    with pytest.raises(ReferencesError, match="0 <= start < end <= 1"):
        draw(pipe, references=objects, reference_start=window[0], reference_end=window[1])


# Maps


def test_maps_are_means_by_block_and_sum_to_1(pipe, objects):
    recorded = ReferenceMaps()
    draw(pipe, references=objects, cross_attention_kwargs={"reference_maps": recorded})
    (maps,) = run(pipe, references=objects, return_maps=True).maps
    assert maps.names == ("cat", "dog", "red hat") and maps.mean_NHW.shape == (3, 8, 8)
    torch.testing.assert_close(maps.mean_NHW.sum(dim=0), torch.ones(8, 8))
    assert set(maps.blocks) == {"down_blocks.1", "mid_block", "up_blocks.0"}
    name = next(layer for layer in recorded.relevance if layer.startswith("mid_block"))
    mid_NQ = torch.stack([relevance_BNQ[1] for relevance_BNQ in recorded.relevance[name]]).mean(dim=0)
    mid_NHW = torch.nn.functional.interpolate(mid_NQ.unflatten(-1, (4, 4))[None], size=(8, 8), mode="bilinear")[0]
    torch.testing.assert_close(maps.blocks["mid_block"], mid_NHW)
    layers = {"down_blocks.1": 1, "mid_block": 1, "up_blocks.0": 2}
    weighted_NHW = sum(layers[block] * map_NHW for block, map_NHW in maps.blocks.items())
    torch.testing.assert_close(maps.mean_NHW, weighted_NHW / sum(layers.values()))


def test_swapping_two_references_swaps_their_maps(pipe, objects):
    (one,), (other,) = (run(pipe, references=row, return_maps=True).maps for row in (objects[:2], objects[1::-1]))
    torch.testing.assert_close(one.mean_NHW, other.mean_NHW.flip(0), atol=1e-4, rtol=0)
    assert not torch.allclose(one.mean_NHW[0], one.mean_NHW[1], atol=1e-3)


def test_each_image_has_the_maps_of_its_own_references(pipe, objects):
    several = {"prompt": ["a cat", PROMPT], "seeds": range(4), "num_images_per_prompt": 2}
    result = run(pipe, **several, references=[[], objects], return_maps=True)
    assert [maps.names for maps in result.maps] == [(), (), ("cat", "dog", "red hat"), ("cat", "dog", "red hat")]
    assert result.maps[0].mean_NHW.shape == (0, 8, 8)
    torch.testing.assert_close(result.maps[3].mean_NHW.sum(dim=0), torch.ones(8, 8))
    alone = run(pipe, seeds=(3,), references=objects, return_maps=True).maps[0]
    torch.testing.assert_close(result.maps[3].mean_NHW, alone.mean_NHW, atol=1e-3, rtol=0)


def test_maps_follow_regions_and_windows_and_survive_a_cutoff(pipe, photos):
    left, right = torch.zeros(8, 8), torch.zeros(8, 8)
    left[:, :4], right[:, 4:] = 1, 1
    references = [Reference("cat", photos[:1], region=left), Reference("dog", photos[1:2], region=right)]
    (maps,) = run(
        pipe,
        references=references,
        return_maps=True,
        reference_end=0.5,
        callback_on_step_end=SDXLCFGCutoffCallback(cutoff_step_ratio=0.4),
    ).maps
    assert float(maps.mean_NHW[0, :, :2].min()) == 1 and float(maps.mean_NHW[0, :, 6:].max()) == 0


def test_maps_come_without_references_and_in_a_tuple(pipe, objects):
    assert run(pipe, return_maps=True).maps[0].names == ()
    images, maps = run(pipe, references=objects, return_maps=True, return_dict=False)
    assert torch.equal(images, draw(pipe, references=objects)) and maps[0].names[2] == "red hat"


@pytest.mark.parametrize(
    "extra", [{"merge": "concat"}, {"cross_attention_kwargs": {"reference_maps": ReferenceMaps()}}]
)
def test_maps_that_cannot_be_had_are_refused(pipe, objects, extra):
    with pytest.raises(ConfigError, match="return_maps"):
        draw(pipe, references=objects, return_maps=True, **extra)


def test_an_overlay_shows_where_a_reference_acts(photos):
    map_HW = torch.zeros(4, 4)
    map_HW[:, 2:] = 1
    shown = np.asarray(overlay(photos[0], map_HW)).astype(int)
    assert shown.shape == (32, 32, 3)
    # Yellow where it is 1 and violet where it is 0: green tells them apart.
    assert shown[:, 24:, 1].min() > shown[:, :8, 1].max()
    with pytest.raises(ValueError, match="one reference at a time"):
        overlay(photos[0], map_HW[None])


# Names


@pytest.mark.parametrize(
    ("name", "prompt", "is_there"),
    [
        ("cat", "Two CATS on a mat", True),
        ("red hat", "a red  hat", True),
        ("cat", "a catalog", False),
        ("dog", "a cat", False),
    ],
)
def test_a_name_that_the_prompt_lacks_is_warned_of(pipe, photos, name, prompt, is_there):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draw(pipe, prompt=prompt, references=[Reference(name, photos[:1])])
    said = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert (said == []) if is_there else (name in said[0] and prompt in said[0])


def test_either_prompt_may_hold_the_name(pipe, photos):
    draw(pipe, prompt="on a mat", prompt_2="a cat", references=[Reference("cat", photos[:1])])
    with pytest.warns(UserWarning, match="'cat'"):
        run(pipe, prompt=["a cat", "a dog"], seeds=(0, 1), references=[Reference("cat", photos[:1])])


# Everything else that the parent can do


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler],
)
def test_schedulers_can_be_swapped(pipe, objects, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    drawn = draw(pipe, references=objects, reference_end=0.5)
    assert bool(drawn.isfinite().all()) and not torch.allclose(drawn, draw(pipe), atol=1e-3)


def test_a_lora_works_beside_the_adapter(pipe, objects):
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    plain = draw(pipe, references=objects)
    pipe.unet.add_adapter(config, adapter_name="style")
    both = draw(pipe, references=objects)
    assert not torch.allclose(both, plain, atol=1e-3)
    assert not torch.allclose(both, draw(pipe), atol=1e-3)
    # LoRA's own scale passes through beside the references, and switches it off.
    off = draw(pipe, references=objects, cross_attention_kwargs={"scale": 0.0})
    torch.testing.assert_close(off, plain, atol=1e-3, rtol=0)


def test_the_vae_may_slice_and_tile(pipe, objects):
    whole = draw(pipe, references=objects, output_type="pt")
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    torch.testing.assert_close(draw(pipe, references=objects, output_type="pt"), whole, atol=1e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", ["sdxl", "sdxl_plus"])
def test_other_precisions_draw_the_same_within_their_rounding(build_pipeline, adapter_files, objects, dtype, variant):
    drawn = []
    for kind in (torch.float32, dtype):
        pipeline = build_pipeline().to(kind)
        pipeline.load_mip_adapter(adapter_files[variant])
        drawn.append(draw(pipeline, references=objects))
    assert drawn[1].dtype == dtype
    assert (drawn[1].float() - drawn[0]).norm() / drawn[0].norm() < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_models_may_be_offloaded(pipe, objects, how):
    on_the_cpu = draw(pipe, references=objects)
    getattr(pipe, how)()
    torch.testing.assert_close(draw(pipe, references=objects).cpu(), on_the_cpu, atol=0.1, rtol=0)


def test_a_saved_pipeline_comes_back_with_its_adapter(build_pipeline, pipe, objects, tmp_path):
    before = draw(pipe, references=objects)
    pipe.mip_adapter.metadata = {"steps": "7"}
    pipe.save_pretrained(tmp_path)
    assert torch.equal(draw(pipe, references=objects), before)  # it is still in use
    loaded = MIPAdapterXLPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(loaded, references=objects), before, rtol=1e-5, atol=1e-2)
    assert read_adapter(tmp_path / "mip_adapter.safetensors").metadata["steps"] == "7"
    # The UNet beside it is the plain one, as stock diffusers reads it.
    assert load_file(tmp_path / "unet" / SAFETENSORS_WEIGHTS_NAME).keys() == build_pipeline().unet.state_dict().keys()
