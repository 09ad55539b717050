"""From images to numbers: the published metrics, confusion, and one metrics.json for all methods.

X images   R reference images   D embedding width   N references of a task   C combinations
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mip.config import Evaluate
from mip.errors import DataError
from mip.evaluation.confusion import Array, Verdict
from mip.evaluation.intervals import Floats, Integers, by_combination, draws, macro
from mip.evaluation.judge import Drawn, Finding, Judge, reference_photos
from mip.evaluation.localisation import localisation, map_iou
from mip.tables import Row, check_kind, file_hash, fingerprint, read_rows, write_json, write_table

SCHEMA_VERSION = 1
METRICS = (
    "clip_t",
    "clip_i",
    "dino",
    "presence",
    "swap_rate",
    "leak",
    "confused",
    "confused_present",
    "count_error",
    "localisation",
)
_CLIP_T_WEIGHT = 2.5  # of CLIPScore

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Judged:
    """All that is known of one image. Finding and verdict are None where two references have one class."""

    task: Row
    clip_t: float
    clip_i: float
    dino: float
    finding: Finding | None
    verdict: Verdict | None
    localisation: float | None
    map_iou: float | None

    @property
    def has_all(self) -> bool:
        """Whether every object of a task of distinct classes was found."""
        return self.verdict is not None and self.verdict.has_all

    @property
    def is_alone(self) -> bool:
        """Whether the task has one reference: presence and count say something of it, confusion does not."""
        return len(self.task["references"]) < 2


def clip_t(images_XD: Array, texts_XD: Array) -> Floats:
    """2.5 * max(cos, 0) of each image with its own text (X,); any lengths of the features."""
    cosines_X = (_normalised(images_XD) * _normalised(texts_XD)).sum(axis=-1)
    return _CLIP_T_WEIGHT * np.maximum(cosines_X, 0)


def reference_likeness(images_XD: Array, references: Sequence[Array]) -> Floats:
    """CLIP-I or DINO of each image and reference (X, N): mean cosine with all photos of the reference.

    It looks at the whole image, so that exchanging two identities in it changes nothing.
    """
    images_XD = _normalised(images_XD)
    return np.stack([(images_XD @ _normalised(photos_RD).T).mean(axis=1) for photos_RD in references], axis=1)


def evaluate(
    config: Evaluate,
    *,
    index: Path,
    images: Path,
    methods: Sequence[str],
    judge_cache: Path,
    metrics: Path,
    provenance: Mapping[str, Any],
) -> Path:
    """Judge the images of all methods: `metrics` (JSON), and beside it per_task.parquet and per_combination.parquet.

    Args:
        index: what `ingest` wrote.
        images: one folder a method, as `generate` wrote them.
        methods: in the order in which they are reported.
        judge_cache: kept from run to run, so that only images that are new are encoded.
        provenance: goes into the file; benchmark, variant and seed are taken from it where the index does not say them.

    Raises:
        DataError: an image is missing, or there is no way to know the leak threshold.
    """
    tasks = read_rows(index / "tasks.parquet", "tasks")
    if not tasks or not methods:
        raise DataError(
            f"got {len(tasks)} tasks in {index / 'tasks.parquet'} and {len(methods)} methods; give at least one of each"
        )
    judge = Judge(config, cache=judge_cache)
    threshold = judge.leak_threshold(index)
    judged = {
        method: judge_method(judge, drawn(tasks, images / method), threshold, images / method) for method in methods
    }
    order = sorted({task["combination"] for task in tasks})
    sampled = draws(len(order), count=config.bootstrap, seed=config.seed)
    values = {method: metric_values(judged, method) for method in methods}
    header = {**provenance, **check_kind(index / "tasks.parquet", "tasks")}
    content = {
        "schema_version": SCHEMA_VERSION,
        "benchmark": header.get("benchmark", "unknown"),
        "variant": header.get("variant", "official"),
        "seed": int(header.get("seed", config.seed)),
        "tasks": len(tasks),
        "combinations": len(order),
        "methods": {method: _summary(values[method], tasks, order, sampled) for method in methods},
        "provenance": {
            **{key: value for key, value in provenance.items() if key not in _HEADER},
            "judge": {
                **judge.versions(),
                "leak_threshold": threshold,
                "errors": judge.errors(index, threshold),
                "same_class_tasks": sum(one.verdict is None for one in judged[methods[0]]),
                "single_reference_tasks": sum(one.is_alone for one in judged[methods[0]]),
                "confused_present_against": {method: compared_with(method, methods) for method in methods},
            },
        },
    }
    made_from = {"stage": "evaluate", "params": fingerprint(config=config), "index": file_hash(index / "tasks.parquet")}
    folder = metrics.parent
    rows = [_task_row(method, one) for method in methods for one in judged[method]]
    write_table(folder / "per_task.parquet", "per_task", rows, made_from)
    write_table(
        folder / "per_combination.parquet", "per_combination", _combination_rows(values, tasks, order), made_from
    )
    _log.info("judged %d images of %d methods", len(rows), len(methods))
    return write_json(metrics, content)


_HEADER = ("benchmark", "variant", "seed")


def drawn(tasks: Sequence[Row], folder: Path) -> list[Drawn]:
    """The images of one method in the order of the tasks. Raises DataError unless there is one for every task."""
    rows = {row["task_id"]: row for row in read_rows(folder / "images.parquet", "images")}
    wanted = [task["task_id"] for task in tasks]
    if set(wanted) != set(rows):
        missing, stale = set(wanted) - set(rows), set(rows) - set(wanted)
        raise DataError(
            f"{folder} lacks images of {len(missing)} tasks and has {len(stale)} of others; run generate again"
        )
    return [Drawn(task, folder / rows[task["task_id"]]["path"], rows[task["task_id"]]["sha256"]) for task in tasks]


def judge_method(judge: Judge, images: Sequence[Drawn], threshold: float, folder: Path) -> list[Judged]:
    """Everything about the images of one method; relevance maps are read from `folder`/maps where they are."""
    openers = {one.sha256: one.open for one in images}
    photos = [[reference_photos(reference) for reference in one.task["references"]] for one in images]
    for of_task in photos:
        for of_reference in of_task:
            openers |= of_reference
    clip, dino = judge.clip_images(openers), judge.dino_images(openers)
    texts = judge.clip_text(images)
    judged = []
    for one, of_task, text_D, finding in zip(images, photos, texts, judge.findings(images), strict=True):
        likeness = [
            reference_likeness(
                known[one.sha256][None], [np.stack([known[key] for key in keys]) for keys in of_task]
            ).mean()
            for known in (clip, dino)
        ]
        located, overlap = _located(finding, folder / "maps" / f"{one.task['task_id']}.npz")
        judged.append(
            Judged(
                task=one.task,
                clip_t=float(clip_t(clip[one.sha256][None], text_D[None])[0]),
                clip_i=float(likeness[0]),
                dino=float(likeness[1]),
                finding=finding,
                verdict=None if finding is None else finding.verdict(threshold),
                localisation=located,
                map_iou=overlap,
            )
        )
    return judged


def compared_with(method: str, methods: Sequence[str]) -> str:
    """Whom `confused_present` compares a method with: `mip`, and `mip` itself with `ip_adapter_concat`.

    Where that one was not run, the first other method; a lone method with itself.
    """
    wanted = "ip_adapter_concat" if method == "mip" else "mip"
    others = [other for other in methods if other != method]
    return wanted if wanted in others else (others or [method])[0]


def metric_values(judged: Mapping[str, Sequence[Judged]], method: str) -> dict[str, list[float | None]]:
    """Each metric's value for every task of a method; None where the metric does not cover the task."""
    other = judged[compared_with(method, list(judged))]
    values: dict[str, list[float | None]] = {metric: [] for metric in METRICS}
    for one, opposite in zip(judged[method], other, strict=True):
        of_task: dict[str, float | None] = {metric: getattr(one, metric, None) for metric in METRICS}
        if (verdict := one.verdict) is not None:
            of_task |= {"presence": verdict.presence, "count_error": verdict.count_error}
        if verdict is not None and not one.is_alone:
            of_task |= {
                "swap_rate": float(verdict.is_swapped) if one.has_all else None,
                "leak": verdict.leak if one.has_all else None,
                "confused": float(verdict.is_confused),
                "confused_present": float(verdict.is_confused) if one.has_all and opposite.has_all else None,
            }
        for metric in METRICS:
            values[metric].append(of_task[metric])
    return values


