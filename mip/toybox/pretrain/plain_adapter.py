"""The plain IP-Adapter that MIP-Adapter starts from: one reference of one object; h94's file layout."""

# diffusers annotates its constructors and outputs more narrowly than it behaves, and exports lazily.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportPrivateImportUsage=false, reportCallIssue=false

import logging
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPVisionModelWithProjection

from mip.model.adapter import MIPAdapter
from mip.model.projection import ImageProjection, Resampler, Variant, variant_named
from mip.model.references import References
from mip.tables import atomic
from mip.toybox.pretrain.denoiser import encode, time_ids
from mip.toybox.pretrain.optimizer import optimizers, scheduled
from mip.toybox.pretrain.portraits import SIZE as PORTRAIT_SIZE
from mip.toybox.pretrain.portraits import Portraits, cut_outs
from mip.toybox.pretrain.scenery import Scenery
from mip.toybox.pretrain.vision import CONDITION_SIZE
from mip.toybox.pretrain.workers import Workers

log = logging.getLogger(__name__)

DROP = 0.1  # share of references dropped, for guidance


def projection(variant: Variant, encoder: CLIPVisionModelWithProjection, context_width: int) -> nn.Module:
    """A fresh image projection: Linear to 4 tokens, or a small Resampler to 16."""
    if variant.name == "sdxl":
        return ImageProjection(feature_width=encoder.config.projection_dim, tokens=4, context_width=context_width)
    return Resampler(
        feature_width=encoder.config.hidden_size,
        tokens=16,
        context_width=context_width,
        width=128,
        depth=2,
        heads=2,
        ff_width=256,
    )


def references_of(scenes: Scenery, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each scene's first object on white, cut to its box and enlarged, as references are: (n, C, C, 3) in [0, 1]."""
    image, mask = scenes.image_NHWC[rows], (scenes.owner_NHW[rows] == 1).astype(np.uint8)
    tight = np.full((len(rows), PORTRAIT_SIZE, PORTRAIT_SIZE, 3), 255, np.uint8)
    for n in range(len(rows)):
        ys, xs = np.nonzero(mask[n])
        height, width = ys.max() - ys.min() + 1, xs.max() - xs.min() + 1
        side = max(height, width)
        square = np.full((side, side, 3), 255, np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        cut = (slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1))
        where = (slice(top, top + height), slice(left, left + width))
        square[where] = np.where(mask[n][cut][..., None] == 1, image[n][cut], 255)
        tight[n] = cv2.resize(square, (PORTRAIT_SIZE, PORTRAIT_SIZE), interpolation=cv2.INTER_LINEAR)
    # Already on white: the whole picture counts as the object, and no trait of it is asked for.
    portraits = Portraits(tight, np.ones(tight.shape[:3], np.uint8), np.zeros((len(rows), 4), np.int8))
    return cut_outs(portraits, np.arange(len(rows)), rng, size=CONDITION_SIZE)


def train(
    pipe: StableDiffusionXLPipeline,
    encoder: CLIPVisionModelWithProjection,
    scenes: Scenery,
    latent_NCHW: np.ndarray,
    out: Path,
    *,
    variant: str,
    seed: int,
    steps: int,
    batch: int,
    lr: float,
    workers: Workers,
    start: Path | None = None,
) -> None:
    """Train projection and attention on `scenes`, of one object each; write h94's layout to `out`.

    `start` is an adapter to start from.
    """
    torch.manual_seed(seed)
    kind = variant_named(variant)
    unet = pipe.unet.float().requires_grad_(False)
    if start is None:
        head = projection(kind, encoder, unet.config["cross_attention_dim"])
        adapter = MIPAdapter.fresh(unet, projection=head, variant=kind, has_gate=False)
    else:
        adapter = MIPAdapter.from_checkpoint(start, unet)
    adapter.projection.requires_grad_(True)
    trained = nn.ModuleList([adapter.projection, *adapter.processors.values()]).requires_grad_(True)
    text_encoders = (pipe.text_encoder.float(), pipe.text_encoder_2.float())
    noise_schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    chosen = optimizers(trained, lr=lr, workers=workers)
    base_lr = [group["lr"] for optimizer in chosen for group in optimizer.param_groups]
    adapter.install(unet)
    started, recent = time.monotonic(), []
    for step in range(steps):
        rng = np.random.default_rng([seed, step])
        torch.manual_seed((seed * 1_000_003 + step) * workers.count + workers.rank)
        rows = np.sort(rng.choice(len(scenes), batch, replace=False))[workers.rank :: workers.count]
        own = np.random.default_rng([seed, step, workers.rank])
        x = torch.from_numpy(np.array(latent_NCHW[rows])).float()
        # Identity is decided at the high noise levels.
        noise, t = torch.randn_like(x), torch.randint(300, 1000, (len(rows),))
        pixels = torch.from_numpy(references_of(scenes, rows, own)).permute(0, 3, 1, 2) * 2 - 1
        with torch.no_grad():
            features = kind.features(encoder, pixels)
            absent = kind.absent_features(encoder, pixels)
            dropped = torch.from_numpy(own.random(len(rows)) < DROP)
            features = torch.where(dropped.view(-1, *[1] * (features.ndim - 1)), absent, features)
            captions = ["" if own.random() < DROP else scenes.captions[row] for row in rows]
            prompt_BTE, pooled_BD = encode(captions, pipe.tokenizer, *text_encoders)
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
            tokens = adapter.image_tokens(features)[:, None]
            references = References(
                image_BNRE=tokens,
                phrase_BNTE=prompt_BTE[:, None].detach(),
                words_BNT=torch.ones_like(prompt_BTE[:, None, :, 0], dtype=torch.bool),
                present_BN=torch.ones(len(rows), 1, dtype=torch.bool),
                scale_BN=torch.ones(len(rows), 1),
                merge="mean",
                is_gated=False,
            )
            predicted = unet(
                noise_schedule.add_noise(x, noise, t),
                t,
                prompt_BTE,
                added_cond_kwargs={"text_embeds": pooled_BD, "time_ids": time_ids(len(rows))},
                cross_attention_kwargs={"references": references},
            ).sample.float()
            loss = F.mse_loss(predicted, noise_schedule.get_velocity(x, noise, t))
        loss.backward()
        workers.average_gradients(trained)
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        for group, rate in zip((g for o in chosen for g in o.param_groups), base_lr, strict=True):
            group["lr"] = rate * scheduled(step, steps, warm_up=50)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()
        recent.append(loss.item())
        if step % 50 == 49 or step == steps - 1:
            log.info(
                "%s adapter step %d loss %.4f, %.1f images/s",
                variant,
                step + 1,
                np.mean(recent),
                (step + 1) * batch / (time.monotonic() - started),
            )
            recent = []
    adapter.eject()
    if workers.rank == 0:
        write_h94(adapter, out)


def write_h94(adapter: MIPAdapter, out: Path) -> None:
    """Half precision safetensors with the prefixes `image_proj.` and `ip_adapter.`, as h94's IP-Adapter files have."""
    content = {f"image_proj.{key}": value for key, value in adapter.projection.state_dict().items()}
    for index, processor in adapter.processors.items():
        content[f"ip_adapter.{index}.to_k_ip.weight"] = processor.to_k_ip.weight
        content[f"ip_adapter.{index}.to_v_ip.weight"] = processor.to_v_ip.weight
    with atomic(out) as temporary:
        save_file({key: value.detach().half().contiguous() for key, value in content.items()}, temporary)
