"""What metrics.json says, in words: names of methods and metrics, the headline, which value is best.

Two values differ only where their 95 % intervals do not overlap. Overlapping intervals are reported as an open
question, never as a win.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mip.errors import DataError, SchemaError

SCHEMA_VERSION = 1
SUBJECT, RIVAL = "mip", "ip_adapter_concat"
UP, DOWN = "higher is better", "lower is better"

# Short names fit beside a chart; long ones head a column.
_METHODS = {
    "base": ("Text only", "Text only, no references"),
    "ip_adapter_concat": ("IP-Adapter, side by side", "IP-Adapter, references side by side"),
    "ip_adapter_mean": ("IP-Adapter, averaged", "IP-Adapter, references averaged"),
    "training_free": ("Weighted merge, untrained", "Weighted merge, not trained"),
    "mip": ("Weighted merge, trained", "Weighted merge, trained (MIP)"),
    "ip_adapter_trained": ("IP-Adapter, trained alike", "IP-Adapter, side by side, trained as long"),
    "mip_unselected": ("Trained, unselected", "Weighted merge, trained on samples at random"),
    "oracle": ("Merge by true masks", "Weighted merge by the true masks"),
}


@dataclass(frozen=True)
class Metric:
    """How a metric is called, which way is better (None: unknown) and what it measures.

    Where methods are measured on different tasks (not `is_comparable`), no best one is marked.
    """

    key: str
    title: str
    better: str | None
    says: str
    is_comparable: bool = True


METRICS = (
    Metric("confused", "Confused", DOWN, "share of tasks with an object missing, swapped or leaking into another"),
    Metric(
        "confused_present",
        "Confused where all present",
        DOWN,
        "swapped or leaked, over the tasks in which both this method and the trained merge show every object (for the "
        "trained merge: it and IP-Adapter, side by side)",
        is_comparable=False,
    ),
    Metric("presence", "Presence", UP, "share of the references' objects that are found in the image"),
    Metric("clip_t", "CLIP-T", UP, "2.5 times the cosine of image and prompt; blind to swaps"),
    Metric("clip_i", "CLIP-I", UP, "cosine of image and reference images; blind to swaps"),
    Metric("dino", "DINO", UP, "the same in another embedding; blind to swaps"),
    Metric(
        "swap_rate",
        "Swap rate",
        DOWN,
        "objects wear each other's look, over the method's own tasks with every object present",
        is_comparable=False,
    ),
    Metric(
        "leak",
        "Leak",
        DOWN,
        "how much nearer an object is to a foreign reference than its own reference is, over the same tasks",
        is_comparable=False,
    ),
    Metric("count_error", "Count error", DOWN, "objects found beyond the wanted ones, for each reference"),
    Metric(
        "localisation",
        "Localisation",
        UP,
        "relevance of the own reference inside its object; chance is 1/N; tasks with maps only",
    ),
)
CHARTED = ("confused", "confused_present", "presence", "clip_t", "clip_i", "dino")


@dataclass(frozen=True)
class Value:
    """A metric of one method; None where nothing could be averaged. `overlaps`: its interval reaches the best one's."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    is_best: bool
    overlaps: bool


@dataclass(frozen=True)
class MetricRow:
    """One metric over all methods, in their order; None where a method does not have it."""

    metric: Metric
    values: tuple[Value | None, ...]


def read_metrics(path: Path) -> dict[str, Any]:
    """metrics.json, checked for its version and parts. Raises DataError or SchemaError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"there is no {path}; run `dvc repro evaluate`") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); run `dvc repro evaluate`") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise SchemaError(
            f"{path}: got schema_version {version!r}; expected {SCHEMA_VERSION}; run `dvc repro evaluate`"
        )
    missing = {"benchmark", "variant", "tasks", "combinations", "seed", "methods", "provenance"} - content.keys()
    if missing:
        raise SchemaError(f"{path} lacks {', '.join(sorted(missing))}; run `dvc repro evaluate`")
    return content


def ordered(methods: Sequence[str]) -> list[str]:
    """The project's methods in their usual order, a user's own after them."""
    known = [name for name in _METHODS if name in methods]
    return known + sorted(set(methods) - set(known))


def short_name(method: str) -> str:
    """A method in a few plain words; a user's own name as it is."""
    return _METHODS.get(method, (method, method))[0]


