"""How the run was made: training, scores, what was left out, the paper's numbers beside it, times, provenance."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mip.config import STAGES, Manifest
from mip.errors import DataError
from mip.evaluation.report import figures, findings, pictures
from mip.evaluation.report.inputs import ABSENT, Block, Inputs, picture, plain, read_json
from mip.tables import Row, read_rows, read_table

_SHEET = 1600  # pixels; larger contact sheets are reduced for the page
_LOSING = (
    ("ingest", "index"),
    ("extract", "masks"),
    ("construct", "samples"),
    ("score", "scores"),
    ("manifest", "manifest"),
)


def training(inputs: Inputs) -> Block:
    """The adapter's loss over optimizer steps."""
    path = inputs.paths.adapter / "curve.parquet"
    sources = [inputs.source("Training", "train", path)]
    rows = [row for row in read_rows(path, "curve") if row["loss"] is not None]
    if not rows:
        raise DataError(f"{path} has no step with a loss; run `dvc repro train`")
    losses = [row["loss"] for row in rows]
    validation = [(row["step"], row["validation_loss"]) for row in rows if row["validation_loss"] is not None]
    smooth = figures.smoothed(losses)
    said = f"Smoothed training loss from {smooth[0]:.3f} to {smooth[-1]:.3f} in {rows[-1]['step']:,} steps."
    if validation:
        said += f" Validation loss from {validation[0][1]:.3f} to {validation[-1][1]:.3f}."
    draw = figures.curve([row["step"] for row in rows], losses, validation)
    return {"figure": inputs.chart("training", draw, title="Loss", note=said, alt=said), "sources": sources}


def scores(inputs: Inputs, config: Manifest) -> Block:
    """Histogram of the samples' scores, accepted and rejected."""
    sources = [inputs.source("Scores", "score", inputs.paths.scores)]
    everything = read_table(inputs.paths.scores, "scores", ["sample_id", "score"]).to_pydict()
    kept: set[str] = set()
    for split in ("train", "val"):
        path = inputs.paths.manifest / f"{split}.parquet"
        sources.append(inputs.source("Scores", "manifest", path))
        kept.update(read_table(path, "manifest", ["sample_id"]).to_pydict()["sample_id"])
    accepted, rejected = [], []
    for sample, score in zip(everything["sample_id"], everything["score"], strict=True):
        (accepted if sample in kept else rejected).append(score)
    if not accepted:
        return {"figure": None, "sources": sources, "note": "No sample was accepted."}
    name, threshold = (
        ("threshold", config.threshold) if config.threshold is not None else ("lowest accepted", min(accepted))
    )
    said = f"{len(accepted):,} samples accepted, {len(rejected):,} left out; {name} score {threshold:.3f}."
    draw = figures.histogram(accepted, rejected, threshold=threshold, name=name)
    note = (
        "Cosine of name and object less the likeness of the objects. "
        "A sample above the line can still be left out by another rule."
    )
    return {
        "figure": inputs.chart("scores", draw, title="Scores", note=said, alt=said),
        "sources": sources,
        "note": note,
    }


def funnel(inputs: Inputs) -> Block:
    """What came in, stayed and was left out at each stage, and the rows of every `rejected` table by reason."""
    path = inputs.paths.manifest / "funnel.json"
    sources = [inputs.source("Kept and left out", "manifest", path)]
    content = read_json(path)
    steps = [
        {
            "stage": step["stage"],
            "unit": step["unit"],
            "came": f"{step['came']:,}",
            "kept": f"{step['kept']:,}",
            "lost": f"{step['came'] - step['kept']:,}",
            "percent": _percent(step["kept"], step["came"]),
        }
        for step in content["stages"]
    ]
    reasons = []
    for stage, name in _LOSING:
        path = inputs.paths.data / name / "rejected.parquet"
        sources.append(inputs.source("Kept and left out", stage, path))
        reasons += _reasons(stage, read_rows(path, "rejected"))
    note = f"In the end {content['train']:,} samples train the adapter and {content['validation']:,} validate it."
    return {"steps": steps, "reasons": reasons, "sources": sources, "note": note}


