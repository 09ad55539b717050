"""The text-to-image base: an SDXL-shaped UNet and its text encoders, trained together from scratch."""

# diffusers annotates its constructors and outputs more narrowly than it behaves, and exports lazily.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportPrivateImportUsage=false, reportCallIssue=false

import json
import logging
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from mip.toybox.pretrain import text
from mip.toybox.pretrain.autoencoder import pixels
from mip.toybox.pretrain.grounding import GroundedProcessor, grounding_loss, localisation
from mip.toybox.pretrain.optimizer import optimizers, scheduled
from mip.toybox.pretrain.scenery import MOST_THINGS, SIZE, Scenery
from mip.toybox.pretrain.workers import Workers
from mip.toybox.scenes import CLASSES

log = logging.getLogger(__name__)

EMA = 0.998
DROP_TEXT = 0.1  # share of empty prompts, for guidance
DESCRIBED = 0.5  # share of captions that tell colours: a base that knows no colour words has no way to paint by them


def unet() -> UNet2DConditionModel:
    """Like SDXL's: no cross-attention in the first block, size and crop conditioning, linear projections."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 160),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 5),
        transformer_layers_per_block=1,
        cross_attention_dim=160,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=96 + 6 * 16,
        norm_num_groups=16,
        use_linear_projection=True,
    )


def scheduler() -> DDIMScheduler:
    """v-prediction, zero terminal SNR: with any signal in the last step, the first noise would choose colours."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
    )


class Base(nn.Module):
    """UNet and text encoders: everything that is trained here."""

    def __init__(self) -> None:
        super().__init__()
        self.words: CLIPTokenizer = text.tokenizer()
        self.unet = unet()
        self.text_encoder, self.text_encoder_2 = text.encoders(self.words)

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """As `encode` below, by the encoders that are being trained."""
        return encode(captions, self.words, self.text_encoder, self.text_encoder_2)

    def names(self) -> Tensor:
        """Embedding of each class's single token, encoded alone: (classes, E)."""
        return self.encode(list(CLASSES))[0][:, 1]


