"""Where the references act: relevance maps against the true masks of the objects.

N references   H, W latent height and width   Y, X height and width of a mask in pixels
"""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mip.errors import DataError

Array = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]


def localisation(relevance_NHW: Array, masks_NYX: Mask) -> float | None:
    """Mean over objects of the own reference's relevance inside the object's mask; chance is 1 / N, 1 is perfect.

    Objects with an empty mask are left out; None when all are.

    Raises:
        DataError: a different number of maps and masks.
    """
    maps_NYX = _at_size_of(masks_NYX, relevance_NHW)
    inside = [
        float(map_YX[mask_YX].mean()) for map_YX, mask_YX in zip(maps_NYX, masks_NYX, strict=True) if mask_YX.any()
    ]
    return float(np.mean(inside)) if inside else None


def map_iou(relevance_NHW: Array, masks_NYX: Mask) -> float | None:
    """Mean over objects of the overlap of its mask with where its map exceeds 1 / N, inside the union of all masks.

    Only the objects' pixels count: relevance is a share, and on the background it says nothing. None without objects.

    Raises:
        DataError: a different number of maps and masks.
    """
    maps_NYX = _at_size_of(masks_NYX, relevance_NHW)
    anywhere_YX = masks_NYX.any(axis=0)
    claimed_NYX = (maps_NYX > 1 / len(maps_NYX)) & anywhere_YX
    overlaps = [
        float((claim & mask).sum() / (claim | mask).sum())
        for claim, mask in zip(claimed_NYX, masks_NYX, strict=True)
        if mask.any()
    ]
    return float(np.mean(overlaps)) if overlaps else None


def _at_size_of(masks_NYX: Mask, relevance_NHW: Array) -> Array:
    if len(masks_NYX) != len(relevance_NHW):
        raise DataError(
            f"got {len(relevance_NHW)} relevance maps and {len(masks_NYX)} masks; give one of each per reference"
        )
    height, width = masks_NYX.shape[1:]
    resized = [
        cv2.resize(map_HW.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
        for map_HW in relevance_NHW
    ]
    return np.stack(resized)