def long_name(method: str) -> str:
    """A method in plain words; a user's own name as it is."""
    return _METHODS.get(method, (method, method))[1]


def table(content: Mapping[str, Any], methods: Sequence[str]) -> list[MetricRow]:
    """All metrics over all methods; metrics this page does not know come last, without a best one."""
    known = {metric.key for metric in METRICS}
    found = {key for method in methods for key in content["methods"][method]}
    unknown = [Metric(key, key, None, "a metric of your own") for key in sorted(found - known)]
    rows = []
    for metric in (*(metric for metric in METRICS if metric.key in found), *unknown):
        rows.append(
            MetricRow(metric, _judged(metric, [content["methods"][method].get(metric.key) for method in methods]))
        )
    return rows


def _judged(metric: Metric, entries: Sequence[Mapping[str, Any] | None]) -> tuple[Value | None, ...]:
    numbers = [entry["value"] for entry in entries if entry is not None and entry["value"] is not None]
    has_best = len(set(numbers)) > 1 and metric.better is not None and metric.is_comparable
    best = (min if metric.better == DOWN else max)(numbers) if has_best else None
    tops = [entry for entry in entries if entry is not None and best is not None and entry["value"] == best]
    values: list[Value | None] = []
    for entry in entries:
        if entry is None:
            values.append(None)
            continue
        is_best = entry in tops
        near = not is_best and any(intervals_overlap(entry, top) for top in tops)
        values.append(Value(entry["value"], entry["low"], entry["high"], int(entry["n"]), is_best, near))
    return tuple(values)


def intervals_overlap(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two intervals share a point; False where one of them is missing."""
    return None not in (one["low"], other["low"]) and one["low"] <= other["high"] and other["low"] <= one["high"]


def headline(content: Mapping[str, Any]) -> str:
    """One sentence: does the trained merge confuse less than plain IP-Adapter, and do the intervals settle it?"""
    methods = content["methods"]
    absent = [name for name in (SUBJECT, RIVAL) if name not in methods]
    if absent:
        return f"This run does not answer the question: it has no images of {' and '.join(map(long_name, absent))}."
    for key, where in (("confused_present", "tasks in which both show every object"), ("confused", "tasks")):
        ours, theirs = methods[SUBJECT].get(key), methods[RIVAL].get(key)
        if ours and theirs and ours["value"] is not None and theirs["value"] is not None:
            return _compared(ours, theirs, where=where)
    return "This run does not answer the question: neither confusion metric has a value for both compared methods."


def _compared(ours: Mapping[str, Any], theirs: Mapping[str, Any], *, where: str) -> str:
    if intervals_overlap(ours, theirs):
        verdict = "the intervals overlap, so this run does not settle which confuses less"
    else:
        direction = "less" if ours["value"] < theirs["value"] else "more"
        verdict = f"{direction} confusion with the merge, and the intervals do not overlap"
    return (
        f"Over {ours['n']} {where}, the trained weighted merge confuses objects in {_share(ours)} and plain "
        f"IP-Adapter, with its references side by side, in {_share(theirs)}: {verdict}."
    )


def _share(entry: Mapping[str, Any]) -> str:
    return f"{100 * entry['value']:.0f} % (95 % interval {100 * entry['low']:.0f} to {100 * entry['high']:.0f} %)"


def other_differences(content: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """All metrics of the two compared methods, by what their intervals say: better, worse, undecided."""
    methods = content["methods"]
    if SUBJECT not in methods or RIVAL not in methods:
        return []
    groups: dict[str, list[str]] = {"clearly better": [], "clearly worse": [], "intervals overlap": []}
    for metric in METRICS:
        ours, theirs = methods[SUBJECT].get(metric.key), methods[RIVAL].get(metric.key)
        if not ours or not theirs or None in (ours["low"], theirs["low"]):
            continue
        wins = (ours["value"] > theirs["value"]) == (metric.better == UP)
        verdict = (
            "intervals overlap" if intervals_overlap(ours, theirs) else "clearly better" if wins else "clearly worse"
        )
        groups[verdict].append(metric.title)
    return [(verdict, titles) for verdict, titles in groups.items() if titles]
