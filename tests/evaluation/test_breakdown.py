"""Detect-and-compare, the identity margin and categories, on hand-made values."""

import numpy as np
import pytest

from mip.evaluation.breakdown import by_category, category_of, detect_and_compare, identity_margin, likeness, worn_looks

CAT, DOG = np.array([1.0, 0.0]), np.array([0.0, 1.0])
MIXED = np.array([1.0, 1.0]) / np.sqrt(2)
REFERENCES = [np.stack([CAT, CAT]), np.stack([DOG, DOG])]


def test_likeness_is_the_mean_over_the_photos_of_a_reference():
    s_XN = likeness([CAT, DOG, MIXED], [np.stack([CAT, DOG]), DOG[None]])
    np.testing.assert_allclose(s_XN, [[0.5, 0], [0.5, 1], [np.sqrt(0.5), np.sqrt(0.5)]])
    assert likeness([], REFERENCES).shape == (0, 2)


def test_detect_and_compare_is_1_where_every_look_is_there_once():
    assert detect_and_compare([CAT, DOG], REFERENCES) == pytest.approx(1)
    assert detect_and_compare([DOG, CAT], REFERENCES) == pytest.approx(1)  # labels play no part


def test_detect_and_compare_falls_with_the_norm_of_what_is_mixed():
    # S - G = [[a - 1, a], [a, a - 1]] with a = sqrt(1/2); its norm is the larger of |2a - 1| and 1.
    assert detect_and_compare([MIXED, MIXED], REFERENCES) == pytest.approx(0)
    almost = np.array([0.96, 0.28])
    assert 0 < detect_and_compare([almost, DOG], REFERENCES) < 1


@pytest.mark.parametrize("crops", [[], [CAT], [CAT, DOG, DOG]])
def test_a_wrong_number_of_crops_is_0(crops: list):
    assert detect_and_compare(crops, REFERENCES) == 0


def test_the_margin_is_that_of_the_second_best_crop():
    s_XN = np.array([[0.8, 0.2], [0.2, 0.5], [0.1, 0.4]])
    assert identity_margin(s_XN, [True, True]) == pytest.approx((0.75 + 0.2) / 2)


def test_a_missing_object_has_no_margin():
    assert identity_margin(np.array([[0.8, 0.2], [0.2, 0.1]]), [True, False]) == pytest.approx(0.75 / 2)
    assert identity_margin(np.array([[0.8, 0.2]]), [True, False]) == 0
    assert identity_margin(np.zeros((0, 2)), [False, False]) == 0


def test_a_margin_stays_between_0_and_1():
    assert identity_margin(np.array([[0.5], [-0.5]]), [True]) == 1
    assert identity_margin(np.array([[-0.1], [-0.5]]), [True]) == 0


def _task(combination: int, category: str) -> dict:
    return {"combination": combination, "category": category}


def test_categories_do_not_depend_on_the_order_of_their_parts():
    assert category_of(_task(0, "scene+pet")) == category_of(_task(1, "pet+scene")) == "pet+scene"


def test_a_category_is_a_macro_mean_over_its_own_combinations():
    tasks = [_task(0, "pet+pet"), _task(0, "pet+pet"), _task(1, "pet+pet"), _task(2, "scene+pet"), _task(3, "toy")]
    found = by_category([1.0, 0.0, 0.0, 0.8, None], tasks, count=200, seed=1)
    assert list(found) == ["pet+pet", "pet+scene", "toy"]
    assert (found["pet+pet"].value, found["pet+pet"].n) == (0.25, 3)
    assert (found["pet+pet"].low, found["pet+pet"].high) == (0.0, 0.5)
    assert (found["pet+scene"].value, found["pet+scene"].low, found["pet+scene"].high) == (0.8, 0.8, 0.8)
    assert found["toy"].value is None and found["toy"].n == 0


def test_an_object_wears_the_look_that_it_is_most_like_and_its_own_among_equals():
    assert worn_looks([[0.9, 0.2], [0.8, 0.1]], ["cat", "dog"]) == {("cat", "cat"): 1, ("dog", "cat"): 1}
    assert worn_looks([[0.5, 0.5], [0.5, 0.5]], ["cat", "dog"]) == {("cat", "cat"): 1, ("dog", "dog"): 1}
    assert worn_looks([[None, None], [0.1, 0.4]], ["cat", "dog"]) == {("cat", None): 1, ("dog", "dog"): 1}