def _summary(
    values: Mapping[str, Sequence[float | None]], tasks: Sequence[Row], order: Sequence[int], sampled: Integers
) -> Row:
    combinations = [task["combination"] for task in tasks]
    return {
        metric: asdict(macro(by_combination(of_tasks, combinations, order), sampled, n=_count(of_tasks)))
        for metric, of_tasks in values.items()
    }


def _combination_rows(
    values: Mapping[str, Mapping[str, Sequence[float | None]]], tasks: Sequence[Row], order: Sequence[int]
) -> list[Row]:
    combinations = [task["combination"] for task in tasks]
    categories = {task["combination"]: task["category"] for task in tasks}
    rows = []
    for method, of_method in values.items():
        for metric, of_tasks in of_method.items():
            means = by_combination(of_tasks, combinations, order)
            counts = [
                _count([v for v, c in zip(of_tasks, combinations, strict=True) if c == wanted]) for wanted in order
            ]
            for combination, mean, count in zip(order, means, counts, strict=True):
                value = None if np.isnan(mean) else float(mean)
                place = {"method": method, "combination": combination, "category": categories[combination]}
                rows.append({**place, "metric": metric, "value": value, "n": count})
    return rows


def _task_row(method: str, one: Judged) -> Row:
    row: Row = {"method": method, "task_id": one.task["task_id"], "combination": one.task["combination"]}
    row |= {metric: getattr(one, metric) for metric in ("clip_t", "clip_i", "dino", "localisation", "map_iou")}
    if one.verdict is None or one.finding is None:
        return row
    verdict, finding = one.verdict, one.finding
    if not one.is_alone:
        row |= {
            "swapped": verdict.is_swapped,
            "leak": verdict.leak,
            "leaked": verdict.is_leaked,
            "confused": verdict.is_confused,
            "detect_and_compare": finding.detect_and_compare,
            "identity_margin": finding.identity_margin,
        }
    return row | {
        "presence": verdict.presence,
        "count_error": verdict.count_error,
        "similarity": [[None if np.isnan(v) else float(v) for v in line] for line in finding.s_NN],
        "reference_similarity": finding.g_NN.tolist(),
        "detections": [
            {
                "label": detection.label,
                "score": detection.score,
                "box": list(detection.box),
                "reference": finding.matching.chosen.index(number) if number in finding.matching.chosen else None,
            }
            for number, detection in enumerate(finding.detections)
        ],
    }


def _located(finding: Finding | None, path: Path) -> tuple[float | None, float | None]:
    """Localisation and overlap of an image's relevance map with the masks of what was found in it.

    A lone reference is relevant everywhere, which says nothing.
    """
    if finding is None or len(finding.s_NN) < 2 or not path.exists() or (masks_NYX := finding.masks_NYX()) is None:
        return None, None
    with np.load(path, allow_pickle=False) as file:
        relevance_NHW: NDArray[np.float32] = file["relevance_NHW"]
    return localisation(relevance_NHW, masks_NYX), map_iou(relevance_NHW, masks_NYX)


def _count(values: Sequence[float | None]) -> int:
    return sum(value is not None for value in values)


def _normalised(features_XD: Array) -> Floats:
    features_XD = np.asarray(features_XD, dtype=np.float64)
    return features_XD / np.linalg.norm(features_XD, axis=-1, keepdims=True)
