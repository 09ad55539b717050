"""How good the base is, on scenes and identities that no network has seen: the figures of its model card.

`python -m mip.toybox.pretrain.check` writes docs/toybox-base/quality.json and samples.png.
"""

# diffusers annotates its constructors and outputs more narrowly than it behaves, and exports lazily.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportPrivateImportUsage=false, reportCallIssue=false

import json
import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from mip.config import SegmentationDetector
from mip.evaluation.detectors import load_detector
from mip.tables import write_json
from mip.toybox.pretrain import autoencoder, denoiser
from mip.toybox.pretrain.grounding import GroundedProcessor, localisation
from mip.toybox.pretrain.portraits import portraits
from mip.toybox.pretrain.scenery import Scenery, scenery
from mip.toybox.pretrain.vision import retrieval
from mip.toybox.scenes import BACKGROUNDS, CLASSES, compose

log = logging.getLogger(__name__)

LEVELS = (200, 500, 800)  # timesteps


def words_localise(pipe: StableDiffusionXLPipeline, scenes: Scenery) -> dict[str, dict[str, float]]:
    """The own name's share of the merge weight inside its object's mask, by timestep and layer; chance is .5."""
    rows = np.flatnonzero((scenes.names_NK[:, 1] >= 0) & (scenes.names_NK[:, 2] < 0))[:48]
    before = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(GroundedProcessor())
    layers = [name.removesuffix(".attn2.processor") for name in before if "attn2" in name]
    found: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        x = (
            pipe.vae.encode(autoencoder.pixels(scenes.image_NHWC[rows])).latent_dist.mode()
            * pipe.vae.config["scaling_factor"]
        )
        prompt_BTE, _, pooled_BD, _ = pipe.encode_prompt(
            [scenes.captions[row] for row in rows], do_classifier_free_guidance=False
        )
        name_BNE = _names(pipe)[torch.from_numpy(np.array(scenes.names_NK[rows, :2])).long()]
        owner_BNHW = denoiser.owners(scenes, rows)[:, :2]
        for t in LEVELS:
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(t))
            maps: list[Tensor] = []
            pipe.unet(
                pipe.scheduler.add_noise(x, noise, torch.full((len(rows),), t)),
                torch.full((len(rows),), t),
                prompt_BTE,
                added_cond_kwargs={"text_embeds": pooled_BD, "time_ids": denoiser.time_ids(len(rows))},
                cross_attention_kwargs={"name_BNE": name_BNE, "log_maps": maps},
            )
            # The UNet runs down, middle, up; its list of processors names the middle last.
            order = [n for n in layers if n.startswith("down")] + [n for n in layers if n.startswith("mid")]
            order += [n for n in layers if n.startswith("up")]
            figures = [localisation(m, owner_BNHW).mean().item() for m in maps]
            found[str(t)] = {n.split(".transformer")[0]: round(f, 3) for n, f in zip(order, figures, strict=True)}
            found[str(t)]["mean"] = round(float(np.mean(figures)), 3)
    pipe.unet.set_attn_processor(before)
    return found


def _names(pipe: StableDiffusionXLPipeline) -> Tensor:
    return pipe.encode_prompt(list(CLASSES), do_classifier_free_guidance=False)[0][:, 1]


def draws(
    pipe: StableDiffusionXLPipeline, detector_folder: Path, count: int, *, steps: int, guidance: float
) -> tuple[dict[str, float], Image.Image]:
    """Share of two-object prompts whose image shows both, and a sheet of the first 40 images."""
    rng = np.random.default_rng(77)
    pairs = [rng.permutation(len(CLASSES))[:2] for _ in range(count)]
    prompts = [compose([CLASSES[i] for i in pair], BACKGROUNDS[n % len(BACKGROUNDS)]) for n, pair in enumerate(pairs)]
    images: list[Image.Image] = []
    for start in range(0, count, 40):
        part = prompts[start : start + 40]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        images += pipe(
            part,
            negative_prompt=[""] * len(part),
            generator=generators,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=64,
            width=64,
        ).images
    finder = load_detector(
        SegmentationDetector(kind="segmentation", model=str(detector_folder), threshold=0.5, min_area=0.01),
        device="cpu",
        batch=50,
    )
    asked = [[CLASSES[i] for i in pair] for pair in pairs]
    seen = [{d.label for d in found} for found in finder.detect(images, asked)]
    both = float(np.mean([set(a) <= s for a, s in zip(asked, seen, strict=True)]))
    each = float(np.mean([name in s for a, s in zip(asked, seen, strict=True) for name in a]))
    sheet = Image.new("RGB", (10 * 128, 4 * 128))
    for n, image in enumerate(images[:40]):
        sheet.paste(image.resize((128, 128), Image.Resampling.NEAREST), (n % 10 * 128, n // 10 * 128))
    return {"both_present": both, "each_present": each, "prompts": count}, sheet


def check(base: Path, work: Path, out: Path, *, prompts: int) -> dict[str, object]:
    """All figures; also writes samples.png."""
    pipe = StableDiffusionXLPipeline.from_pretrained(base / "pipeline", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    held_out = scenery(work / "scenes", seed=2, count=500, split="benchmark")
    figures: dict[str, object] = {"autoencoder_psnr_db": round(autoencoder.psnr(pipe.vae, held_out), 2)}
    figures["localisation"] = words_localise(pipe, held_out)
    figures["two_objects"], sheet = draws(pipe, base / "detector", prompts, steps=20, guidance=3.0)
    if (base / "open_clip").exists():
        figures["open_clip_class_top1"] = retrieval(
            base / "open_clip", portraits(work / "scenes", seed=4, count=1000, split="benchmark")
        )
    sheet.save(out / "samples.png")
    return figures


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    place = Path("docs/toybox-base")
    result = check(Path("data/toybox/base"), Path(".work/toybox-base"), place, prompts=200)
    write_json(place / "quality.json", result)
    print(json.dumps(result, indent=1))
