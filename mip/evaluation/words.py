"""Where the words of a base model attend, against the true masks: what the weighted merge can hope for.

B pictures of a batch   N objects   C, H, W latents   Q positions of a layer   Y, X pixels
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from mip.evaluation.localisation import localisation
from mip.model.adapter import MIPAdapter
from mip.model.encoding import encode_names
from mip.model.projection import variant_named
from mip.model.references import ReferenceMaps, References, layer_grid


@dataclass(frozen=True, eq=False)
class Pictured:
    """An image with N >= 2 named objects whose places are known."""

    image: Image.Image
    caption: str
    names: Sequence[str]
    masks_NYX: NDArray[np.bool_]


@torch.no_grad()
def word_localisation(
    pipe: StableDiffusionXLPipeline, pictures: Sequence[Pictured], *, levels: Sequence[int], seed: int, batch: int = 16
) -> Mapping[int, Mapping[str, float]]:
    """Mean relevance of an object's own name inside its mask, by timestep and layer; chance is 1 / N, 1 is perfect.

    The pictures are noised to each level and seen once by the UNet. What is measured is the very weight of the merge,
    of the base alone: no adapter is needed and none may be installed.

    Args:
        pipe: any SDXL pipeline; left as it was.
        pictures: all of one size, which the autoencoder can take.
        levels: timesteps of training.
        seed: of the noise.
        batch: pictures that are seen at a time.
    """
    adapter = MIPAdapter.fresh(pipe.unet, projection=nn.Identity(), variant=variant_named("sdxl"), has_gate=False)
    with adapter.installed(pipe.unet, dtype=pipe.unet.dtype):
        return {level: _at(pipe, pictures, level, seed=seed, batch=batch) for level in levels}


def mean_of_layers(found: Mapping[int, Mapping[str, float]]) -> dict[int, float]:
    """The layers' mean of what `word_localisation` found, by timestep."""
    return {level: float(np.mean(list(layers.values()))) for level, layers in found.items()}


def _at(
    pipe: StableDiffusionXLPipeline, pictures: Sequence[Pictured], level: int, *, seed: int, batch: int
) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(pictures), batch):
        part = pictures[start : start + batch]
        maps = ReferenceMaps()
        size = _look(pipe, part, level, maps=maps, generator=generator)
        for layer, (relevance_BNQ,) in maps.relevance.items():
            for picture, relevance_NQ in zip(part, relevance_BNQ.cpu(), strict=True):
                grid = layer_grid(size, relevance_NQ.shape[-1])
                relevance_NHW = relevance_NQ[: len(picture.names)].unflatten(-1, grid)
                if (value := localisation(relevance_NHW.numpy(), picture.masks_NYX)) is not None:
                    values.setdefault(layer.split(".transformer_blocks")[0], []).append(value)
    return {layer: float(np.mean(of_layer)) for layer, of_layer in values.items()}


def _look(
    pipe: StableDiffusionXLPipeline,
    part: Sequence[Pictured],
    level: int,
    *,
    maps: ReferenceMaps,
    generator: torch.Generator,
) -> tuple[int, int]:
    """One pass of the UNet; fills `maps` and returns the latents' height and width."""
    unet, vae, device = pipe.unet, pipe.vae, pipe.unet.device
    pixels = pipe.image_processor.preprocess([picture.image for picture in part]).to(vae.device, vae.dtype)
    latents_BCHW = (vae.encode(pixels).latent_dist.mode() * vae.config["scaling_factor"]).to(device, unet.dtype)
    # One generator on the CPU: the same noise on every device.
    noise = randn_tensor(latents_BCHW.shape, generator=generator, device=device, dtype=unet.dtype)
    timestep_B = torch.full((len(part),), level, device=device)
    prompt_BTE, _, pooled_BD, _ = pipe.encode_prompt(
        [picture.caption for picture in part],  # pyright: ignore[reportArgumentType]
        device=device,
        do_classifier_free_guidance=False,
    )
    height, width = pixels.shape[-2:]
    time_ids = torch.tensor([[height, width, 0, 0, height, width]], device=device, dtype=unet.dtype)
    size = (latents_BCHW.shape[2], latents_BCHW.shape[3])
    unet(
        _noise_levels(pipe).add_noise(latents_BCHW, noise, timestep_B),  # pyright: ignore[reportArgumentType]
        timestep_B,
        prompt_BTE,
        added_cond_kwargs={"text_embeds": pooled_BD, "time_ids": time_ids.expand(len(part), -1)},
        cross_attention_kwargs={"references": _names_only(pipe, part, size), "reference_maps": maps},
    )
    return size


def _noise_levels(pipe: StableDiffusionXLPipeline) -> DDPMScheduler:
    """The base's noise levels as in training, whatever scheduler samples."""
    levels = DDPMScheduler.from_config(pipe.scheduler.config)
    assert isinstance(levels, DDPMScheduler)
    return levels


def _names_only(pipe: StableDiffusionXLPipeline, part: Sequence[Pictured], size: tuple[int, int]) -> References:
    """References with names and without any influence: their scale is 0."""
    rows = []
    for picture in part:
        phrase_NTE, words_NT = encode_names(
            list(picture.names),
            tokenizers=(pipe.tokenizer, pipe.tokenizer_2),
            text_encoders=(pipe.text_encoder, pipe.text_encoder_2),
        )
        count = len(picture.names)
        rows.append(
            References(
                image_BNRE=torch.zeros(1, count, 1, phrase_NTE.shape[-1], dtype=phrase_NTE.dtype),
                phrase_BNTE=phrase_NTE[None].cpu(),
                words_BNT=words_NT[None].cpu(),
                present_BN=torch.ones(1, count, dtype=torch.bool),
                scale_BN=torch.zeros(1, count),
                latent_size=size,
            )
        )
    return References.stack(rows).to(device=pipe.unet.device, dtype=pipe.unet.dtype)
