"""What the methods did: pictures, metrics, scales. Each function returns what the templates show."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from mip.errors import DataError
from mip.evaluation.report import figures, findings, pictures
from mip.evaluation.report.inputs import (
    ABSENT,
    SHOWN,
    Block,
    Chart,
    Inputs,
    Picture,
    Source,
    number,
    picture,
    read_json,
)
from mip.tables import Row

ARROWS = {findings.UP: "↑", findings.DOWN: "↓", None: ""}


def grid(inputs: Inputs, *, count: int) -> Block:
    """The first prompt of each of the first combinations by every method: a table of pictures, and figures/grid.png."""
    tasks = sorted(inputs.tasks, key=lambda task: (task["prompt_number"], task["combination"]))[:count]
    if not tasks:
        raise DataError(
            f"{inputs.paths.index / 'tasks.parquet'} has no task; check ingest.benchmark and ingest.combinations"
        )
    rows, sheet = [], []
    for task in tasks:
        references = inputs.references(task)
        images = [inputs.image(method, task["task_id"]) for method in inputs.methods]
        sheet.append(pictures.Row(task["prompt"], tuple(references), tuple(images), labels=()))
        shown = [
            picture(image, alt=alternative(method, task)) for method, image in zip(inputs.methods, images, strict=True)
        ]
        rows.append({"prompt": task["prompt"], "references": reference_pictures(references), "images": shown})
    headers = list(map(findings.long_name, inputs.methods))
    file = inputs.sheet("grid", sheet, headers=headers)
    sources = [inputs.source("Pictures", "ingest", inputs.paths.index / "tasks.parquet"), *_image_sources(inputs)]
    note = (
        "Not chosen: the first prompt of each combination, in the benchmark's order. A row has one seed for all "
        "methods; of each reference the first image is shown."
    )
    return {"rows": rows, "headers": headers, "sources": sources, "note": note, "file": file}


def _image_sources(inputs: Inputs) -> list[Source]:
    tables = [inputs.paths.images / method / "images.parquet" for method in inputs.methods]
    return [inputs.source("Pictures", f"generate@{table.parent.name}", table) for table in tables]


def reference_pictures(references: Sequence[tuple[str, Image.Image]]) -> list[Picture]:
    """References for the page, each above its name."""
    return [picture(image, alt=f"reference: {name}", label=name, side=SHOWN // 2) for name, image in references]


def alternative(method: str, task: Row) -> str:
    """What is read out in place of a generated image."""
    return f"{findings.short_name(method)}: {task['prompt']}"


def metrics(inputs: Inputs, content: Mapping[str, Any]) -> Block:
    """The table of methods and metrics."""
    rows = [
        {"metric": row.metric, "arrow": ARROWS[row.metric.better], "cells": row.values}
        for row in findings.table(content, inputs.methods)
    ]
    sources = [inputs.source("Metrics", "evaluate", inputs.paths.metrics)]
    return {
        "methods": list(map(findings.long_name, inputs.methods)),
        "rows": rows,
        "sources": sources,
        "note": _uncovered(content),
    }


def _uncovered(content: Mapping[str, Any]) -> str:
    """Which tasks confusion leaves out, and why."""
    judge = content["provenance"].get("judge") or {}
    reasons = {"same_class_tasks": "have two references of one class", "single_reference_tasks": "have one reference"}
    left_out = [f"{judge[key]} {reason}" for key, reason in reasons.items() if judge.get(key)]
    if not left_out:
        return ""
    return f"Of the {content['tasks']} tasks, {' and '.join(left_out)}: confusion does not cover them."


def charts(inputs: Inputs, content: Mapping[str, Any]) -> list[Chart]:
    """One chart a metric: points and intervals of every method."""
    drawn = []
    for metric in (metric for metric in findings.METRICS if metric.key in findings.CHARTED):
        entries = {name: content["methods"][name].get(metric.key) for name in inputs.methods}
        estimates = [
            figures.Estimate(findings.short_name(name), name, entry["value"], entry["low"], entry["high"])
            for name, entry in entries.items()
            if entry is not None
        ]
        if estimates:
            said = "; ".join(f"{e.label} {number(e.value)} ({number(e.low)} to {number(e.high)})" for e in estimates)
            draw = figures.intervals(estimates, methods=inputs.methods)
            note = f"{ARROWS[metric.better]} {metric.better}"
            drawn.append(
                inputs.chart(f"metric-{metric.key}", draw, title=metric.title, note=note, alt=f"{metric.title}: {said}")
            )
    return drawn


def scales(inputs: Inputs) -> Block:
    """Which scale each method uses, and how every scale that was tried did on the validation tasks."""
    found, sources, without = [], [], []
    for method in inputs.methods:
        path = inputs.paths.images / method / "scale.json"
        if path.exists():
            found.append((method, read_json(path)))
            sources.append(inputs.source("Scale", f"generate@{method}", path))
        else:
            without.append(findings.short_name(method))
    tried = sorted({one["scale"] for _, content in found for one in content["candidates"]})
    rows = []
    for method, content in found:
        by_scale = {one["scale"]: one for one in content["candidates"]}
        chosen = "none" if content["scale"] is None else f"{content['scale']:g}"
        cells = [_candidate(by_scale.get(scale), is_chosen=scale == content["scale"]) for scale in tried]
        rows.append({"method": findings.long_name(method), "chosen": chosen, "rule": content["rule"], "cells": cells})
    note = "Chosen for each method on the validation tasks, before the benchmark was looked at. ★ is the chosen one."
    if without:
        note += f" No choice is recorded for {', '.join(without)}."
    return {"rows": rows, "tried": [f"{scale:g}" for scale in tried], "sources": sources, "note": note}


def _candidate(one: Mapping[str, Any] | None, *, is_chosen: bool) -> Block:
    if one is None:
        return {"confused": ABSENT, "clip_t": "", "is_chosen": False}
    return {
        "confused": f"confused {one['confused']:.3f} ± {one['confused_error']:.3f}",
        "clip_t": f"CLIP-T {one['clip_t']:.3f}",
        "is_chosen": is_chosen,
    }
