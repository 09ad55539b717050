"""How good the base is, on scenes and identities that no network has seen: the figures of its model card.

`python -m mip.toybox.pretrain.check` writes docs/toybox-base/quality.json and samples.png.
"""

# diffusers annotates its constructors and outputs more narrowly than it behaves, and exports lazily.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportPrivateImportUsage=false, reportCallIssue=false

import json
import logging
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from numpy.typing import NDArray
from PIL import Image

from mip.config import SegmentationDetector
from mip.evaluation.detectors import Detection, Detector, crop, load_detector
from mip.evaluation.encoders import Floats, Vit
from mip.evaluation.words import Pictured, mean_of_layers, word_localisation
from mip.model.pipeline import MIPAdapterXLPipeline, Reference
from mip.tables import write_json
from mip.toybox.pretrain import autoencoder
from mip.toybox.pretrain.build import FILES
from mip.toybox.pretrain.portraits import KIND, Portraits, portraits
from mip.toybox.pretrain.scenery import Scenery, scenery
from mip.toybox.pretrain.vision import retrieval
from mip.toybox.scenes import BACKGROUNDS, CLASSES, Scene, compose, render

log = logging.getLogger(__name__)

LEVELS = (200, 500, 800)  # timesteps


def words_localise(pipe: StableDiffusionXLPipeline, scenes: Scenery) -> dict[str, dict[str, float]]:
    """The own name's share of the merge weight inside its object's mask, by timestep and layer; chance is .5."""
    rows = np.flatnonzero((scenes.names_NK[:, 1] >= 0) & (scenes.names_NK[:, 2] < 0))[:48]
    pictures = [
        Pictured(
            Image.fromarray(scenes.image_NHWC[row]),
            scenes.captions[row],
            [CLASSES[k] for k in scenes.names_NK[row, :2]],
            np.stack([scenes.owner_NHW[row] == n for n in (1, 2)]),
        )
        for row in rows
    ]
    found = word_localisation(pipe, pictures, levels=LEVELS, seed=0)
    means = mean_of_layers(found)
    return {
        str(t): {**{layer: round(value, 3) for layer, value in layers.items()}, "mean": round(means[t], 3)}
        for t, layers in found.items()
    }


