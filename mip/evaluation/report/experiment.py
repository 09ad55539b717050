"""What the experiment found, as Markdown and JSON: tables of all methods, claims with their tests, a grid."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from mip.config import Evaluate, Paths
from mip.evaluation.benchmarks import load_reference
from mip.evaluation.claims import Claim, claims
from mip.evaluation.report import findings, pictures
from mip.evaluation.report.inputs import read_json
from mip.evaluation.report.results import ARROWS
from mip.tables import Row, read_rows, write_json, write_text

_SHOWN = ("presence", "confused", "swap_rate", "leak", "count_error", "clip_t", "clip_i", "dino", "localisation")
_CLAIMED = ("confused", "confused_present", "presence", "clip_t")
_TITLES = {
    "pairs": "Two objects",
    "triples": "Three objects",
    "layouts": "Two objects, the layout given",
}
_ROWS, _CELL = 8, 256  # of the grid


def summarise(config: Evaluate, *, parts: Mapping[str, Paths], out: Path) -> Path:
    """Write out/experiment.json, out/experiment.md and out/grid.png; returns the Markdown file.

    Args:
        config: its bootstrap and seed are used for the claims.
        parts: what `evaluate` judged, by name; "pairs" is the one that is pictured.
        out: the folder.

    Raises:
        DataError: a file of a part is missing or not what it should be.
    """
    contents = {name: findings.read_metrics(paths.metrics) for name, paths in parts.items()}
    for content in contents.values():
        methods = content["methods"]
        content["methods"] = {name: methods[name] for name in findings.ordered(list(methods))}
    made = {name: _claims(config, paths, contents[name]) for name, paths in parts.items()}
    _grid(parts["pairs"], list(contents["pairs"]["methods"]), out / "grid.png")
    write_json(
        out / "experiment.json",
        {
            "claims": {name: [claim.to_row() for claim in of_part] for name, of_part in made.items()},
            "metrics": {name: content["methods"] for name, content in contents.items()},
            "provenance": {name: content["provenance"] for name, content in contents.items()},
        },
    )
    blocks = [_block(name, paths, contents[name], made[name]) for name, paths in parts.items()]
    return write_text(out / "experiment.md", _template().render(blocks=blocks))


def _claims(config: Evaluate, paths: Paths, content: Mapping[str, Any]) -> list[Claim]:
    return claims(
        read_rows(paths.reports / "per_task.parquet", "per_task"),
        method=findings.SUBJECT,
        rivals=[name for name in content["methods"] if name not in (findings.SUBJECT, "base")],
        metrics=_CLAIMED,
        bootstrap=config.bootstrap,
        seed=config.seed,
    )


def _block(name: str, paths: Paths, content: Mapping[str, Any], made: Sequence[Claim]) -> Mapping[str, Any]:
    known = {metric.key: metric for metric in findings.METRICS}
    shown = [known[key] for key in _SHOWN]
    return {
        "title": _TITLES.get(name, name),
        "tasks": content["tasks"],
        "combinations": content["combinations"],
        "threshold": content["provenance"]["judge"]["leak_threshold"],
        "errors": content["provenance"]["judge"]["errors"],
        "headers": [f"{metric.title} {ARROWS[metric.better]}".strip() for metric in shown],
        "rows": [
            (findings.long_name(method), [_cell(values.get(metric.key)) for metric in shown])
            for method, values in content["methods"].items()
        ],
        "scales": [(findings.long_name(method), _scales(paths, method)) for method in content["methods"]],
        "claims": [_claim(claim, known[claim.metric].title) for claim in made],
    }


def _scales(paths: Paths, method: str) -> str:
    """Every scale that was tried with its confusion and CLIP-T on the validation tasks; the chosen one in bold."""
    choice = read_json(paths.images / method / "scale.json")
    tried = [
        (one["scale"], f"{one['scale']:g}: {one['confused']:.2f} ± {one['confused_error']:.2f}, {one['clip_t']:.2f}")
        for one in choice["candidates"]
    ]
    return "; ".join(f"**{words}**" if scale == choice["scale"] else words for scale, words in tried) or "none"


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry["value"] is None:
        return ""
    return f"{entry['value']:.2f} ({entry['low']:.2f} to {entry['high']:.2f})"


def _claim(claim: Claim, title: str) -> Mapping[str, str | int]:
    return {
        "rival": findings.short_name(claim.rival),
        "metric": title,
        "own": _cell(vars(claim.own)),
        "other": _cell(vars(claim.other)),
        "difference": _cell(vars(claim.difference)),
        "p": "" if claim.p_value is None else f"{claim.p_value:.4f}",
        "n": claim.own.n,
        "verdict": f"{claim.verdict}, apart" if claim.is_apart else claim.verdict,
    }


def _grid(paths: Paths, methods: Sequence[str], file: Path) -> None:
    """The first prompt of each of the first combinations, by every method."""
    tasks: list[Row] = sorted(
        read_rows(paths.index / "tasks.parquet", "tasks"), key=lambda task: (task["prompt_number"], task["combination"])
    )[:_ROWS]
    rows = []
    for task in tasks:
        references = tuple(
            (reference["name"], load_reference(Path(reference["images"][0]), (reference["boxes"] or [None])[0]))
            for reference in task["references"]
        )
        drawn = tuple(pictures.load(paths.images / method / f"{task['task_id']}.png") for method in methods)
        rows.append(pictures.Row(task["prompt"], references, drawn, labels=()))
    file.parent.mkdir(parents=True, exist_ok=True)
    pictures.save(pictures.grid(rows, headers=[findings.long_name(m) for m in methods], cell=_CELL), file)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("experiment.md.jinja")
