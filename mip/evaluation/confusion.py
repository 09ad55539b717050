"""Confusion of a generated image: are all objects there, and does each look like its own reference?

N references of a task, of distinct classes   S[i, j] how much the crop of object i looks like reference j
P the references whose object was found       G[i, j] the same among the references themselves

Everything here is a pure function on arrays; DESIGN.md ("Confusion, defined") states the measures.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mip.errors import DataError

Array = NDArray[np.floating[Any]]

_ROUNDING = 1e-9  # two sums of the same cosines in another order may differ by this much
_LEAK_PERCENTILE = 95  # of correctly rendered scenes


@dataclass(frozen=True)
class Matching:
    """Which detection stands for which reference."""

    chosen: tuple[int | None, ...]  # for each reference, the number of its detection
    extra: tuple[int, ...]  # detections of a reference's class that stand for none


@dataclass(frozen=True)
class Verdict:
    """What confusion says of one image."""

    presence: float  # found references / references
    has_all: bool
    is_swapped: bool
    leak: float | None  # mean positive excess over G; None when nothing was found
    is_leaked: bool
    is_confused: bool
    count_error: float  # extra detections / references


def match(labels: Sequence[str], scores: Sequence[float], names: Sequence[str]) -> Matching:
    """One-to-one: each reference takes the detection of its class with the highest score (the first of equal ones).

    Args:
        labels: class of each detection.
        scores: confidence of each detection.
        names: class of each reference, all distinct.

    Raises:
        DataError: two references of one class, which labels cannot tell apart.
    """
    if has_same_class(names):
        raise DataError(
            f"got references {', '.join(names)}; labels cannot tell two of one class apart, leave the task out"
        )
    taken = []
    for name in names:
        own = [number for number, label in enumerate(labels) if label == name]
        taken.append(max(own, key=lambda number: scores[number]) if own else None)
    extra = (number for number, label in enumerate(labels) if label in names and number not in taken)
    return Matching(chosen=tuple(taken), extra=tuple(extra))


def has_same_class(names: Sequence[str]) -> bool:
    """Whether two references have one class; such tasks are left out and counted."""
    return len(set(names)) < len(names)


def similarity(crops: Sequence[Array | None], references: Sequence[Array]) -> Array:
    """S: mean over the images of reference j of the cosine with crop i.

    Args:
        crops: normalised embedding (D,) of each reference's object; None where it was not found.
        references: normalised embeddings (images, D) of each reference.

    Returns:
        S_NN; rows of objects that were not found are NaN.
    """
    count = len(references)
    values_NN = np.full((count, count), np.nan)
    for i, crop in enumerate(crops):
        if crop is not None:
            values_NN[i] = [float(np.mean(images_RD @ crop)) for images_RD in references]
    return values_NN


def reference_similarity(references: Sequence[Array]) -> Array:
    """G: the same among the references; on the diagonal each image meets only the others of its reference.

    A reference with one image has 1 on the diagonal.
    """
    count = len(references)
    values_NN = np.ones((count, count))
    for i, own_RD in enumerate(references):
        for j, other_RD in enumerate(references):
            cosines_RR = own_RD @ other_RD.T
            if i != j:
                values_NN[i, j] = float(cosines_RR.mean())
            elif len(own_RD) > 1:
                values_NN[i, i] = float(cosines_RR[~np.eye(len(own_RD), dtype=bool)].mean())
    return values_NN


def is_swapped(s_NN: Array) -> bool:
    """Whether another one-to-one map of the found objects to references fits better than their own.

    A lone survivor that wears another's look counts: the map may lead to any reference.
    """
    found = _found(s_NN)
    own = sum(s_NN[i, i] for i in found)
    others = (p for p in permutations(range(len(s_NN)), len(found)) if list(p) != found)
    return any(sum(s_NN[i, j] for i, j in zip(found, p, strict=True)) > own + _ROUNDING for p in others)


def excess(s_NN: Array, g_NN: Array) -> Array:
    """S - G off the diagonal, for the found objects: a vector of |P| * (N - 1) values."""
    return np.array([s_NN[i, j] - g_NN[i, j] for i in _found(s_NN) for j in range(len(s_NN)) if i != j])


def leak_threshold(excesses: Iterable[Array]) -> float:
    """95th percentile of the largest excess of each scene that shows the references' very identities, rendered right.

    One leak in it makes a scene leaked, so it is the largest that counts: one in twenty right scenes is blamed,
    however many objects it has.

    Raises:
        DataError: no scene, or nothing found in any.
    """
    largest = [float(of_scene.max()) for of_scene in excesses if of_scene.size]
    if not largest:
        raise DataError("got no calibration scene with a found object; set evaluate.leak_threshold or give such scenes")
    return float(np.percentile(largest, _LEAK_PERCENTILE))


def judge(s_NN: Array, g_NN: Array, *, extra: int, threshold: float) -> Verdict:
    """The verdict on one image.

    Args:
        s_NN: rows of NaN mark objects that were not found.
        g_NN: as `reference_similarity` gives it.
        extra: detections of the references' classes beyond the matched ones.
        threshold: of `leak_threshold`.
    """
    count, found = len(s_NN), _found(s_NN)
    has_all = len(found) == count
    over = excess(s_NN, g_NN)
    swapped, leaked = is_swapped(s_NN), bool((over > threshold).any())
    return Verdict(
        presence=len(found) / count,
        has_all=has_all,
        is_swapped=swapped,
        leak=float(np.maximum(over, 0).mean()) if over.size else None,
        is_leaked=leaked,
        is_confused=not has_all or swapped or leaked,
        count_error=extra / count,
    )


def _found(s_NN: Array) -> list[int]:
    return [i for i, row in enumerate(s_NN) if not np.isnan(row).any()]
