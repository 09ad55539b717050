"""Confusion on hand-made matrices: the order a person would give, and each measure by itself."""

import numpy as np
import pytest

from mip.errors import DataError
from mip.evaluation.confusion import (
    excess,
    is_swapped,
    judge,
    leak_threshold,
    match,
    reference_similarity,
    similarity,
)
from mip.evaluation.judge import CHECKS
from mip.evaluation.metrics import reference_likeness

THRESHOLD = 0.15
NONE = np.nan
G_NN = np.array([[0.9, 0.3], [0.3, 0.9]])
RIGHT = np.array([[0.85, 0.3], [0.32, 0.88]])
SWAPPED = np.array([[0.3, 0.85], [0.88, 0.32]])
BLENDED = np.array([[0.7, 0.6], [0.6, 0.7]])
MISSING = np.array([[0.85, 0.3], [NONE, NONE]])


def _verdict(s_NN: np.ndarray, extra: int = 0):
    return judge(s_NN, G_NN, extra=extra, threshold=THRESHOLD)


def test_an_image_that_is_right_is_not_confused():
    verdict = _verdict(RIGHT)
    assert (verdict.presence, verdict.is_swapped, verdict.is_leaked, verdict.is_confused) == (1.0, False, False, False)


def test_exchanged_identities_are_swapped():
    verdict = _verdict(SWAPPED)
    assert verdict.is_swapped and verdict.is_confused


def test_blended_identities_leak_without_being_swapped():
    verdict = _verdict(BLENDED)
    assert verdict.is_leaked and not verdict.is_swapped and verdict.is_confused


def test_a_missing_object_is_confused_and_only_that():
    verdict = _verdict(MISSING)
    assert verdict.presence == 0.5 and verdict.is_confused and not (verdict.is_swapped or verdict.is_leaked)


def test_a_duplicate_counts_as_such_and_confuses_nothing():
    verdict = _verdict(RIGHT, extra=1)
    assert verdict.count_error == 0.5 and not verdict.is_confused


def test_leak_orders_images_as_a_person_would():
    leaks = [_verdict(s_NN).leak or 0 for s_NN in (RIGHT, BLENDED, SWAPPED)]
    assert leaks == sorted(leaks) and len(set(leaks)) == 3


def test_a_lone_survivor_that_wears_the_others_look_is_swapped():
    assert is_swapped(np.array([[0.3, 0.8], [NONE, NONE]]))


def test_a_rotation_of_three_looks_is_swapped():
    assert is_swapped(np.array([[0.2, 0.9, 0.2], [0.2, 0.2, 0.9], [0.9, 0.2, 0.2]]))


def test_equal_fits_are_not_swapped():
    assert not is_swapped(np.full((3, 3), 0.1))


def test_an_image_without_any_object_is_confused_and_has_no_leak():
    verdict = _verdict(np.full((2, 2), NONE))
    assert verdict.is_confused and verdict.leak is None and not verdict.is_swapped


def test_each_reference_takes_the_surest_detection_of_its_class():
    matching = match(["dog", "cat", "cat", "tree"], [0.5, 0.6, 0.9, 1.0], ["cat", "dog"])
    assert matching.chosen == (2, 0) and matching.extra == (1,)


def test_matching_refuses_two_references_of_one_class():
    with pytest.raises(DataError, match="leave the task out"):
        match(["cat"], [0.9], ["cat", "cat"])


def test_similarity_averages_over_the_photos_of_a_reference():
    crops = [np.array([1.0, 0.0]), None]
    references = [np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[0.0, 1.0]])]
    np.testing.assert_array_equal(similarity(crops, references), [[0.5, 0.0], [NONE, NONE]])


def test_a_reference_meets_only_its_other_photos():
    pair = np.array([[1.0, 0.0], [0.6, 0.8]])
    np.testing.assert_allclose(reference_similarity([pair, pair[:1]]), [[0.6, 0.8], [0.8, 1.0]])


def test_the_threshold_is_the_95th_percentile_of_what_right_scenes_show():
    scenes = [excess(np.array([[0.9, 0.3 + i / 100], [NONE, NONE]]), G_NN) for i in range(101)]
    assert leak_threshold(scenes) == pytest.approx(0.95)


def test_one_in_twenty_right_scenes_is_blamed_however_many_objects_it_has():
    rng = np.random.default_rng(0)
    scenes = list(rng.normal(0, 1, (1000, 6)))
    assert np.mean([scene.max() > leak_threshold(scenes) for scene in scenes]) == pytest.approx(0.05)


def test_calibration_without_scenes_is_an_error():
    with pytest.raises(DataError, match="no calibration scene"):
        leak_threshold([])


def test_clip_i_cannot_see_a_swap():
    """Exchange the two identities everywhere: the pooled features of a scene are the same, and so is its CLIP-I."""
    cat, dog = np.array([1.0, 0.0, 0.2]), np.array([0.0, 1.0, 0.2])
    right_XD, swapped_XD = (cat + dog)[None], (dog + cat)[None]
    references = [cat[None], dog[None]]
    np.testing.assert_array_equal(
        reference_likeness(right_XD, references).mean(), reference_likeness(swapped_XD, references).mean()
    )
    unit = [reference / np.linalg.norm(reference) for reference in (cat, dog)]
    looks = [one[None] for one in unit]
    assert not is_swapped(similarity(unit, looks)) and is_swapped(similarity(unit[::-1], looks))


@pytest.mark.parametrize(
    ("kind", "s_NN"),
    [
        ("right", [[0.9, 0.1], [0.1, 0.9]]),
        ("swapped", [[0.1, 0.9], [0.9, 0.1]]),
        ("blended", [[0.6, 0.5], [0.5, 0.6]]),
        ("missing", [[NONE, NONE], [0.1, 0.9]]),
    ],
)
def test_every_check_deserves_its_own_verdict(kind: str, s_NN: list[list[float]]):
    verdict = judge(np.array(s_NN), np.array([[1, 0.1], [0.1, 1]]), extra=0, threshold=0.1)
    assert CHECKS[kind](verdict)
    assert CHECKS["right"](verdict) == (kind == "right") and CHECKS["missing"](verdict) == (kind == "missing")
