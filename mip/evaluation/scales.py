"""A method's scale is chosen on validation tasks, by one rule for all: no more confusion than can be told, then text.

Confusion hardly depends on the scale over a wide range, while a large scale costs text and backgrounds; the very least
confused of a few dozen tasks would be a draw of noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mip.evaluation.intervals import by_combination
from mip.evaluation.judge import Drawn, Judge
from mip.evaluation.metrics import clip_t

RULE = "highest clip_t where confused is within one standard error of the lowest; ties (1e-9) by the smaller scale"
_TIE = 1e-9


@dataclass(frozen=True)
class Candidate:
    """A scale and how it did on the validation tasks: macro means over combinations."""

    scale: float
    confused: float
    confused_error: float  # standard error of that mean
    clip_t: float
    tasks: int


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """The best of one or more candidates by the rule."""
    least = min(candidates, key=lambda one: one.confused)
    alike = [one for one in candidates if one.confused <= least.confused + least.confused_error + _TIE]
    most = max(one.clip_t for one in alike)
    return min((one for one in alike if one.clip_t >= most - _TIE), key=lambda one: one.scale)


def candidate(judge: Judge, images: Sequence[Drawn], *, scale: float, threshold: float) -> Candidate:
    """How the images drawn at a scale did. Tasks with two references of one class count for CLIP-T only."""
    combinations = [one.task["combination"] for one in images]
    order = sorted(set(combinations))
    features = judge.clip_images({one.sha256: one.open for one in images})
    texts = judge.clip_text(images)
    fits = [float(clip_t(features[one.sha256][None], text[None])[0]) for one, text in zip(images, texts, strict=True)]
    found = judge.findings(images)
    verdicts = [None if finding is None else finding.verdict(threshold) for finding in found]
    confused = by_combination([None if v is None else float(v.is_confused) for v in verdicts], combinations, order)
    known = confused[confused == confused]  # a NaN differs from itself
    return Candidate(
        scale=scale,
        confused=float(known.mean()) if len(known) else 1.0,
        confused_error=float(known.std(ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else 0.0,
        clip_t=float(by_combination(fits, combinations, order).mean()),
        tasks=len(images),
    )
