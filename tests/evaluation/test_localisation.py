"""Relevance maps against masks."""

import numpy as np
import pytest

from mip.errors import DataError
from mip.evaluation.localisation import localisation, map_iou

LEFT = np.zeros((8, 8), bool)
LEFT[:, :3] = True
RIGHT = LEFT[:, ::-1]
MASKS = np.stack([LEFT, RIGHT])


def _maps(share: float) -> np.ndarray:
    """The given share of relevance to the left reference on the left half, mirrored on the right."""
    left_HW = np.where(np.arange(8) < 4, share, 1 - share) * np.ones((8, 1))
    return np.stack([left_HW, 1 - left_HW]).astype(np.float32)


def test_indifferent_maps_are_at_chance():
    assert localisation(_maps(0.5), MASKS) == pytest.approx(0.5)


def test_perfect_maps_have_one_and_full_overlap():
    assert localisation(_maps(1.0), MASKS) == pytest.approx(1) and map_iou(_maps(1.0), MASKS) == 1


def test_exchanged_maps_have_none():
    assert localisation(_maps(0.0), MASKS) == pytest.approx(0) and map_iou(_maps(0.0), MASKS) == 0


def test_maps_of_another_size_are_resized():
    assert (localisation(_maps(0.9)[:, ::4, ::4], MASKS) or 0) > 0.8


def test_a_missing_object_is_left_out():
    assert localisation(_maps(0.7), np.stack([LEFT, np.zeros_like(LEFT)])) == pytest.approx(0.7)


def test_no_object_gives_no_number():
    assert localisation(_maps(0.7), np.zeros_like(MASKS)) is None and map_iou(_maps(0.7), np.zeros_like(MASKS)) is None


def test_maps_and_masks_must_agree_in_number():
    with pytest.raises(DataError, match="1 relevance maps and 2 masks"):
        localisation(_maps(0.5)[:1], MASKS)
