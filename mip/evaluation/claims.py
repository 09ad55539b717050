"""Claims of one method over another on the same tasks: each side's interval, their paired difference, and a test.

C combinations
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

from mip.evaluation.intervals import Floats, Integers, Interval, by_combination, draws, macro, paired_difference
from mip.tables import Row

_FLIPS = 10_000  # of the permutation test
PRESENT = "confused_present"
LOWER = frozenset({"confused", PRESENT})  # is better


@dataclass(frozen=True)
class Claim:
    """One metric of two methods over the tasks that it covers in both."""

    method: str
    rival: str
    metric: str
    own: Interval
    other: Interval
    difference: Interval  # own less other, paired by combination
    p_value: float | None  # two-sided sign-flip test of the paired differences, by Holm over all claims made together

    @property
    def is_apart(self) -> bool:
        """Whether the method is better and the two sides' own intervals do not overlap."""
        if self.own.low is None or self.own.high is None or self.other.low is None or self.other.high is None:
            return False
        return self.own.high < self.other.low if self.metric in LOWER else self.own.low > self.other.high

    @property
    def verdict(self) -> Literal["better", "worse", "undecided"]:
        """What the interval of the paired difference says."""
        low, high = self.difference.low, self.difference.high
        if low is None or high is None or low <= 0 <= high:
            return "undecided"
        return "better" if (high < 0) == (self.metric in LOWER) else "worse"

    def to_row(self) -> Row:
        """For a JSON file."""
        return {**asdict(self), "is_apart": self.is_apart, "verdict": self.verdict}


def claims(
    rows: Sequence[Row], *, method: str, rivals: Sequence[str], metrics: Sequence[str], bootstrap: int, seed: int
) -> list[Claim]:
    """Compare a method with each rival in each metric.

    Args:
        rows: of kind "per_task", of all methods.
        method: whose claims they are.
        rivals: with whom it is compared.
        metrics: columns of the rows, or PRESENT: confused over the tasks in which both show every object.
        bootstrap: draws; the same combinations in all of them.
        seed: of the draws and of the test.
    """
    by_method: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_method.setdefault(row["method"], {})[row["task_id"]] = row
    made = []
    for rival in rivals:
        pairs = [(row, by_method[rival][task]) for task, row in by_method[method].items()]
        order = sorted({own["combination"] for own, _ in pairs})
        sampled = draws(len(order), count=bootstrap, seed=seed)
        for metric in metrics:
            values = [_values(metric, own, other) for own, other in pairs]
            combinations = [own["combination"] for own, _ in pairs]
            sides = [by_combination(side, combinations, order) for side in zip(*values, strict=True)]
            covered = sum(own is not None for own, _ in values)
            made.append(_claim(method, rival, metric, sides[0], sides[1], sampled, covered=covered, seed=seed))
    return [replace(claim, p_value=p) for claim, p in zip(made, holm([c.p_value for c in made]), strict=True)]


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """The p-values corrected for their number (Holm 1979); None stays None."""
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for done, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - done)))
        corrected[place] = largest
    return corrected


def sign_flip_p(difference_C: Floats, *, seed: int) -> float | None:
    """Two-sided p of the mean difference when each combination's sign is a coin's; None without a difference."""
    known = difference_C[~np.isnan(difference_C)]
    if not known.any():
        return None
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), (_FLIPS, len(known)))
    as_large = np.abs((signs * known).mean(axis=1)) >= abs(known.mean()) - 1e-12
    return float((as_large.sum() + 1) / (_FLIPS + 1))


def _claim(
    method: str, rival: str, metric: str, own_C: Floats, other_C: Floats, sampled: Integers, *, covered: int, seed: int
) -> Claim:
    return Claim(
        method=method,
        rival=rival,
        metric=metric,
        own=macro(own_C, sampled, n=covered),
        other=macro(other_C, sampled, n=covered),
        difference=paired_difference(own_C, other_C, sampled),
        p_value=sign_flip_p(own_C - other_C, seed=seed),
    )


def _values(metric: str, own: Row, other: Row) -> tuple[float | None, float | None]:
    """The metric of a task by both methods; None for both where it does not cover the task in one of them."""
    if metric == PRESENT:
        if own["presence"] != 1 or other["presence"] != 1:
            return None, None
        metric = "confused"
    if own[metric] is None or other[metric] is None:
        return None, None
    return float(own[metric]), float(other[metric])
