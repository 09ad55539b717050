"""Whole generations, from photos to latents, against the official code."""

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionModelWithProjection

from mip.model.encoding import image_pixels
from mip.model.pipeline import MIPAdapterXLPipeline
from mip.model.request import Reference

# diffusers' Euler scheduler with numpy 2.4.


@pytest.fixture(scope="module")
def pipe(golden):
    encoder = CLIPVisionModelWithProjection.from_pretrained(golden / "base" / "image_encoder").eval()
    pipeline = MIPAdapterXLPipeline.from_pretrained(golden / "base", image_encoder=encoder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def read_photo(golden, name):
    with Image.open(golden / "reference_images" / f"{name}.png") as photo:
        return photo.copy()


def recorded_references(golden, params):
    """One list of references per prompt; the official code cuts photos that are not square."""
    photos = iter([[read_photo(golden, name) for name in group] for group in params["reference_images"]])
    return [[Reference(name, next(photos)) for name in row] for row in params["entity_names"]]


def negative_prompt(params):
    """The manifest marks the official default by a remark after it."""
    given = params["negative_prompt"]
    texts = [given] * len(params["prompts"]) if isinstance(given, str) else given
    return [text.removesuffix(" (official default)") for text in texts]


def test_a_generation_gives_the_recorded_latents(pipe, golden, generation_case):
    params, tensors = generation_case.params, generation_case.tensors
    pipe.load_mip_adapter(golden / params["adapter"], variant=params["variant"])
    after_step = []

    def record(pipeline, step, timestep, tensors_of_step):
        after_step.append(tensors_of_step["latents"])
        return tensors_of_step

    latents = pipe(
        params["prompts"],
        references=recorded_references(golden, params),
        scale=params["scale"],
        negative_prompt=negative_prompt(params),
        guidance_scale=params["guidance_scale_effective"],
        num_inference_steps=params["steps"],
        num_images_per_prompt=params["num_samples"],
        height=params["height"],
        width=params["width"],
        generator=torch.Generator().manual_seed(params["seed"]),
        framing="centre_crop",
        callback_on_step_end=record,
        output_type="latent",
    ).images
    recorded_steps = [*tensors["latents_after_step"], tensors["final_latents"]]
    for ours, recorded in zip([*after_step, latents], recorded_steps, strict=True):
        assert (ours - recorded).norm() / recorded.norm() < 2e-4


def test_photos_are_prepared_as_recorded(golden, golden_case):
    for key, recorded_3HW in golden_case("reference_pixels").tensors.items():
        photo = read_photo(golden, key.removeprefix("pixel_values."))
        (ours_3HW,) = image_pixels([photo], size=recorded_3HW.shape[-1], framing="centre_crop")
        torch.testing.assert_close(ours_3HW, recorded_3HW.float(), atol=2e-3, rtol=0)
