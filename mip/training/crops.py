"""Where the square training crop lies, what it shows, and the reference image of each object.

All coordinates are pixels of the stored image.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mip.data.images import WHITE, cutout

Box = Sequence[float]  # x1, y1, x2, y2; x2 and y2 exclusive


@dataclass(frozen=True)
class Crop:
    """A square of the stored image."""

    left: int
    top: int
    side: int

    def time_ids(self, *, width: int, height: int, resolution: int) -> tuple[int, ...]:
        """SDXL's micro-conditioning: original height and width, crop top and left, target height and width.

        Original size and crop are in one frame, the stored image's pixels; the target is the resolution trained at.
        """
        return (height, width, self.top, self.left, resolution, resolution)


def generator(seed: int, *parts: object) -> np.random.Generator:
    """A random stream that depends on these values and on nothing else: no order, no process, no batch."""
    text = "\0".join(map(str, (seed, *parts)))
    return np.random.default_rng(np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32))


def draw_crop(rng: np.random.Generator, *, width: int, height: int, boxes: Sequence[Box]) -> Crop:
    """The largest square, at a random place that holds all the boxes; where there is none, centred on them.

    `boxes` are those of the chosen objects only. A square that would leave the image is pushed back to its edge.
    """
    side = min(width, height)
    left = _start(rng, width, side, min(b[0] for b in boxes), max(b[2] for b in boxes))
    top = _start(rng, height, side, min(b[1] for b in boxes), max(b[3] for b in boxes))
    return Crop(left=left, top=top, side=side)


def _start(rng: np.random.Generator, length: int, side: int, first: float, last: float) -> int:
    low, high = max(0, math.ceil(last - side)), min(length - side, math.floor(first))
    if low <= high:
        return int(rng.integers(low, high + 1))
    return min(max(0, round((first + last - side) / 2)), length - side)


def crop_image(image: Image.Image, crop: Crop, *, resolution: int) -> Image.Image:
    """The crop at `resolution` pixels; Pillow's bicubic filter widens when it shrinks, so nothing aliases."""
    # Cropped first: the filter must not read what is outside.
    inside = image.crop((crop.left, crop.top, crop.left + crop.side, crop.top + crop.side))
    return inside.resize((resolution, resolution), Image.Resampling.BICUBIC)


def visible_share(mask_HW: NDArray[np.bool_], crop: Crop) -> float:
    """Which part of a mask of the stored image lies inside the crop."""
    return float(_window(mask_HW, crop).sum() / max(1, mask_HW.sum()))


def crop_mask(mask_HW: NDArray[np.bool_], crop: Crop, *, size: tuple[int, int]) -> NDArray[np.uint8]:
    """How much of each cell the mask covers, 0 to 255, on a grid of `size` (height, width) over the crop."""
    image = Image.fromarray(_window(mask_HW, crop).astype(np.uint8) * 255)
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BOX))


def _window(mask_HW: NDArray[np.bool_], crop: Crop) -> NDArray[np.bool_]:
    return mask_HW[crop.top : crop.top + crop.side, crop.left : crop.left + crop.side]


def reference_image(image: Image.Image, *, rle: str, box: Box, is_mirrored: bool) -> Image.Image:
    """An object alone on a white square, from the whole stored image: no pixel is lost to the crop or to its resize."""
    alone = cutout(image, rle=rle, box=box, fill=WHITE)
    return ImageOps.mirror(alone) if is_mirrored else alone