def draws(
    pipe: StableDiffusionXLPipeline, detector_folder: Path, count: int, *, steps: int, guidance: float
) -> tuple[dict[str, float], Image.Image]:
    """What two-object prompts show, by the detector and by the background's colours, and a sheet of 40 images."""
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
    asked = [{CLASSES[i] for i in pair} for pair in pairs]
    found = _finder(detector_folder).detect(images, [sorted(names) for names in asked])
    seen = [{detection.label for detection in of_image} for of_image in found]
    present = np.array([[name in of_image for name in names] for names, of_image in zip(asked, seen, strict=True)])
    grounds = [_background(image, of_image) for image, of_image in zip(images, found, strict=True)]
    is_there = np.array([ground == BACKGROUNDS[n % len(BACKGROUNDS)] for n, ground in enumerate(grounds)])
    figures = {
        "prompts": count,
        "each_present": float(present.mean()),
        "both_present": float(present.all(axis=1).mean()),
        "background_right": float(is_there.mean()),
        "all_right": float((present.all(axis=1) & is_there).mean()),
    }
    sheet = Image.new("RGB", (10 * 128, 4 * 128))
    for n, image in enumerate(images[:40]):
        sheet.paste(image.resize((128, 128), Image.Resampling.NEAREST), (n % 10 * 128, n // 10 * 128))
    return figures, sheet


def _background(image: Image.Image, found: list[Detection]) -> str:
    """The background whose renderings are nearest to the image, object pixels left out."""
    free_YX = np.ones((image.height, image.width), bool)
    for detection in found:
        assert detection.mask is not None
        free_YX &= ~detection.mask
    pixels = np.asarray(image).astype(float)
    distance = {name: np.abs(pixels - empty)[free_YX].mean() for name, empty in _empty_scenes(image.size).items()}
    return min(distance, key=distance.__getitem__)


@cache
def _empty_scenes(size: tuple[int, int]) -> dict[str, NDArray[np.float64]]:
    """Each background, averaged over its textures."""
    width, height = size
    scenes = {name: [Scene(name, (), texture_seed=seed) for seed in range(16)] for name in BACKGROUNDS}
    return {
        name: np.mean([render(scene, width=width, height=height).image for scene in of_name], axis=0)
        for name, of_name in scenes.items()
    }


def follows_references(base: Path, held_out: Portraits, *, count: int, scale: float) -> dict[str, float]:
    """Single objects drawn from one held-out reference each, as the judge sees them.

    Returns:
        found: share of images in which the object is found.
        own_nearest: share of all images whose object is nearer to its own reference than to nine random others.
        same_look: mean likeness of two images of one reference that differ in their noise alone, and
        other_look: of two images with one noise and different references.
    """
    pipe = MIPAdapterXLPipeline.from_pretrained(base / "pipeline", torch_dtype=torch.float32)
    assert isinstance(pipe, MIPAdapterXLPipeline)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_mip_adapter(base / "ip_adapter" / FILES["sdxl"], image_encoder=base / "image_encoder")
    shown_NHWC = np.where(held_out.mask_NHW[:count, ..., None] == 1, held_out.image_NHWC[:count], 255)
    references = [Image.fromarray(picture.astype(np.uint8)) for picture in shown_NHWC]
    names = [CLASSES[kind] for kind in held_out.traits_NK[:count, KIND]]
    looks_SND = [_looks(pipe, base, references, names, scale=scale, seed=seed) for seed in (0, 1)]
    eye = Vit(str(base / "appearance"), device="cpu", batch=50)
    own_ND = eye.encode_images(references)
    rng = np.random.default_rng(5)
    nearest = []
    for n, look_D in enumerate(looks_SND[0]):
        differs = (held_out.traits_NK[:count, 1:] != held_out.traits_NK[n, 1:]).any(axis=1)
        others = rng.choice(np.flatnonzero(differs), 9, replace=False)
        nearest.append(look_D is not None and bool((own_ND[others] @ look_D < own_ND[n] @ look_D).all()))
    again = [a @ b for a, b in zip(*looks_SND, strict=True) if a is not None and b is not None]
    first = [look_D for look_D in looks_SND[0] if look_D is not None]
    other = [a @ b for a, b in pairwise(first)]
    figures = {
        "found": len(first) / count,
        "own_nearest": np.mean(nearest),
        "same_look": np.mean(again),
        "other_look": np.mean(other),
    }
    return {"references": count, **{name: round(float(value), 3) for name, value in figures.items()}}


def _looks(
    pipe: MIPAdapterXLPipeline, base: Path, references: list[Image.Image], names: list[str], *, scale: float, seed: int
) -> list[Floats | None]:
    """The judge's embedding of each object that was drawn; None where it is not found. All share one noise."""
    prompts = [compose([name], BACKGROUNDS[n % len(BACKGROUNDS)]) for n, name in enumerate(names)]
    images: list[Image.Image] = []
    for start in range(0, len(prompts), 50):
        part = slice(start, start + 50)
        images += pipe(
            prompts[part],
            references=[[Reference(n, [r])] for n, r in zip(names[part], references[part], strict=True)],
            scale=scale,
            merge="mean",
            negative_prompt=[""] * len(prompts[part]),
            generator=[torch.Generator().manual_seed(seed) for _ in prompts[part]],
            num_inference_steps=20,
            guidance_scale=3.0,
            height=64,
            width=64,
        ).images
    found = _finder(base / "detector").detect(images, [[name] for name in names])
    best = [max(of_image, key=lambda d: d.score, default=None) for of_image in found]
    crops = [crop(image, detection) for image, detection in zip(images, best, strict=True) if detection is not None]
    looks = iter(Vit(str(base / "appearance"), device="cpu", batch=50).encode_images(crops))
    return [None if detection is None else next(looks) for detection in best]


def _finder(folder: Path) -> Detector:
    config = SegmentationDetector(kind="segmentation", model=str(folder), threshold=0.5, min_area=0.01)
    return load_detector(config, device="cpu", batch=50)


def check(base: Path, work: Path, out: Path, *, prompts: int) -> dict[str, object]:
    """All figures; also writes samples.png."""
    pipe = StableDiffusionXLPipeline.from_pretrained(base / "pipeline", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    held_out = scenery(work / "scenes", seed=2, count=500, split="benchmark")
    figures: dict[str, object] = {"autoencoder_psnr_db": round(autoencoder.psnr(pipe.vae, held_out), 2)}
    figures["localisation"] = words_localise(pipe, held_out)
    figures["two_objects"], sheet = draws(pipe, base / "detector", prompts, steps=20, guidance=3.0)
    alone = portraits(work / "scenes", seed=4, count=1000, split="benchmark")
    figures["follows_references"] = follows_references(base, alone, count=prompts, scale=1.0)
    figures["open_clip_class_top1"] = retrieval(base / "open_clip", alone)
    sheet.save(out / "samples.png")
    return figures


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    place = Path("docs/toybox-base")
    result = check(Path("data/toybox/base"), Path(".work/toybox-base"), place, prompts=200)
    write_json(place / "quality.json", result)
    print(json.dumps(result, indent=1))
