"""The report of a profile: report.md, a self-contained report.html and figures/, from the files of the other stages.

Everything is read and checked before the first file is replaced. Every block names the command, the file and the hash
behind it. No clock enters the files but in the block of times.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import jinja2

from mip.config import Paths, Profile, Report
from mip.evaluation.report import breakdowns, cases, findings, making, results
from mip.evaluation.report.inputs import Block, Inputs
from mip.tables import write_text

_CONTENTS = (
    ("pictures", "Pictures"),
    ("metrics", "Metrics"),
    ("scales", "Scale"),
    ("charts", "Intervals"),
    ("confusion", "Confusion"),
    ("breakdown", "By category"),
    ("relevance", "Relevance"),
    ("training", "Training"),
    ("scores", "Scores"),
    ("funnel", "Kept and left out"),
    ("sheets", "Contact sheets"),
    ("paper", "The paper"),
    ("times", "Time"),
    ("provenance", "Provenance"),
)


def write(config: Report, *, paths: Paths, profile: Profile) -> Path:
    """Write reports/<profile>/report.md, report.html and figures/*.png from what the other stages left.

    Returns the path of report.html.

    Optional, and said to be absent on the page: relevance maps, chosen scales, times. Everything else is required.

    Raises:
        DataError: a required file is missing, does not decode or is not what it should be.
    """
    content = findings.read_metrics(paths.metrics)
    drawn = paths.work / "report" / "figures"
    shutil.rmtree(drawn, ignore_errors=True)
    inputs = Inputs(paths, findings.ordered(list(content["methods"])), figures=drawn)
    page = _page(config, inputs=inputs, content=content, profile=profile)
    markdown, html = _render("report.md.jinja", page), _render("report.html.jinja", page)
    figures = paths.reports / "figures"
    shutil.rmtree(figures, ignore_errors=True)  # a chart that this run does not draw must not stay behind
    drawn.rename(figures)
    write_text(paths.reports / "report.md", markdown)
    return write_text(paths.reports / "report.html", html)


def _page(config: Report, *, inputs: Inputs, content: dict[str, Any], profile: Profile) -> Block:
    shown = {
        "contents": _CONTENTS,
        "page": _head(inputs, content),
        "grid": results.grid(inputs, count=config.tasks),
        "metrics": results.metrics(inputs, content),
        "scales": results.scales(inputs),
        "charts": results.charts(inputs, content),
        "cases": cases.confusion(inputs, worst=config.worst),
        "combinations": cases.combinations(inputs),
        "breakdown": breakdowns.breakdown(inputs, profile.evaluate),
        "relevance": cases.relevance(inputs),
        "training": making.training(inputs),
        "scores": making.scores(inputs, profile.manifest),
        "funnel": making.funnel(inputs),
        "sheets": making.sheets(inputs),
        "paper": making.paper(inputs, content),
        "times": making.times(inputs.paths.timings),
    }
    # Last, because it lists the files that the other blocks have shown.
    return {**shown, "provenance": making.provenance(inputs, content, profile.model_dump_json(indent=1))}


def _head(inputs: Inputs, content: dict[str, Any]) -> Block:
    subject, rival = findings.short_name(findings.SUBJECT), findings.short_name(findings.RIVAL)
    return {
        "title": f"Does a weighted merge of references prevent confusion? Profile {inputs.paths.profile}",
        "answer": findings.headline(content),
        "compared": f"“{subject}” against “{rival}”",
        "differences": findings.other_differences(content),
        "scope": f"Benchmark {content['benchmark']} ({content['variant']}): {content['tasks']} tasks in "
        f"{content['combinations']} combinations, bootstrap seed {content['seed']}, one image a task and method.",
        "timings": inputs.paths.timings.relative_to(inputs.root).as_posix(),
    }


def _render(template: str, page: Block) -> str:
    """Fill a template. HTML is escaped by jinja; in Markdown each value passes the filter `md`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html.jinja"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = _markdown
    return environment.get_template(template).render(page)


def _markdown(value: object) -> str:
    """Plain text inside Markdown: no markup, no table cell and no HTML can be opened by it."""
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~!])", r"\\\1", text)
