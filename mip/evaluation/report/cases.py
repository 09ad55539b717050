"""Where confusion is: single cases, every combination, and where each reference acts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mip.errors import DataError
from mip.evaluation.report import findings, pictures
from mip.evaluation.report.inputs import ABSENT, SHOWN, Block, Inputs, picture
from mip.evaluation.report.results import ARROWS, alternative, reference_pictures
from mip.tables import Row, read_rows
from mip.visualize import overlay


def confusion(inputs: Inputs, *, worst: int) -> Block:
    """The subject's worst and best tasks by the judge, beside the rival's images; also as figures/confusion.png."""
    path = inputs.paths.reports / "per_task.parquet"
    sources = [
        inputs.source("Confusion", "evaluate", path),
        inputs.source("Confusion", "evaluate", _combination_table(inputs)),
    ]
    verdicts = {(row["method"], row["task_id"]): row for row in read_rows(path, "per_task")}
    subject = findings.SUBJECT if findings.SUBJECT in inputs.methods else inputs.methods[-1]
    shown = [name for name in (findings.RIVAL, subject) if name in inputs.methods]
    name = findings.long_name(subject)
    judged = [
        task
        for task in inputs.tasks
        if (row := verdicts.get((subject, task["task_id"]))) and row["confused"] is not None
    ]
    if not judged:
        return {
            "groups": [],
            "headers": [],
            "note": f"The judge has no verdict on any image of “{name}”.",
            "sources": sources,
        }
    by_badness = sorted(judged, key=lambda task: _badness(verdicts[subject, task["task_id"]]), reverse=True)
    bad = [task for task in by_badness if verdicts[subject, task["task_id"]]["confused"]]
    good = [task for task in reversed(by_badness) if not verdicts[subject, task["task_id"]]["confused"]]
    groups, sheet = [], []
    for title, tasks in (("Worst", bad[:worst]), ("Best", good[:worst])):
        cases = [_case(inputs, task, shown, verdicts) for task in tasks]
        groups.append({"title": f"{title} {len(tasks)} of “{name}”", "rows": [case for case, _ in cases]})
        sheet += [row for _, row in cases]
    note = (
        f"“{name}” is confused in {len(bad)} of {len(judged)} judged tasks. Ranked by how much is wrong (objects "
        "missing, swapped, leaking), then by leak. Under each image stands the judge's verdict, which can be wrong too."
    )
    headers = list(map(findings.long_name, shown))
    file = inputs.sheet("confusion", sheet, headers=headers)
    return {"groups": groups, "headers": headers, "note": note, "sources": sources, "file": file}


def _badness(row: Row) -> tuple[float, float]:
    wrong = (row["presence"] < 1) + bool(row["swapped"]) + bool(row["leaked"])
    return float(wrong), row["leak"] or 0.0


def _case(
    inputs: Inputs, task: Row, methods: Sequence[str], verdicts: Mapping[tuple[str, str], Row]
) -> tuple[Block, pictures.Row]:
    """A task for the page and for the sheet."""
    references = inputs.references(task)
    images = [inputs.image(method, task["task_id"]) for method in methods]
    said = [_verdict(verdicts.get((method, task["task_id"])), len(task["references"])) for method in methods]
    shown = [
        picture(image, alt=f"{alternative(method, task)}; {label}", label=label)
        for method, image, label in zip(methods, images, said, strict=True)
    ]
    case = {"prompt": task["prompt"], "references": reference_pictures(references), "images": shown}
    return case, pictures.Row(task["prompt"], tuple(references), tuple(images), tuple(said))


def _verdict(row: Row | None, objects: int) -> str:
    if row is None or row["confused"] is None:
        return "not judged"
    missing = objects - round(row["presence"] * objects)
    faults = [f"{missing} missing"] if missing else []
    faults += ["swapped"] if row["swapped"] else []
    faults += ["leaked"] if row["leaked"] else []
    leak = "" if row["leak"] is None else f", leak {row['leak']:.3f}"
    return (" and ".join(faults) if faults else "not confused") + leak


def combinations(inputs: Inputs) -> Block:
    """Every combination by every method: one row each, one column a metric."""
    rows = read_rows(_combination_table(inputs), "per_combination")
    keys = [metric for metric in findings.METRICS if metric.key in {row["metric"] for row in rows}]
    names = {task["combination"]: " + ".join(r["name"] for r in task["references"]) for task in inputs.tasks}
    merged: dict[tuple[int, str], dict[str, float | None]] = {}
    for row in rows:
        merged.setdefault((row["combination"], row["method"]), {})[row["metric"]] = row["value"]
    columns = [
        ("No.", True),
        ("Objects", False),
        ("Method", False),
        *((f"{m.title} {ARROWS[m.better]}", True) for m in keys),
    ]
    body = []
    for combination, method in sorted(merged, key=lambda key: (key[0], _place(inputs.methods, key[1]))):
        values = [merged[combination, method].get(metric.key) for metric in keys]
        body.append([combination, names.get(combination, "?"), findings.short_name(method), *values])
    return {
        "columns": [{"title": t, "is_number": n} for t, n in columns],
        "rows": [list(map(_cell, row)) for row in body],
    }


def _combination_table(inputs: Inputs) -> Path:
    return inputs.paths.reports / "per_combination.parquet"


def _place(methods: Sequence[str], method: str) -> int:
    return methods.index(method) if method in methods else len(methods)


def _cell(value: object) -> Block:
    if isinstance(value, str):
        return {"text": value, "key": value, "is_number": False}
    if value is None:
        return {"text": ABSENT, "key": "", "is_number": True}
    return {"text": f"{value:.3f}" if isinstance(value, float) else str(value), "key": repr(value), "is_number": True}


def relevance(inputs: Inputs) -> Block:
    """Relevance maps over the images they belong to, for every method that kept some; also as figures/relevance.png."""
    groups, sheet, sources = [], [], []
    for method in inputs.methods:
        rows = []
        for task in inputs.tasks:
            path = inputs.paths.images / method / "maps" / f"{task['task_id']}.npz"
            if path.exists():
                rows.append(_mapped(inputs, path, method, task))
                sources.append(inputs.source("Relevance", f"generate@{method}", path))
        if rows:
            groups.append({"title": findings.long_name(method), "rows": list(map(_relevance_row, rows))})
        sheet += rows
    if not groups:
        note = "No method kept relevance maps; set generate.maps to the number of tasks to keep them for."
        return {"groups": [], "sources": [], "note": note, "columns": 0}
    note = (
        "How much of the image prompt at each position comes from this reference: dark violet is 0, yellow is 1; over "
        "all references it sums to 1 everywhere, on the background too. Mean over layers and steps."
    )
    columns = max(len(row.images) for row in sheet) - 1
    file = inputs.sheet("relevance", sheet, headers=["Image", *(f"Reference {n + 1}" for n in range(columns))])
    return {"groups": groups, "sources": sources, "note": note, "columns": columns, "file": file}


def _relevance_row(row: pictures.Row) -> Block:
    image, *maps = row.images
    shown = [
        picture(overlaid, alt=f"relevance of the {name} reference", label=name)
        for name, overlaid in zip(row.labels[1:], maps, strict=True)
    ]
    prompt = row.prompt.partition(": ")[2]  # the page names the method above the table
    return {"prompt": prompt, "image": picture(image, alt=row.prompt), "maps": shown}


def _mapped(inputs: Inputs, path: Path, method: str, task: Row) -> pictures.Row:
    try:
        with np.load(path, allow_pickle=False) as file:
            relevance_NHW, names = file["relevance_NHW"], [str(name) for name in file["names"]]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is no relevance map ({error}); run `dvc repro generate@{method}`") from None
    if relevance_NHW.ndim != 3 or len(relevance_NHW) != len(names):
        raise DataError(
            f"{path}: got maps of shape {relevance_NHW.shape} for {len(names)} names; expected one H x W map a name"
        )
    image = pictures.fit(inputs.image(method, task["task_id"]), SHOWN)
    maps = [overlay(image, map_HW) for map_HW in relevance_NHW]
    return pictures.Row(f"{findings.long_name(method)}: {task['prompt']}", (), (image, *maps), ("", *names))
