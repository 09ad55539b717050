"""The autoencoder: 64 x 64 RGB to 16 x 16 x 8 latents."""

# diffusers annotates its constructors and outputs more narrowly than it behaves, and exports lazily.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportPrivateImportUsage=false, reportCallIssue=false

import logging
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from mip.toybox.pretrain.optimizer import optimizers, scheduled
from mip.toybox.pretrain.scenery import Scenery

log = logging.getLogger(__name__)


def pixels(image_NHWC: np.ndarray) -> Tensor:
    """uint8 RGB to float in [-1, 1], channels first."""
    return torch.from_numpy(np.array(image_NHWC)).permute(0, 3, 1, 2).float() / 127.5 - 1


def fresh() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 48, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def psnr(model: AutoencoderKL, scenes: Scenery) -> float:
    """Peak signal-to-noise ratio of reconstructions, in dB, over all pixels of the scenes."""
    errors = []
    with torch.no_grad():
        for start in range(0, len(scenes), 100):
            x = pixels(scenes.image_NHWC[start : start + 100])
            y = model.decode(model.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
            errors.append(((x - y) / 2).square().mean().item())
    return float(-10 * np.log10(np.mean(errors)))


def train(scenes: Scenery, held_out: Scenery, out: Path, *, seed: int, steps: int, batch: int) -> None:
    """Train from scratch and write a diffusers folder to `out`."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = fresh()
    chosen = optimizers(model, lr=2e-3)
    base = [group["lr"] for optimizer in chosen for group in optimizer.param_groups]
    started = time.monotonic()
    for step in range(steps):
        rows = np.sort(rng.choice(len(scenes), batch, replace=False))
        x = pixels(scenes.image_NHWC[rows])
        with torch.autocast("cpu", torch.bfloat16):
            latent = model.encode(x).latent_dist
            y = model.decode(latent.sample()).sample
        y = y.float()
        kl = latent.kl().float().mean() / latent.mean[0].numel()
        edges = sum((x.diff(dim=d) - y.diff(dim=d)).abs().mean() for d in (2, 3))
        loss = F.mse_loss(y, x) * 4 + (y - x).abs().mean() + 0.5 * edges + 1e-4 * kl
        loss.backward()
        for group, lr in zip((g for o in chosen for g in o.param_groups), base, strict=True):
            group["lr"] = lr * scheduled(step, steps)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            rate = (step + 1) * batch / (time.monotonic() - started)
            log.info(
                "autoencoder step %d loss %.4f kl %.2f, %.0f images/s, psnr %.2f dB",
                step,
                loss.item(),
                kl.item(),
                rate,
                psnr(model, _first(held_out, 100)),
            )
    with torch.no_grad():
        latents = torch.cat(
            [model.encode(pixels(scenes.image_NHWC[i : i + 100])).latent_dist.mode() for i in range(0, 2000, 100)]
        )
    model.register_to_config(scaling_factor=float(1 / latents.std()))
    log.info(
        "autoencoder held-out psnr %.2f dB, latent std by channel %s",
        psnr(model, held_out),
        latents.std(dim=(0, 2, 3)).tolist(),
    )
    model.half().save_pretrained(out)


def _first(scenes: Scenery, count: int) -> Scenery:
    return Scenery(**{name: value[:count] for name, value in vars(scenes).items()})
