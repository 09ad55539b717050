"""Metrics, preprocessing and reference crops against recordings of the public code."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
from PIL import Image
from safetensors.numpy import load_file
from transformers import ViTImageProcessorPil

from mip.evaluation.benchmarks import load_reference
from mip.evaluation.encoders import vit_pixels
from mip.evaluation.metrics import clip_t, reference_likeness

GOLDEN = Path(os.environ.get("MIP_SHARED", Path(__file__).parents[3] / "shared")) / "golden"
IMAGENET = ViTImageProcessorPil(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])

pytestmark = pytest.mark.skipif(
    not GOLDEN.exists(), reason=f"no golden recordings in {GOLDEN}; set MIP_SHARED to their parent"
)


def test_the_published_metrics_agree():
    recorded = load_file(GOLDEN / "eval" / "scores.safetensors")
    totals = []
    for c in range(3):
        references = {kind: [recorded[f"comb{c}.ref{n}_{kind}"] for n in range(2)] for kind in ("clip", "dino")}
        text = clip_t(recorded[f"comb{c}.gen_clip"], recorded[f"comb{c}.prompt_clip"]).mean()
        image, dino = (
            reference_likeness(recorded[f"comb{c}.gen_{kind}"], references[kind]).mean(axis=0)
            for kind in ("clip", "dino")
        )
        np.testing.assert_allclose(text, recorded["clip_t_per_comb"][c], atol=1e-6)
        np.testing.assert_allclose(image, recorded["clip_i_per_comb_entity"][c], atol=1e-6)
        np.testing.assert_allclose(dino, recorded["dino_per_comb_entity"][c], atol=1e-6)
        totals.append([text, image.mean(), dino.mean()])
    np.testing.assert_allclose(np.mean(totals, axis=0), recorded["final"], atol=1e-6)


def test_dino_sees_the_published_pixels():
    recorded = load_file(GOLDEN / "eval" / "preprocess.safetensors")
    image = Image.open(GOLDEN / "reference_images" / "ref_jacket.png")
    pixels = vit_pixels(image, size=224, mean=IMAGENET.image_mean, std=IMAGENET.image_std)
    np.testing.assert_allclose(pixels.numpy(), recorded["dino"], atol=0.02)


def test_clip_sees_the_published_pixels():
    recorded = load_file(GOLDEN / "eval" / "preprocess.safetensors")
    image = Image.open(GOLDEN / "reference_images" / "ref_jacket.png")
    transform: Any = open_clip.image_transform(224, is_train=False)
    pixels = transform(image)
    np.testing.assert_allclose(pixels.numpy(), recorded["clip"], atol=0.02)


@pytest.mark.parametrize(
    ("name", "box"), [("wide_thing", [101.7, 50.2, 900.9, 601.4]), ("tall_thing", [120.5, 210.8, 700.3, 1180.6])]
)
def test_references_are_cut_as_published(name: str, box: list[float]):
    recorded = load_file(GOLDEN / "eval" / "reference_crop.safetensors")[name]
    image = load_reference(GOLDEN / "eval" / "reference_crop" / f"{name}.png", box)
    ratio = 224 / max(image.size)
    fitted = image.resize((int(image.width * ratio), int(image.height * ratio)), Image.Resampling.BILINEAR)
    square = Image.new("RGB", (224, 224), "white")
    square.paste(fitted, ((224 - fitted.width) // 2, (224 - fitted.height) // 2))
    np.testing.assert_allclose(np.asarray(square, int), recorded.astype(int), atol=1)
