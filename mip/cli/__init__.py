"""The command line: `mip generate`, `inspect`, `convert`, `doctor`, `push`, `data`, `benchmark` and `report`."""

import sys
import warnings
from typing import Any

import typer

from mip.cli import benchmark, checkpoints, data, doctor, generate, push, report
from mip.errors import MipError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Several subjects in one picture, without mixing them up.",
)
app.command(name="generate")(generate.generate)
app.command(name="inspect")(checkpoints.inspect)
app.command(name="convert")(checkpoints.convert)
app.command(name="doctor")(doctor.doctor)
app.command(name="push")(push.push)
app.add_typer(data.app, name="data")
app.add_typer(benchmark.app, name="benchmark")
app.add_typer(report.app, name="report")


def main() -> None:
    """Run it; an error of ours is one line on stderr and exit code 2."""
    warnings.formatwarning = _line
    try:
        app()
    except MipError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _line(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"warning: {message}\n"
