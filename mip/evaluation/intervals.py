"""Macro means over combinations, and how sure they are: a bootstrap over combinations, paired between methods.

C combinations   K draws
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % bootstrap interval; None where there is nothing to average."""

    value: float | None
    low: float | None
    high: float | None
    n: int  # values behind it, before they were averaged in their combinations


def by_combination(values: Sequence[float | None], combinations: Sequence[int], order: Sequence[int]) -> Floats:
    """Mean of the values in each combination, in the given order; NaN where a combination has none."""
    groups: dict[int, list[float]] = {combination: [] for combination in order}
    for value, combination in zip(values, combinations, strict=True):
        if value is not None:
            groups[combination].append(float(value))
    return np.array([np.mean(group) if group else np.nan for group in groups.values()], dtype=np.float64)


def draws(combinations: int, *, count: int, seed: int) -> Integers:
    """Which combinations each bootstrap draw takes (K, C): the same for every method, which pairs them."""
    return np.random.default_rng(seed).integers(0, combinations, (count, combinations))


def macro(values_C: Floats, draws_KC: Integers, *, n: int) -> Interval:
    """Mean over the combinations that have a value, with the interval of those draws."""
    if np.isnan(values_C).all():
        return Interval(None, None, None, n)
    low, high = _percentiles(_means(values_C[draws_KC]))
    return Interval(float(np.nanmean(values_C)), low, high, n)


def paired_difference(one_C: Floats, other_C: Floats, draws_KC: Integers) -> Interval:
    """Mean of one method less another's, over the combinations in which both have a value; n counts those."""
    return macro(one_C - other_C, draws_KC, n=int((~np.isnan(one_C - other_C)).sum()))


def _means(drawn_KC: Floats) -> Floats:
    """Mean of each draw over what it has; draws without a single value are left out."""
    has_KC = ~np.isnan(drawn_KC)
    counts_K = has_KC.sum(axis=1)
    return np.where(has_KC, drawn_KC, 0).sum(axis=1)[counts_K > 0] / counts_K[counts_K > 0]


def _percentiles(means: Floats) -> tuple[float, float]:
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
