"""Two runs side by side: the metrics that both have, and what else differs between them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mip.errors import SchemaError
from mip.evaluation.report import findings

_HEAD = ("benchmark", "variant", "seed", "tasks", "combinations")


@dataclass(frozen=True)
class Line:
    """A metric of one method in both runs; `overlaps` is None where an interval is missing."""

    method: str
    metric: str
    one: float | None
    other: float | None
    overlaps: bool | None

    @property
    def difference(self) -> float | None:
        """The second less the first."""
        return None if self.one is None or self.other is None else self.other - self.one


@dataclass(frozen=True)
class Comparison:
    """What two runs measured."""

    lines: tuple[Line, ...]
    differing: tuple[tuple[str, Any, Any], ...]  # where in metrics.json, and both values; None where it is not there
    only: tuple[tuple[str, ...], tuple[str, ...]]  # "method metric" that only the first has, only the second has


def compare(one: Path, other: Path) -> Comparison:
    """Compare two runs by their metrics.json, or the folders that hold it.

    Raises:
        DataError: there is no such file, or it is no JSON.
        SchemaError: it is another kind of file.
    """
    contents = tuple(_read(path) for path in (one, other))
    entries = tuple(
        {(method, metric): entry for method in findings.ordered([*c["methods"]]) for metric, entry in _of(c, method)}
        for c in contents
    )
    first, second = entries
    return Comparison(
        lines=tuple(_line(*key, first[key], second[key]) for key in first if key in second),
        differing=tuple(_differing(*(_settings(content) for content in contents))),
        only=(
            tuple(" ".join(key) for key in first if key not in second),
            tuple(" ".join(key) for key in second if key not in first),
        ),
    )


def _read(path: Path) -> dict[str, Any]:
    file = path / "metrics.json" if path.is_dir() else path
    content = findings.read_metrics(file)
    methods = content["methods"]
    is_whole = isinstance(content["provenance"], dict) and isinstance(methods, dict)
    if not is_whole or not all(map(_has_intervals, methods.values())):
        raise SchemaError(f"{file} has no metrics with their intervals by method; run `dvc repro evaluate`")
    return content


def _has_intervals(of_method: object) -> bool:
    entries = of_method.values() if isinstance(of_method, dict) else [None]
    return all(isinstance(entry, dict) and {"value", "low", "high"} <= entry.keys() for entry in entries)


def _of(content: Mapping[str, Any], method: str) -> list[tuple[str, Mapping[str, Any]]]:
    """A method's metrics in the order of reports, a user's own after them."""
    known = [metric.key for metric in findings.METRICS]
    found = content["methods"][method]
    return [(key, found[key]) for key in [*(k for k in known if k in found), *sorted(found.keys() - set(known))]]


def _line(method: str, metric: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> Line:
    is_known = None not in (one["low"], other["low"])
    overlaps = findings.intervals_overlap(one, other) if is_known else None
    return Line(method, metric, one["value"], other["value"], overlaps)


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """What the numbers were made from, one entry a value."""
    return {key: content[key] for key in _HEAD} | dict(_flat("", content["provenance"]))


def _flat(place: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(f"{place} {key}".strip(), part)
    else:
        yield place, value


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys([*one, *other]):
        if one.get(key) != other.get(key):
            yield key, one.get(key), other.get(key)
