"""`mip report compare`: two runs side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Compare the numbers of two runs.")

_RIGHT = ("one", "other", "other - one")  # columns of numbers


@app.command()
def compare(
    one: Annotated[Path, typer.Argument(help="metrics.json of a run, or the folder that holds it.")],
    other: Annotated[Path, typer.Argument(help="The same of another run.")],
) -> None:
    """Print every metric that both have, their difference, and what the runs were made from where that differs."""
    from mip.evaluation.comparison import compare as compared

    found = compared(one, other)
    said = {True: "yes", False: "no", None: "-"}
    rows = [
        (x.method, x.metric, _number(x.one), _number(x.other), _number(x.difference, "+.4f"), said[x.overlaps])
        for x in found.lines
    ]
    _print_table(("method", "metric", *_RIGHT, "intervals overlap"), rows)
    for path, names in zip((one, other), found.only, strict=True):
        if names:
            print(f"only in {path}: {', '.join(names)}")
    print()
    if found.differing:
        _print_table(("differs", "one", "other"), [(k, _plain(a), _plain(b)) for k, a, b in found.differing])
    else:
        print("Both were made from the same.")


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _plain(value: object) -> str:
    """One line that a terminal cannot be steered by."""
    return "".join(c if c.isprintable() else "?" for c in ("-" if value is None else str(value)))


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = [
            cell.rjust(width) if name in _RIGHT and "metric" in head else cell.ljust(width)
            for name, cell, width in zip(head, row, widths, strict=True)
        ]
        print("  ".join(cells).rstrip())
