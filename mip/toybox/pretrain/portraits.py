"""Single objects that fill their picture, with all that a caption could say of them, for the vision networks."""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from mip.toybox.scenes import (
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    PATTERNS,
    Scene,
    Split,
    Thing,
    draw_identity,
    render,
    shows_secondary,
)

SIZE = 64
_PART = 1000
KIND, PRIMARY, SECONDARY, PATTERN = range(4)


@dataclass(frozen=True)
class Portraits:
    """N objects.

    image_NHWC  uint8 RGB on a background
    mask_NHW    uint8, 1 on the object
    traits_NK   int8: class, primary colour, secondary colour (the primary where it does not show), pattern
    """

    image_NHWC: NDArray[np.uint8]
    mask_NHW: NDArray[np.uint8]
    traits_NK: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.traits_NK)


def _part(seed: int, part: int, split: Split) -> Portraits:
    rng = np.random.default_rng([seed, part])
    image = np.empty((_PART, SIZE, SIZE, 3), np.uint8)
    mask = np.empty((_PART, SIZE, SIZE), np.uint8)
    traits = np.empty((_PART, 4), np.int8)
    for n in range(_PART):
        kind, who = int(rng.integers(len(CLASSES))), draw_identity(rng, split)
        thing = Thing(
            CLASSES[kind], who, 0.5, 0.5, half=float(rng.uniform(0.36, 0.44)), angle=float(rng.uniform(-0.2, 0.2))
        )
        scene = Scene(BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))], (thing,), texture_seed=int(rng.integers(2**31)))
        drawn = render(scene, width=SIZE, height=SIZE)
        image[n], mask[n] = drawn.image, drawn.masks[0]
        colours = list(COLOURS)
        second = who.secondary if shows_secondary(CLASSES[kind], who) else who.primary
        traits[n] = kind, colours.index(who.primary), colours.index(second), PATTERNS.index(who.pattern)
    return Portraits(image, mask, traits)


def portraits(folder: Path, *, seed: int, count: int, split: Split = "train", workers: int = 2) -> Portraits:
    """`count` (a multiple of 1,000) portraits, from `folder` if they were rendered before."""
    file = folder / f"portraits-{split}-{seed}-{count}.npz"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        numbers = range(count // _PART)
        with ProcessPoolExecutor(workers) as pool:
            parts = list(pool.map(_part, [seed] * len(numbers), numbers, [split] * len(numbers)))
        partial = file.with_suffix(".partial.npz")
        image, mask, traits = (
            np.concatenate([getattr(p, a) for p in parts]) for a in ("image_NHWC", "mask_NHW", "traits_NK")
        )
        np.savez(partial, image_NHWC=image, mask_NHW=mask, traits_NK=traits)
        os.replace(partial, file)
    return Portraits(**np.load(file))


def cut_outs(
    source: Portraits,
    rows: NDArray[np.int64],
    rng: np.random.Generator,
    *,
    size: int,
    grounds: tuple[float, float, float] = (0.5, 0.3, 0.2),
) -> NDArray[np.float32]:
    """Pictures (n, size, size, 3) in [0, 1], shifted and blurred as crops are.

    `grounds` are the shares of those on white, on black and as they are.
    """
    out = np.empty((len(rows), size, size, 3), np.float32)
    for n, row in enumerate(rows):
        image, mask = source.image_NHWC[row], source.mask_NHW[row][..., None]
        ground = rng.choice(3, p=grounds)
        picture = image if ground == 2 else np.where(mask == 1, image, 255 if ground == 0 else 0).astype(np.uint8)
        edge = tuple(int(c) for c in picture[0, 0])
        zoom, (dx, dy) = rng.uniform(0.9, 1.2), rng.uniform(-4, 4, 2)
        if rng.random() < 0.5:
            picture = picture[:, ::-1]
        centre = SIZE / 2
        shift = np.array([[zoom, 0, centre * (1 - zoom) + dx], [0, zoom, centre * (1 - zoom) + dy]], np.float32)
        picture = cv2.warpAffine(
            np.ascontiguousarray(picture), shift, (SIZE, SIZE), borderMode=cv2.BORDER_CONSTANT, borderValue=edge
        )
        small = int(rng.integers(18, SIZE + 1))  # an object of a 64 pixel scene is this small before it is enlarged
        picture = cv2.resize(picture, (small, small), interpolation=cv2.INTER_AREA)
        picture = cv2.resize(picture, (size, size), interpolation=cv2.INTER_LINEAR)
        out[n] = picture.astype(np.float32) / 255 + rng.normal(0, 0.02)
    return out.clip(0, 1)
