"""Draws the benchmark with one method: one seed a task, whatever the batch; finished images are not drawn again."""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mip.config import Evaluate, Generate, Models
from mip.errors import ConfigError, DataError
from mip.evaluation.crew import Crew
from mip.evaluation.judge import Drawn, Judge
from mip.evaluation.layouts import Layouts
from mip.evaluation.methods import Method, method_named
from mip.evaluation.painting import Painter, image_path
from mip.evaluation.scales import RULE, candidate, choose
from mip.tables import Row, file_hash, fingerprint, read_rows, write_json, write_table

ADAPTER_FILE = "adapter.safetensors"

_log = logging.getLogger(__name__)


def generate(
    config: Generate,
    *,
    method: str,
    models: Models,
    judge: Evaluate,
    index: Path,
    adapter: Path,
    out: Path,
    work: Path,
) -> Path:
    """Draw all tasks of the benchmark with one method. Returns `out`.

    Writes <task_id>.png, images.parquet, scale.json and, where references are weighted, maps/<task_id>.npz of the first
    tasks (relevance_NHW float32 at latent size, mean over layers and steps; names).

    Args:
        judge: judges the validation tasks where there are several scales to choose from.
        index: what `ingest` wrote.
        adapter: our weights, or the folder of adapter.safetensors; read only by methods that use them.
        work: unfinished images; what is there from an equal run is not drawn again.

    Raises:
        ConfigError: an unknown method, one that needs layouts, or several scales and no validation tasks.
        CheckpointError: weights that cannot be had.
    """
    how = method_named(method)
    if how.oracle:
        raise ConfigError(f"got method {method!r}, which needs to know the layout; draw it on layouts")
    painter = Painter(config, name=method, method=how, models=models, weights=_weights(how, adapter))
    tasks = read_rows(index / "tasks.parquet", "tasks")
    validation = read_rows(index / "validation_tasks.parquet", "tasks")
    version = fingerprint(
        painter=painter.version, tasks=tasks, validation=validation, scales=config.scales, judge=judge
    )
    place = work / f"{method}-{version}"
    with Crew(config.processes) as crew:
        choice = _scale(config, crew, painter=painter, judge=judge, index=index, validation=validation, work=place)
        maps = config.maps if how.has_maps else 0
        crew.draw(painter, tasks, scale=choice["scale"], folder=place / "images", maps=maps)
    write_json(place / "images" / "scale.json", choice)
    return _finish(painter, tasks, scale=choice["scale"], place=place, out=out)


def generate_on_layouts(
    config: Generate,
    *,
    method: str,
    models: Models,
    judge: Evaluate,
    index: Path,
    level: int,
    adapter: Path,
    out: Path,
    work: Path,
) -> Path:
    """Draw the tasks whose layouts the benchmark's source brings, each from its scene noised to `level`. Returns `out`.

    Places and classes are then given: what a method does wrong is in the looks alone. Writes what `generate` writes,
    but for the maps; the scale is chosen on the validation tasks with their layouts.
    """
    how, weights = method_named(method), _weights(method_named(method), adapter)
    of_tasks, of_validation = (Layouts(index / "source" / name, level) for name in ("layouts", "layouts-validation"))
    painters = [
        Painter(config, name=method, method=how, models=models, weights=weights, layouts=layouts)
        for layouts in (of_tasks, of_validation)
    ]
    version = fingerprint(painters=[p.version for p in painters], scales=config.scales, judge=judge)
    place = work / f"{method}-{version}"
    with Crew(config.processes) as crew:
        known = of_validation.tasks
        choice = _scale(config, crew, painter=painters[1], judge=judge, index=index, validation=known, work=place)
        crew.draw(painters[0], of_tasks.tasks, scale=choice["scale"], folder=place / "images", maps=0)
    write_json(place / "images" / "scale.json", choice)
    return _finish(painters[0], of_tasks.tasks, scale=choice["scale"], place=place, out=out)


def _weights(method: Method, adapter: Path) -> Path | None:
    """Our adapter's file, for methods that use it."""
    if not method.is_trained:
        return None
    return adapter / ADAPTER_FILE if adapter.is_dir() else adapter


def _scale(
    config: Generate,
    crew: Crew,
    *,
    painter: Painter,
    judge: Evaluate,
    index: Path,
    validation: Sequence[Row],
    work: Path,
) -> dict[str, Any]:
    """The content of scale.json: the scale, and the figures of all that were tried."""
    if not painter.method.has_references:
        return {
            "method": painter.name,
            "scale": None,
            "rule": "a method without references has no scale",
            "candidates": [],
        }
    if not config.scales:
        raise ConfigError("got no scale in generate.scales; give one, or several to choose from")
    if len(config.scales) == 1:
        return {"method": painter.name, "scale": config.scales[0], "rule": "the only one given", "candidates": []}
    if not validation:
        raise ConfigError(
            f"got {len(config.scales)} scales and no validation tasks; give one scale, or set ingest.validation"
        )
    done = work / "scale.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    referee = Judge(judge, cache=work / "judge")
    threshold = referee.leak_threshold(index)
    candidates = []
    for scale in config.scales:
        folder = work / f"validation-{scale}"
        crew.draw(painter, validation, scale=scale, folder=folder, maps=0)
        images = [Drawn(task, path := image_path(folder, task), file_hash(path)) for task in validation]
        candidates.append(candidate(referee, images, scale=scale, threshold=threshold))
    best = choose(candidates)
    choice = {
        "method": painter.name,
        "scale": best.scale,
        "rule": RULE,
        "candidates": [asdict(one) for one in candidates],
    }
    write_json(done, choice)
    return choice


def _finish(painter: Painter, tasks: Sequence[Row], *, scale: float | None, place: Path, out: Path) -> Path:
    """Move what was drawn to `out`, with its table."""
    _publish(place / "images", out)
    rows = [_row(out, task, method=painter.name, scale=scale) for task in tasks]
    write_table(out / "images.parquet", "images", rows, {"stage": "generate", **painter.made_from})
    shutil.rmtree(place)
    _log.info("%s: %d images at scale %s", painter.name, len(rows), scale)
    return out


def _publish(made: Path, out: Path) -> None:
    """Link what was made into an empty `out`: a kill in between loses nothing."""
    shutil.rmtree(out, ignore_errors=True)
    for path in sorted(made.rglob("*")):
        place = out / path.relative_to(made)
        if path.is_dir():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, place)
        except OSError:  # another file system
            shutil.copy(path, place)


def _row(out: Path, task: Row, *, method: str, scale: float | None) -> Row:
    path = image_path(out, task)
    if not path.exists():
        raise DataError(f"there is no {path} though it was drawn; is another process at work in the same folder?")
    return {
        "task_id": task["task_id"],
        "method": method,
        "path": path.name,
        "sha256": file_hash(path),
        "seed": task["seed"],
        "scale": scale,
    }