def _reasons(stage: str, rows: Iterable[Row]) -> list[Block]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["unit"], row["reason"]), []).append(row)
    by_size = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        {
            "stage": stage,
            "unit": unit,
            "reason": reason.replace("_", " "),
            "count": f"{len(group):,}",
            "example": ": ".join(filter(None, (group[0]["id"], group[0]["detail"]))),
        }
        for (unit, reason), group in by_size
    ]


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}" if whole else "0"


def sheets(inputs: Inputs) -> Block:
    """Contact sheets of accepted and rejected samples, in the page and as copies in figures/."""
    shown, sources = [], []
    for name in ("accepted", "rejected"):
        path = inputs.paths.manifest / f"{name}.png"
        sources.append(inputs.source("Contact sheets", "manifest", path))
        image = pictures.reduced(pictures.load(path), _SHEET)
        pictures.save(image, inputs.figures / f"{name}.png")
        item = picture(image, alt=f"contact sheet of {name} samples", label=f"{name.capitalize()} samples", side=_SHEET)
        shown.append({**vars(item), "file": f"figures/{name}.png"})
    return {"images": shown, "sources": sources}


def paper(inputs: Inputs, content: Mapping[str, Any]) -> Block:
    """Table 1 of the paper, beside this run and marked as another world."""
    published = read_json(Path(__file__).with_name("paper_table1.json"))
    is_same = content["benchmark"].lower() == published["benchmark"].lower()
    own = [
        {
            "method": findings.long_name(name),
            "cells": [
                (content["methods"][name].get(key) or {"value": None})["value"] for key in ("clip_t", "clip_i", "dino")
            ],
        }
        for name in inputs.methods
    ]
    warning = (
        "These are the paper's published numbers, from its authors' machines. This run measured none of them."
        if is_same
        else f"Do not compare these numbers with the ones of this run: the paper measured SDXL on "
        f"{published['benchmark']}, this run measured another model on another benchmark ({content['benchmark']}) with "
        "other networks behind the same metric names."
    )
    title = "Published: Table 1 of the paper" if is_same else "Another world: Table 1 of the paper (SDXL, Concept101)"
    return {**published, "title": title, "warning": warning, "own": own, "own_benchmark": content["benchmark"]}


def times(folder: Path) -> list[Block]:
    """Wall clock, CPU seconds and rows of each stage's last run. The report's own would be that of an earlier one."""
    found = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        if path.stem != "report":
            found.append((path.stem, read_json(path)))
    found.sort(key=lambda item: (_order(item[0]), item[0]))
    longest = max((entry["wall_s"] for _, entry in found), default=0)
    rows = [_time(name, entry, longest) for name, entry in found]
    if rows:
        total = {key: sum(entry[key] for _, entry in found) for key in ("wall_s", "cpu_s")}
        rows.append({**_time("all together", {**total, "rows": None}, 0), "percent": None})
    return rows


def _time(name: str, entry: Mapping[str, Any], longest: float) -> Block:
    counted = entry.get("rows")
    return {
        "title": name,
        "wall": f"{entry['wall_s']:,.1f} s",
        "cpu": f"{entry['cpu_s']:,.1f} s",
        "rows": ABSENT if counted is None else f"{counted:,}",
        "percent": _percent(entry["wall_s"], longest),
    }


def _order(stem: str) -> int:
    stage = next((stage for stage in STAGES if stem.startswith(stage)), None)
    return STAGES.index(stage) if stage is not None else len(STAGES)


def provenance(inputs: Inputs, content: Mapping[str, Any], parameters: str) -> Block:
    """Code, parameters, packages and device of the evaluation, and every file that the page shows."""
    made = content["provenance"]
    names = {
        "git": "Git commit (+: changed since)",
        "params": "Parameters, hash",
        "packages": "Packages",
        "device": "Device",
    }
    facts = [(title, plain(made.get(key)) or "not known") for key, title in names.items()]
    for key, value in sorted(made.items()):
        if key not in {*names, "inputs"}:
            parts = value if isinstance(value, Mapping) else {"": value}
            facts += [(f"{key} {part}".replace("_", " ").strip(), plain(said)) for part, said in parts.items()]
    return {
        "facts": [(title.capitalize(), value) for title, value in facts],
        "files": list(inputs.files.values()),
        "inputs": sorted((made.get("inputs") or {}).items()),
        "parameters": parameters,
    }
