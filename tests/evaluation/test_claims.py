"""Claims: pairing, coverage, and what the test says of noise and of an effect."""

import numpy as np
import pytest

from mip.evaluation.claims import claims, holm, sign_flip_p


def _rows(method: str, confused: np.ndarray, presence: np.ndarray | None = None) -> list[dict]:
    presence = np.ones(confused.shape) if presence is None else presence
    return [
        {
            "method": method,
            "task_id": f"{c}-{p}",
            "combination": c,
            "confused": bool(confused[c, p]),
            "swapped": False,
            "presence": float(presence[c, p]),
            "clip_t": 1.0,
        }
        for c, p in np.ndindex(confused.shape)
    ]


def _claim(own: np.ndarray, other: np.ndarray, metric: str = "confused", presence: tuple = (None, None)):
    rows = _rows("mip", own, presence[0]) + _rows("rival", other, presence[1])[::-1]  # paired by task, not by place
    return claims(rows, method="mip", rivals=["rival"], metrics=[metric], bootstrap=500, seed=1)[0]


def test_a_clear_effect_is_apart_and_significant():
    rng = np.random.default_rng(0)
    claim = _claim(rng.random((40, 8)) < 0.2, rng.random((40, 8)) < 0.8)
    assert claim.is_apart and claim.verdict == "better" and claim.p_value is not None and claim.p_value < 1e-3
    assert claim.own.value is not None and claim.other.value is not None
    assert claim.difference.value == pytest.approx(claim.own.value - claim.other.value)


def test_noise_is_neither():
    rng = np.random.default_rng(0)
    claim = _claim(rng.random((40, 8)) < 0.5, rng.random((40, 8)) < 0.5)
    assert not claim.is_apart and claim.verdict == "undecided" and claim.p_value is not None and claim.p_value > 0.05


def test_the_worse_side_is_called_so():
    rng = np.random.default_rng(0)
    claim = _claim(rng.random((40, 8)) < 0.8, rng.random((40, 8)) < 0.2)
    assert not claim.is_apart and claim.verdict == "worse"


def test_tasks_in_which_one_of_them_misses_an_object_do_not_count_where_all_are_present():
    confused = np.array([[True, True], [True, False]])
    own, other = np.array([[0.5, 1.0], [1.0, 1.0]]), np.array([[1.0, 1.0], [0.5, 1.0]])
    claim = _claim(confused, ~confused, "confused_present", presence=(own, other))
    assert claim.own.n == claim.other.n == 2  # the second task of each
    assert (claim.own.value, claim.other.value) == (0.5, 0.5)
    claim = _claim(confused, ~confused)
    assert (claim.own.value, claim.other.value) == (0.75, 0.25)


def test_holm_corrects_the_smallest_most_and_keeps_the_order():
    assert holm([0.04, None, 0.01, 0.03]) == [pytest.approx(0.06), None, pytest.approx(0.03), pytest.approx(0.06)]
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_the_sign_flip_test_keeps_its_level():
    rng = np.random.default_rng(3)
    rejected = [(sign_flip_p(rng.normal(0, 1, 30), seed=0) or 1) < 0.05 for _ in range(200)]
    assert 0.01 < np.mean(rejected) < 0.1


def test_no_difference_has_no_p():
    assert sign_flip_p(np.zeros(5), seed=0) is None
