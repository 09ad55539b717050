"""Macro means and the paired bootstrap."""

import numpy as np
import pytest

from mip.evaluation.intervals import Interval, by_combination, draws, macro, paired_difference


def _width(interval: Interval) -> float:
    assert interval.low is not None and interval.high is not None
    return interval.high - interval.low


def test_a_combination_counts_once_however_many_values_it_has():
    means_C = by_combination([1.0, 1.0, 1.0, 0.0], [0, 0, 0, 1], [0, 1])
    assert macro(means_C, draws(2, count=10, seed=0), n=4).value == 0.5


def test_a_combination_without_values_is_left_out():
    means_C = by_combination([0.25, None], [0, 1], [0, 1])
    interval = macro(means_C, draws(2, count=100, seed=0), n=1)
    assert (interval.value, interval.low, interval.high) == (0.25, 0.25, 0.25)


def test_nothing_to_average_gives_no_numbers():
    interval = macro(np.full(3, np.nan), draws(3, count=10, seed=0), n=0)
    assert (interval.value, interval.low, interval.high) == (None, None, None)


def test_methods_share_their_draws():
    np.testing.assert_array_equal(draws(7, count=20, seed=5), draws(7, count=20, seed=5))


def test_pairing_cancels_what_methods_have_in_common():
    """Combinations differ by a lot and two methods by 0.1 everywhere: the paired interval has no width."""
    one_C = np.linspace(0, 1, 20)
    sampled = draws(20, count=200, seed=1)
    difference = paired_difference(one_C + 0.1, one_C, sampled)
    assert _width(difference) < 1e-12 and difference.value == pytest.approx(0.1)
    assert _width(macro(one_C, sampled, n=20)) > 0.1


def test_a_difference_needs_both_methods():
    difference = paired_difference(
        np.array([1.0, np.nan, 3.0]), np.array([0.0, 0.0, np.nan]), draws(3, count=9, seed=0)
    )
    assert (difference.value, difference.n) == (1.0, 1)


def test_the_interval_covers_the_mean():
    values_C = np.random.default_rng(0).random(30)
    interval = macro(values_C, draws(30, count=2000, seed=0), n=30)
    assert interval.value is not None and interval.low is not None
    assert interval.low < interval.value < interval.low + _width(interval)
