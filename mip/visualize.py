"""Relevance shown on the image it belongs to."""

import matplotlib
import numpy as np
from numpy.typing import ArrayLike
from PIL import Image


def overlay(image: Image.Image, relevance_HW: ArrayLike) -> Image.Image:
    """The image in grey under a map stretched over it: dark violet is 0, yellow is 1, the same in every picture.

    Args:
        image: any mode and size; the result is RGB of this size.
        relevance_HW: values from 0 to 1 of any height and width; a tensor on the CPU too, such as one of
            `RelevanceMaps.mean_NHW`.

    Raises:
        ValueError: a map that has not two axes.
    """
    given_HW = np.asarray(relevance_HW, np.float32)
    if given_HW.ndim != 2:
        raise ValueError(f"got a map of shape {given_HW.shape}; give (height, width), one reference at a time")
    weight = Image.fromarray(np.clip(given_HW, 0, 1)).resize(image.size, Image.Resampling.BILINEAR)
    colour_HWC = matplotlib.colormaps["viridis"](np.asarray(weight))[..., :3]
    grey_HWC = np.asarray(image.convert("L"), np.float32)[..., None] / 255
    mixed_HWC = 0.6 * colour_HWC + 0.4 * grey_HWC
    return Image.fromarray(np.round(mixed_HWC * 255).astype(np.uint8))
