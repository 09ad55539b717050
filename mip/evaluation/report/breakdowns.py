"""Where confusion lies: by category, in two measures of other papers, and between which classes."""

from collections import Counter
from collections.abc import Sequence

from mip.config import Evaluate
from mip.evaluation.breakdown import by_category, category_of, worn_looks
from mip.evaluation.intervals import Interval
from mip.evaluation.report import findings
from mip.evaluation.report.inputs import ABSENT, Block, Inputs, number
from mip.tables import Row, read_rows

COLUMNS = (
    ("confused", "Confused", "↓"),
    ("presence", "Presence", "↑"),
    ("detect_and_compare", "D&C", "↑"),
    ("identity_margin", "ID margin", "↑"),
)
CLASSES = 12  # of the matrix; with more, those that are exchanged most
_EVERY = "every category"
_NOTE = (
    "Means over a category's combinations with their 95 % intervals; n is the tasks that confusion covers. "
    "D&C (detect and compare, of MuDI) is 1 less how far the likeness of the found objects to the references lies "
    "from that of the references among themselves (spectral norm), and 0 where the number of objects is wrong. "
    "ID margin (ID-Conf of UMO) is how far the second-best object of each reference lies behind its best one, 0 for "
    "a missing object. Both ignore labels: they see blends and wrong counts, and no swap."
)
_LOOKS = (
    "Rows: the class asked for. Columns: the class of the reference in the same task whose look its object wears most; "
    "the diagonal is right. Counts of objects, in the tasks that confusion covers."
)


def breakdown(inputs: Inputs, config: Evaluate) -> Block:
    """A table of categories and methods, and a matrix of classes for each of the two compared methods.

    Args:
        config: whose bootstrap is drawn.
    """
    path = inputs.paths.reports / "per_task.parquet"
    sources = [inputs.source("Breakdown", "evaluate", path)]
    rows = {(row["method"], row["task_id"]): row for row in read_rows(path, "per_task")}
    judged = [task for task in inputs.tasks if any(_is_judged(rows.get((m, task["task_id"]))) for m in inputs.methods)]
    if not judged:
        note = "There is nothing to break down: no task has two references of distinct classes."
        return {"rows": [], "columns": [], "matrices": [], "note": note, "looks": "", "sources": sources}
    body = []
    for method in inputs.methods:
        of_method = [rows.get((method, task["task_id"]), {}) for task in judged]
        body += _of_method(findings.short_name(method), of_method, judged, config)
    body.sort(key=lambda row: (row["category"] != _EVERY, row["category"]))  # stable: methods keep their order
    shown = [method for method in (findings.RIVAL, findings.SUBJECT) if method in inputs.methods] or inputs.methods[-1:]
    matrices = [_matrix(method, [(rows.get((method, t["task_id"])), t) for t in judged]) for method in shown]
    return {
        "rows": body,
        "columns": [f"{title} {arrow}" for _, title, arrow in COLUMNS],
        "matrices": [matrix for matrix in matrices if matrix["rows"]],
        "note": _NOTE,
        "looks": _LOOKS,
        "sources": sources,
    }


def _is_judged(row: Row | None) -> bool:
    return row is not None and row["confused"] is not None


def _of_method(name: str, rows: Sequence[Row], tasks: Sequence[Row], config: Evaluate) -> list[Block]:
    """One line for every category, and one for all of them where there are several."""
    groups = [tasks]
    if len({category_of(task) for task in tasks}) > 1:
        groups.append([{**task, "category": _EVERY} for task in tasks])
    lines = []
    for group in groups:
        found = {
            key: by_category([_value(row, key) for row in rows], group, count=config.bootstrap, seed=config.seed)
            for key, _, _ in COLUMNS
        }
        for category in found["confused"]:
            intervals = [found[key][category] for key, _, _ in COLUMNS]
            lines.append(
                {"category": category, "method": name, "n": intervals[0].n, "cells": [_cell(i) for i in intervals]}
            )
    return lines


def _cell(interval: Interval) -> Block:
    is_known = interval.low is not None
    reach = f"{number(interval.low)} to {number(interval.high)}" if is_known else ABSENT
    return {"value": number(interval.value), "interval": reach}


def _value(row: Row, key: str) -> float | None:
    value = row.get(key)
    return None if value is None else float(value)


def _matrix(method: str, judged: Sequence[tuple[Row | None, Row]]) -> Block:
    """How often a class wears the look of another, or is missing."""
    worn: Counter[tuple[str, str | None]] = Counter()
    for row, task in judged:
        if row is not None and row.get("similarity"):
            worn += worn_looks(row["similarity"], [reference["name"] for reference in task["references"]])
    classes = sorted({asked for asked, _ in worn})
    wrong = {name: sum(n for (a, b), n in worn.items() if a != b and name in (a, b)) for name in classes}
    shown = sorted(sorted(classes, key=lambda name: -wrong[name])[:CLASSES])
    lines = [
        {
            "asked": asked,
            "cells": [worn[asked, look] for look in shown],
            "others": sum(n for (a, b), n in worn.items() if a == asked and b is not None and b not in shown),
            "missing": worn[asked, None],
        }
        for asked in shown
    ]
    return {
        "title": findings.long_name(method),
        "classes": shown,
        "rows": lines,
        "has_others": len(shown) < len(classes),
        "note": f"The {len(shown)} of {len(classes)} classes that are missing or exchanged most."
        if len(shown) < len(classes)
        else "",
    }
