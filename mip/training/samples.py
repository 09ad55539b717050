"""Pictures while the adapter is trained: held-out samples' objects, their picture, and what is drawn from them.

They are samples of the validation split, which no step sees, with the prompts, names and image features that the
validation loss reads too. The tasks by which `generate` chooses a scale would be the other way; the stage does not read
them: a change of theirs would train the adapter anew, and whoever trains on photographs of their own has none.
The benchmark's tasks are never drawn here.

N references   C, H, W latents   T text tokens   E context width   F one object's image features
The leading 1 is a batch of one: a picture does not depend on how many are drawn.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image, ImageOps
from torch import Tensor

from mip.config import Models, Samples, Train
from mip.model.adapter import MIPAdapter
from mip.model.references import ReferenceCache, References
from mip.tables import atomic
from mip.training.dataset import Batch, FeatureSet
from mip.training.networks import base_weights

_CELL = 256  # pixels of a cell's side at most
_GAP = 4


def grid_file(folder: Path, step: int) -> Path:
    """Where the pictures drawn after a step lie."""
    return folder / f"step-{step:08d}.png"


def last_grid(folder: Path) -> Path | None:
    """The pictures of the last step that has some."""
    return max(folder.glob("step-*.png"), default=None)


def write_grid(path: Path, picture: Image.Image) -> Path:
    """A PNG, whole or not at all."""
    with atomic(path) as temporary:
        picture.save(temporary, format="PNG")
    return path


class Painter:
    """Draws the same samples from the same noise with the adapter's present weights. Touches no global random state.

    The base's own scheduler denoises, as in `generate`. The negative prompt is "", the one that the features hold.
    """

    def __init__(
        self,
        config: Train,
        samples: Samples,
        *,
        models: Models,
        held_out: FeatureSet,
        unet: UNet2DConditionModel,
        adapter: MIPAdapter,
    ) -> None:
        self.config, self.samples, self.held_out, self.adapter = config, samples, held_out, adapter
        self.cell = min(models.resolution, _CELL)
        self.places = _places(held_out, samples.count)
        absence, self.device = held_out.absence().to(unet.device), unet.device
        self.empty_1TE, self.empty_pooled_1D = absence.prompt_TE[None], absence.pooled_D[None]
        self.absent_F = absence.features_F
        self.pipe = _pipeline(models, unet)

    @torch.no_grad()
    def draw(self) -> Image.Image:
        """A row a sample: its objects, cut out; the picture they come from; what the adapter draws of them."""
        rows = []
        for place in self.places:
            batch = self.held_out.batch([place])
            picture = self._picture(batch.mean_BCHW)
            objects = [_cut_out(picture, mask_HW) for mask_HW in batch.masks_BNHW[0]]
            rows.append([*objects, picture, self._picture(self._denoised(batch, seed=self.config.seed + place))])
        return _grid(rows, cell=self.cell)

    def _denoised(self, batch: Batch, *, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        noise_1CHW = torch.randn(batch.mean_BCHW.shape, generator=generator)
        batch = batch.to(self.device)
        references = self._references(batch)
        height, width = (side * self.pipe.vae_scale_factor for side in noise_1CHW.shape[2:])
        return self.pipe(
            prompt_embeds=batch.prompt_BTE,
            pooled_prompt_embeds=batch.pooled_BD,
            negative_prompt_embeds=self.empty_1TE,
            negative_pooled_prompt_embeds=self.empty_pooled_1D,
            cross_attention_kwargs={"references": references, "reference_cache": ReferenceCache(references)},
            num_inference_steps=self.samples.steps,
            guidance_scale=self.samples.guidance,
            latents=noise_1CHW.to(self.device),
            generator=generator,
            height=height,
            width=width,
            output_type="latent",
            return_dict=False,
        )[0]

    def _references(self, batch: Batch) -> References:
        positive = References(
            image_BNRE=self.adapter.image_tokens(batch.features_BNF),
            phrase_BNTE=batch.phrase_BNTE,
            words_BNT=batch.words_BNT,
            present_BN=batch.present_BN,
            scale_BN=torch.full(batch.present_BN.shape, self.samples.scale, device=self.device),
            merge=self.config.merge,
            is_gated=self.config.gated and self.config.merge == "weighted",
        )
        absent_RE = self.adapter.image_tokens(self.absent_F[None])[0]
        negative = replace(
            positive,
            image_BNRE=absent_RE.expand_as(positive.image_BNRE),
            phrase_BNTE=self.empty_1TE.expand_as(positive.phrase_BNTE),
        )
        return positive.with_negative(negative) if self.samples.guidance > 1 else positive

    def _picture(self, latents_1CHW: Tensor) -> Image.Image:
        """From latents in the UNet's units."""
        vae, frame = self.pipe.vae, self.pipe.vae.config
        latents_1CHW = latents_1CHW.to(self.device, torch.float32) / frame.scaling_factor
        if frame.latents_mean is not None and frame.latents_std is not None:
            mean, std = (latents_1CHW.new_tensor(v).reshape(-1, 1, 1) for v in (frame.latents_mean, frame.latents_std))
            latents_1CHW = latents_1CHW * std + mean
        pixels_13HW = vae.decode(latents_1CHW, return_dict=False)[0]
        levels_HW3 = (pixels_13HW[0].permute(1, 2, 0) * 127.5 + 127.5).round().clamp(0, 255)
        return Image.fromarray(levels_HW3.to("cpu", torch.uint8).numpy())


