"""Further measures of confusion, values by category, and which class wears which look; pure functions.

X crops of an image   N references of a task   D embedding width   S[x, n] how much crop x looks like reference n
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from mip.evaluation.confusion import Array, reference_similarity
from mip.evaluation.intervals import Floats, Interval, by_combination, draws, macro
from mip.tables import Row


def likeness(crops: Sequence[Array], references: Sequence[Array]) -> Floats:
    """S: mean over the images of reference n of the cosine with crop x.

    Args:
        crops: normalised embedding (D,) of every detected object, whatever its label.
        references: normalised embeddings (images, D) of each reference.
    """
    if not len(crops):
        return np.zeros((0, len(references)))
    return np.stack([np.stack(crops) @ images_RD.mean(axis=0) for images_RD in references], axis=1)


def detect_and_compare(crops: Sequence[Array], references: Sequence[Array]) -> float:
    """D&C of MuDI: 1 less the spectral norm of S - G, rows ordered by look; 0 where the number of crops is wrong.

    Reference n takes the unused crop that looks most like it, in the order of the references, so that labels play no
    part: it sees blends and wrong counts, and no swap. Arguments as for `likeness`.
    """
    if len(crops) != len(references):
        return 0.0
    s_XN = likeness(crops, references)
    unused, order = list(range(len(crops))), []
    for n in range(len(references)):
        order.append(max(unused, key=lambda x: s_XN[x, n]))
        unused.remove(order[-1])
    return float(1 - np.linalg.norm(s_XN[order] - reference_similarity(references), ord=2))


def identity_margin(s_XN: Array, is_found: Sequence[bool]) -> float:
    """ID-confusion margin of UMO (eq. 5): how far the second-best crop of each reference lies behind its best, 0 to 1.

    A missing object counts as 0; the public code skips it, which rewards missing objects. With fewer than two crops
    there is no second-best, and the margin is 0. Labels play no part, so it sees no swap either.

    Args:
        s_XN: as `likeness` gives it.
        is_found: whether each reference's object was detected, by label.
    """
    if len(s_XN) < 2:
        return 0.0
    second_N, best_N = np.sort(s_XN, axis=0)[-2:]
    ratio_N = np.divide(second_N, best_N, out=np.ones_like(best_N), where=best_N > 0)
    return float(np.mean(np.clip(1 - ratio_N, 0, 1) * np.asarray(is_found)))


def category_of(task: Row) -> str:
    """A task's category with its parts in order: "scene+pet" and "pet+scene" are one."""
    return "+".join(sorted(task["category"].split("+")))


def by_category(values: Sequence[float | None], tasks: Sequence[Row], *, count: int, seed: int) -> dict[str, Interval]:
    """A metric's macro mean in each category, with its interval over the category's combinations.

    Args:
        values: one a task; None where the metric does not cover it.
        tasks: in the order of the values.
        count: of bootstrap draws.
        seed: of the draws.
    """
    result = {}
    for category in sorted({category_of(task) for task in tasks}):
        chosen = [(v, t["combination"]) for v, t in zip(values, tasks, strict=True) if category_of(t) == category]
        own, combinations = zip(*chosen, strict=True)
        order = sorted(set(combinations))
        means_C = by_combination(own, combinations, order)
        known = sum(value is not None for value in own)
        result[category] = macro(means_C, draws(len(order), count=count, seed=seed), n=known)
    return result


def worn_looks(similarity: Sequence[Sequence[float | None]], names: Sequence[str]) -> Counter[tuple[str, str | None]]:
    """For each reference of a task its class, and the class whose look its object wears; None where it is missing.

    An object that looks as much like its own reference as like another wears its own look.

    Args:
        similarity: S of `confusion.similarity`; rows of None mark objects that were not found.
        names: class of each reference, all distinct.
    """
    worn: Counter[tuple[str, str | None]] = Counter()
    for i, (name, row) in enumerate(zip(names, similarity, strict=True)):
        known = [value for value in row if value is not None]
        if len(known) < len(row):
            worn[name, None] += 1
        else:
            worn[name, name if known[i] >= max(known) else names[int(np.argmax(known))]] += 1
    return worn
