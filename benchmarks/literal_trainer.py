"""A trainer that works as the public one does: everything is read, encoded and attended to at each step.

B samples   N objects   C, H, W latents   T text tokens   E context width   X texts
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mip.config import Features, Models, Train
from mip.data.images import decode
from mip.model.checkpoint import find_adapter
from mip.model.encoding import image_pixels, name_tokens
from mip.model.references import References
from mip.tables import Row
from mip.training.encodings import Prepared, prepare
from mip.training.networks import Encoders, device_named
from mip.training.objective import NoiseSchedule
from mip.training.start import load_unet, start_adapter


@dataclass(frozen=True, eq=False)
class Samples:
    """What the literal trainer's step gets: pixels and texts."""

    pixels_B3HW: Tensor
    objects_X3HW: Tensor  # X = B * N
    time_ids_B6: Tensor
    captions: list[str]
    names: list[str]  # B * N


class Literal:
    """A step reads, encodes and attends as the public code does. It drops no condition: that costs nothing."""

    def __init__(self, config: Train, *, models: Models, rows: Sequence[Row], cutting: Features) -> None:
        self.config, self.rows, self.cutting, self.resolution = config, rows, cutting, models.resolution
        self.device = device_named(models.device)
        self.encoders = Encoders.load(models)
        self.noise = NoiseSchedule.of(models, config)
        self.unet = load_unet(models, precision=config.precision)
        start = find_adapter(models.ip_adapter, models.ip_adapter_weight)
        self.adapter = start_adapter(start, self.unet, config=config, models=models)
        self.adapter.install(self.unet, arithmetic="official")
        self.unet.to(self.device)  # pyright: ignore[reportArgumentType]
        self.adapter.projection.to(self.device)
        self.parameters = self.adapter.trainable_parameters()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.scaler = torch.GradScaler(self.device.type, enabled=config.precision == "fp16")

    def load(self, step: int) -> Samples:
        size = self.encoders.image_encoder.config.image_size
        assert isinstance(size, int)
        rows = [self.rows[(step * self.config.batch + i) % len(self.rows)] for i in range(self.config.batch)]
        cut = [_cut(row, config=self.cutting, resolution=self.resolution) for row in rows]
        pixels = [torch.from_numpy(np.array(one.pictures[0].convert("RGB"))) for one in cut]
        return Samples(
            pixels_B3HW=torch.stack(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1,
            objects_X3HW=image_pixels([view for one in cut for view in one.views], size=size),
            time_ids_B6=torch.tensor([one.time_ids[0] for one in cut], dtype=torch.float32),
            captions=[row["caption"] for row in rows],
            names=[thing["label"] for row in rows for thing in row["objects"]],
        )

    def step(self, samples: Samples) -> float:
        shape = (len(samples.captions), len(samples.names) // len(samples.captions))
        with torch.no_grad():
            latents_BCHW = self._latents(samples.pixels_B3HW)
            prompt_BTE, pooled_BD = self._text(samples.captions)
            phrase_XTE, _ = self._text(samples.names)
            eyes = self.encoders.image_encoder
            features = self.encoders.variant.features(eyes, samples.objects_X3HW.to(self.device, eyes.dtype))
            tokens_XRE = self.adapter.image_tokens(features)
        words_XT = name_tokens(samples.names, self.encoders.tokenizers).to(self.device)
        references = References(
            image_BNRE=tokens_XRE.unflatten(0, shape),
            phrase_BNTE=phrase_XTE.float().unflatten(0, shape),
            words_BNT=words_XT.unflatten(0, shape),
            present_BN=torch.ones(shape, dtype=torch.bool, device=self.device),
            scale_BN=torch.ones(shape, device=self.device),
        )
        noise_BCHW = torch.randn_like(latents_BCHW)
        timestep_B = torch.randint(self.noise.first, self.noise.end, shape[:1], device=self.device)
        noisy_BCHW = self.noise.scheduler.add_noise(latents_BCHW, noise_BCHW, timestep_B)  # pyright: ignore[reportArgumentType]
        with self._autocast():
            predicted_BCHW = self.unet(
                noisy_BCHW,
                timestep_B,
                encoder_hidden_states=prompt_BTE.float(),
                added_cond_kwargs={"text_embeds": pooled_BD.float(), "time_ids": samples.time_ids_B6.to(self.device)},
                cross_attention_kwargs={"references": references},
                return_dict=False,
            )[0]
        loss = F.mse_loss(predicted_BCHW.float(), noise_BCHW)
        self.scaler.scale(loss).backward()
        if self.config.max_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def encode_once(self, row: Row) -> None:
        """What the features stage does for a sample whose texts are all new."""
        _cut(row, config=self.cutting, resolution=self.resolution).encode(self.encoders)
        for text in (row["caption"], *(thing["label"] for thing in row["objects"])):
            self.encoders.text(text)

    def _latents(self, pixels_B3HW: Tensor) -> Tensor:
        drawn: Any = self.encoders.vae.encode(pixels_B3HW.to(self.device))
        return drawn.latent_dist.sample() * self.encoders.vae.config["scaling_factor"]

    def _text(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Penultimate hidden states of both encoders, and the second one's pooled embedding."""
        states, output = [], None
        for tokenizer, encoder in zip(self.encoders.tokenizers, self.encoders.text_encoders, strict=True):
            options: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
            ids_XT = tokenizer(texts, max_length=tokenizer.model_max_length, **options).input_ids
            output: Any = encoder(ids_XT.to(self.device), output_hidden_states=True)
            states.append(output.hidden_states[-2])
        assert output is not None
        return torch.cat(states, dim=-1), output.text_embeds

    def _autocast(self) -> AbstractContextManager[object]:
        if self.config.precision == "no":
            return nullcontext()
        return torch.autocast(self.device.type, torch.float16 if self.config.precision == "fp16" else torch.bfloat16)


def _cut(row: Row, *, config: Features, resolution: int) -> Prepared:
    size = (row["width"], row["height"])
    image = decode(Path(row["image_path"]).read_bytes(), max_pixels=size[0] * size[1], size=size)
    return prepare(row, image, config=config, resolution=resolution)