def encode(
    captions: list[str], words: CLIPTokenizer, first: CLIPTextModel, second: CLIPTextModelWithProjection
) -> tuple[Tensor, Tensor]:
    """Penultimate states of both encoders side by side (B, T, E) and the pooled embedding (B, D), as in SDXL."""
    ids = words(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    one, two = (encoder(ids, output_hidden_states=True) for encoder in (first, second))
    return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two.text_embeds


def latents(vae: AutoencoderKL, scenes: Scenery, file: Path) -> np.ndarray:
    """Scaled latents (N, 8, 16, 16) in half precision, computed once."""
    if not file.exists():
        parts = []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for start in range(0, len(scenes), 200):
                x = (
                    vae.encode(pixels(scenes.image_NHWC[start : start + 200])).latent_dist.mode()
                    * vae.config["scaling_factor"]
                )
                parts.append(x.half().numpy())
        partial = file.with_suffix(".partial.npy")
        np.save(partial, np.concatenate(parts))
        os.replace(partial, file)
    return np.load(file, mmap_mode="r")


def owners(scenes: Scenery, rows: np.ndarray) -> Tensor:
    """1 inside the n-th object's mask: (B, 3, 64, 64)."""
    owner = torch.from_numpy(np.array(scenes.owner_NHW[rows]))
    return torch.stack([(owner == k + 1).float() for k in range(MOST_THINGS)], dim=1)


def time_ids(batch: int) -> Tensor:
    """SDXL's micro-conditioning: original size, crop corner, target size, in pixels."""
    return torch.tensor([SIZE, SIZE, 0, 0, SIZE, SIZE], dtype=torch.float32).expand(batch, 6)


def train(
    scenes: Scenery,
    vae: AutoencoderKL,
    work: Path,
    *,
    seed: int,
    steps: int,
    batch: int,
    lr: float,
    grounding: float,
    workers: Workers,
    state: Path,
    start: Path | None = None,
) -> Base:
    """Train the base and return the averaged weights.

    `state` is where an interrupted run goes on; `work` keeps the latents. `start` is a saved pipeline to start from.
    `grounding` weighs the loss that teaches words where they belong; 0 trains as SDXL was trained.
    """
    torch.manual_seed(seed)
    model, average = Base(), Base()
    if start is not None:
        saved = StableDiffusionXLPipeline.from_pretrained(start, dtype=torch.float32)
        for part in ("unet", "text_encoder", "text_encoder_2"):
            getattr(model, part).load_state_dict(getattr(saved, part).state_dict())
    average.load_state_dict(model.state_dict())
    model.unet.set_attn_processor(GroundedProcessor())
    if workers.rank == 0:
        latents(vae, scenes, work / "latents.npy")
    workers.wait()
    latent_NCHW = latents(vae, scenes, work / "latents.npy")
    noise_schedule = DDPMScheduler.from_config(scheduler().config)
    chosen = optimizers(model, lr=lr, workers=workers)
    base_lr = [group["lr"] for optimizer in chosen for group in optimizer.param_groups]
    first = _resume(state, model, average, chosen)
    started = time.monotonic()
    recent: list[float] = []
    for step in range(first, steps):
        rng = np.random.default_rng([seed, step])
        torch.manual_seed((seed * 1_000_003 + step) * workers.count + workers.rank)
        rows = np.sort(rng.choice(len(scenes), batch, replace=False))[workers.rank :: workers.count]
        x = torch.from_numpy(np.array(latent_NCHW[rows])).float()
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(rows),))
        captions = [_caption(scenes, row, rng) for row in rows]
        log_maps: list[Tensor] = []
        with torch.autocast("cpu", torch.bfloat16):
            prompt_BTE, pooled_BD = model.encode(captions)
            kinds = torch.from_numpy(np.array(scenes.names_NK[rows])).long()
            name_BNE = model.names()[kinds.clamp(min=0)]
            predicted = model.unet(
                noise_schedule.add_noise(x, noise, t),
                t,
                prompt_BTE,
                added_cond_kwargs={"text_embeds": pooled_BD, "time_ids": time_ids(len(rows))},
                cross_attention_kwargs={"name_BNE": name_BNE, "log_maps": log_maps},
            ).sample.float()
        loss = F.mse_loss(predicted, noise_schedule.get_velocity(x, noise, t))
        level = torch.where(t <= 700, 1.0, 1 - 0.7 * (t - 700) / 300)
        own = owners(scenes, rows)
        ground = torch.stack([grounding_loss(m, own, level) for m in log_maps]).mean()
        (loss + grounding * ground).backward()
        workers.average_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group, rate in zip((g for o in chosen for g in o.param_groups), base_lr, strict=True):
            group["lr"] = rate * scheduled(step, steps)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()
        decay = min(EMA, (step + 1) / (step + 10))
        with torch.no_grad():
            for kept, now in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(now, 1 - decay)
        recent.append(loss.item())
        if step % 100 == 99 or step == steps - 1:
            with torch.no_grad():
                found = [localisation(m.detach(), own)[(kinds[:, 1] >= 0) & (t < 600)].mean().item() for m in log_maps]
            log.info(
                "base step %d loss %.4f grounding %.3f localisation by layer %s, %.1f images/s",
                step + 1,
                np.mean(recent),
                ground.item(),
                " ".join(f"{f:.2f}" for f in found),
                (step + 1 - first) * batch / (time.monotonic() - started),
            )
            recent = []
        if workers.rank == 0 and (step % 250 == 249 or step == steps - 1):
            _save(state, step + 1, model, average, chosen)
    return average


def _caption(scenes: Scenery, row: int, rng: np.random.Generator) -> str:
    if rng.random() < DROP_TEXT:
        return ""
    return (scenes.described if rng.random() < DESCRIBED else scenes.captions)[row]


def _save(file: Path, step: int, model: nn.Module, average: nn.Module, chosen: list) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizers": [o.state_dict() for o in chosen],
    }
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, file)


def _resume(file: Path, model: nn.Module, average: nn.Module, chosen: list) -> int:
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    for optimizer, saved in zip(chosen, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    log.info("base goes on from step %d", state["step"])
    return state["step"]


def pipeline(model: nn.Module, vae: AutoencoderKL) -> StableDiffusionXLPipeline:
    """The stock pipeline around these networks. "" is encoded like any prompt, as it was in training."""
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        text_encoder_2=model.text_encoder_2,
        tokenizer=model.words,
        tokenizer_2=model.words,
        unet=model.unet,
        scheduler=scheduler(),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def save(model: nn.Module, vae: AutoencoderKL, folder: Path, note: dict[str, object]) -> None:
    """Write the pipeline in half precision, with a note of how it was made."""
    pipe = pipeline(model, vae)
    pipe.to(torch.float16)
    pipe.save_pretrained(folder, safe_serialization=True)
    (folder / "training.json").write_text(json.dumps(note, indent=1, sort_keys=True) + "\n")