def _places(held_out: FeatureSet, count: int) -> list[int]:
    """The first augmentation of the first samples."""
    first: dict[str, int] = {}
    for place, row in enumerate(held_out.rows):
        first.setdefault(row["sample_id"], place)
    return list(first.values())[:count]


def _pipeline(models: Models, unet: UNet2DConditionModel) -> Any:
    """The base's pipeline around the UNet in training; texts come encoded."""
    base = base_weights(models)
    options: dict[str, Any] = {"revision": base.revision, "subfolder": "scheduler"}
    settings: Any = DDPMScheduler.load_config(base.name, **options)
    scheduler = getattr(diffusers, settings["_class_name"]).from_pretrained(base.name, **options)
    # The SDXL autoencoder overflows in half precision.
    vae = AutoencoderKL.from_pretrained(base.name, revision=base.revision, subfolder="vae", torch_dtype=torch.float32)
    assert isinstance(vae, AutoencoderKL)
    nothing: Any = None
    pipe: Any = StableDiffusionXLPipeline(
        vae=vae.requires_grad_(False).eval().to(unet.device),  # pyright: ignore[reportArgumentType]
        text_encoder=nothing,
        text_encoder_2=nothing,
        tokenizer=nothing,
        tokenizer_2=nothing,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _cut_out(picture: Image.Image, mask_HW: Tensor) -> Image.Image:
    """The object on white, to about the accuracy of a latent position; all white where the mask is empty."""
    coverage = Image.fromarray((mask_HW.numpy() * 255).round().astype(np.uint8))
    mask = coverage.resize(picture.size, Image.Resampling.BILINEAR).point(
        [255 * (level >= 128) for level in range(256)]
    )
    alone = Image.composite(picture, Image.new("RGB", picture.size, "white"), mask)
    return alone.crop(mask.getbbox() or (0, 0, *picture.size))


def _grid(rows: Sequence[Sequence[Image.Image]], *, cell: int) -> Image.Image:
    """White where a sample has fewer objects than others; pictures and drawings stand below one another."""
    columns, pitch = max(map(len, rows), default=0), cell + _GAP
    sheet = Image.new("RGB", (columns * pitch + _GAP, len(rows) * pitch + _GAP), "white")
    for line, row in enumerate(rows):
        for column, picture in enumerate(row, start=columns - len(row)):
            fitted = ImageOps.pad(picture, (cell, cell), color="white")
            sheet.paste(fitted, (_GAP + column * pitch, _GAP + line * pitch))
    return sheet
