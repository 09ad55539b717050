"""Whole generations, from photos to images, against the official code."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from mip.model.adapter import Arithmetic, MIPAdapter
from mip.model.encoding import image_pixels
from mip.model.pipeline import MIPAdapterXLPipeline
from mip.model.references import References
from mip.model.request import Reference
from tests.parity.golden import GOLDEN, Case, Ledger, photograph, references_of

FEATURES = 1e-5  # of text and images
# Relative, in the L2 norm, of latents and predictions. The golden data asks for 2e-4. In the official order of
# operations only the image encoder's input and output round otherwise; a quarter leaves room for other machines.
LATENTS: Mapping[Arithmetic, float] = {"fast": 2e-4, "official": 5e-5}
GRAY_LEVELS: Mapping[Arithmetic, int] = {"fast": 2, "official": 1}


@pytest.fixture(scope="module")
def pipe() -> MIPAdapterXLPipeline:
    encoder = CLIPVisionModelWithProjection.from_pretrained(GOLDEN / "base" / "image_encoder").eval()
    pipeline = MIPAdapterXLPipeline.from_pretrained(GOLDEN / "base", image_encoder=encoder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def recorded_encoders(pipe: MIPAdapterXLPipeline) -> Iterator[None]:
    """The recorded version of transformers had no fused attention; without it the text embeddings are the same bits."""
    encoders: list[Any] = [pipe.text_encoder, pipe.text_encoder_2, pipe.image_encoder]
    for encoder in encoders:
        encoder.set_attn_implementation("eager")
    yield
    for encoder in encoders:
        encoder.set_attn_implementation("sdpa")


def photos_of(params: Mapping[str, Any]) -> list[list[Image.Image]]:
    """Photographs of each object: those of the first prompt, then those of the next."""
    return [[photograph(name) for name in group] for group in params["reference_images"]]


def recorded_references(params: Mapping[str, Any]) -> list[list[Reference]]:
    """One list of references per prompt."""
    photos = iter(photos_of(params))
    return [[Reference(name, next(photos)) for name in row] for row in params["entity_names"]]


def negative_prompt(params: Mapping[str, Any]) -> list[str]:
    """The manifest marks the official default by a remark after it."""
    given = params["negative_prompt"]
    texts = [given] * len(params["prompts"]) if isinstance(given, str) else given
    return [text.removesuffix(" (official default)") for text in texts]


class Seen:
    """What the UNet was given and gave, at each step."""

    def __init__(self, pipe: MIPAdapterXLPipeline, case: Case) -> None:
        self.given: list[dict[str, Any]] = []
        self.predicted: list[Tensor] = []
        self.after_step: list[Tensor] = []
        params = case.params
        hooks = (
            pipe.unet.register_forward_pre_hook(lambda m, args, options: self.given.append(options), with_kwargs=True),
            pipe.unet.register_forward_hook(lambda m, args, output: self.predicted.append(output[0])),
        )
        self.images = pipe(
            params["prompts"],
            references=recorded_references(params),
            scale=params["scale"],
            negative_prompt=negative_prompt(params),
            guidance_scale=params["guidance_scale_effective"],
            num_inference_steps=params["steps"],
            num_images_per_prompt=params["num_samples"],
            height=params["height"],
            width=params["width"],
            generator=torch.Generator().manual_seed(params["seed"]),
            # The public code cuts photos that are not square.
            framing="centre_crop",
            callback_on_step_end=self._record,
        ).images
        for hook in hooks:
            hook.remove()

    def _record(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self.after_step.append(tensors["latents"])
        return tensors

    @property
    def references(self) -> References:
        """The same at every step."""
        return self.given[0]["cross_attention_kwargs"]["references"]


def load(pipe: MIPAdapterXLPipeline, case: Case, arithmetic: Arithmetic) -> MIPAdapter:
    pipe.load_mip_adapter(GOLDEN / case.params["adapter"], variant=case.params["variant"], arithmetic=arithmetic)
    assert pipe.mip_adapter is not None
    return pipe.mip_adapter


def check_generation(pipe: MIPAdapterXLPipeline, case: Case, ledger: Ledger, arithmetic: Arithmetic) -> None:
    load(pipe, case, arithmetic)
    seen, tolerance, label = Seen(pipe, case), LATENTS[arithmetic], f" ({arithmetic})"
    ledger.compare(case, "timesteps", pipe.scheduler.timesteps)
    ledger.compare(case, "sigmas", pipe.scheduler.sigmas, atol=FEATURES)
    recorded, after_step = case.tensors["latents_after_step"], torch.stack(seen.after_step)
    assert all((a - b).norm() <= tolerance * b.norm() for a, b in zip(after_step, recorded, strict=True)), (
        "a step's latents differ"
    )
    ledger.compare(case, "latents_after_step", after_step, l2=tolerance, label=label)
    ledger.compare(case, "unet_noise_pred", torch.stack(seen.predicted), l2=tolerance, label=label)
    ledger.compare(case, "final_latents", after_step[-1], l2=tolerance, label=label)
    ledger.compare(case, "final_latents", after_step[-1], atol=5e-3, label=f", absolute{label}")
    images = np.stack([np.asarray(image) for image in seen.images])
    ledger.compare(case, "images_uint8", images, atol=GRAY_LEVELS[arithmetic], label=label)
    if "decoded" in case.outputs:
        with torch.no_grad():
            decoded = pipe.vae.decode(after_step[-1][-1:] / pipe.vae.config.scaling_factor).sample[0]
        # As many gray levels of -1 to 1.
        ledger.compare(case, "decoded", decoded, atol=GRAY_LEVELS[arithmetic] * 2 / 255, label=label)


def test_a_generation_gives_the_recorded_latents_and_images(
    pipe: MIPAdapterXLPipeline, generation_case: Case, ledger: Ledger
):
    check_generation(pipe, generation_case, ledger, "fast")


def test_official_arithmetic_gives_the_recorded_latents_and_images(
    pipe: MIPAdapterXLPipeline, generation_case: Case, ledger: Ledger, recorded_encoders: None
):
    check_generation(pipe, generation_case, ledger, "official")


def test_official_arithmetic_repeats_every_step_from_recorded_conditions(
    pipe: MIPAdapterXLPipeline, generation_case: Case, ledger: Ledger
):
    load(pipe, generation_case, "official")
    params, tensors = generation_case.params, generation_case.tensors
    lengths_BN, context = tensors["entity_token_lens_used"], tensors["unet_encoder_hidden_states"]
    prompt_BTE, image_BXE = context.tensor_split([tensors["entity_text_embeds"].shape[2]], dim=1)
    references = references_of(
        image_BXE.unflatten(1, (lengths_BN.shape[1], -1)),
        tensors["entity_text_embeds"],
        lengths_BN,
        scale=params["scale"],
    )
    conditions = {"text_embeds": tensors["unet_text_embeds"], "time_ids": tensors["unet_time_ids"]}
    pipe.scheduler.set_timesteps(params["steps"])
    starts = [tensors["init_latents"], *tensors["latents_after_step"][:-1]]
    predicted, after_step = [], []
    for timestep, latents in zip(pipe.scheduler.timesteps, starts, strict=True):
        scaled = pipe.scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
        options = {"added_cond_kwargs": conditions, "cross_attention_kwargs": {"references": references}}
        with torch.no_grad():
            predicted.append(pipe.unet(scaled, timestep, encoder_hidden_states=prompt_BTE, **options).sample)
        negative, positive = predicted[-1].chunk(2)
        guided = negative + params["guidance_scale_effective"] * (positive - negative)
        after_step.append(pipe.scheduler.step(guided, timestep, latents).prev_sample)
    # Bit for bit where it was recorded; another processor's kernels may round otherwise, as in whole UNets.
    ledger.compare(generation_case, "unet_noise_pred", torch.stack(predicted), atol=2e-5, label=" (step by step)")
    ledger.compare(generation_case, "latents_after_step", torch.stack(after_step), l2=1e-5, label=" (step by step)")


def test_the_unet_is_given_the_recorded_conditions(pipe: MIPAdapterXLPipeline, generation_case: Case, ledger: Ledger):
    load(pipe, generation_case, "fast")
    seen = Seen(pipe, generation_case)
    references, given = seen.references, seen.given[0]
    context = torch.cat([given["encoder_hidden_states"], references.image_BNRE.flatten(1, 2)], dim=1)
    ledger.compare(generation_case, "unet_encoder_hidden_states", context, atol=FEATURES)
    ledger.compare(generation_case, "entity_text_embeds", references.phrase_BNTE, atol=FEATURES)
    ledger.compare(generation_case, "entity_token_lens_used", references.words_BNT.sum(dim=-1))
    conditions = given["added_cond_kwargs"]
    ledger.compare(generation_case, "unet_text_embeds", conditions["text_embeds"], atol=FEATURES)
    ledger.compare(generation_case, "unet_time_ids", conditions["time_ids"])


def test_photos_become_the_recorded_tokens(pipe: MIPAdapterXLPipeline, generation_case: Case, ledger: Ledger):
    adapter, encoder = load(pipe, generation_case, "fast"), cast(Any, pipe.image_encoder)
    photos = [photo for group in photos_of(generation_case.params) for photo in group]
    with torch.no_grad():
        pixels = image_pixels(photos, size=encoder.config.image_size, framing="centre_crop")
        features = adapter.variant.features(encoder, pixels)
        absent = adapter.variant.absent_features(encoder, pixels[:1])
        ours = {
            "image_features": features,
            "ip_tokens_per_image": adapter.image_tokens(features),
            "uncond_image_features": absent,
            "uncond_ip_tokens": adapter.image_tokens(absent),
        }
    # Not every case keeps them all.
    for name in ours.keys() & set(generation_case.outputs):
        # Ours encodes one blank image for all objects.
        rows = len(generation_case.tensors[name]) if name.startswith("uncond_") else len(photos)
        ledger.compare(generation_case, name, ours[name].expand(rows, *ours[name].shape[1:]), atol=FEATURES)


def test_the_noise_is_that_of_the_seed(pipe: MIPAdapterXLPipeline, generation_case: Case, ledger: Ledger):
    recorded = generation_case.tensors["init_noise"]
    noise = torch.randn(recorded.shape, generator=torch.Generator().manual_seed(generation_case.params["seed"]))
    ledger.compare(generation_case, "init_noise", noise)
    pipe.scheduler.set_timesteps(generation_case.params["steps"])
    ledger.compare(generation_case, "init_latents", noise * pipe.scheduler.init_noise_sigma, atol=FEATURES)
