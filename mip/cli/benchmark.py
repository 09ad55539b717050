"""`mip benchmark check` and `mip benchmark tasks`: what is missing in a benchmark, and its table of tasks."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mip.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mip.evaluation.kinds import Kind

app = typer.Typer(no_args_is_help=True, help="Check benchmarks; turn one into a table of tasks.")

KindName = Annotated[
    Literal["concept101", "dreambooth", "dreambooth-pairs", "own"], typer.Argument(metavar="KIND", help="Which one.")
]
Place = Annotated[Path, typer.Argument(help="Its folder; for an own benchmark, the YAML or JSON file.")]
Variant = Annotated[
    Literal["official", "corrected"], typer.Option(help="Concept101: as published, or its known errors put right.")
]


@app.command()
def check(kind: KindName, path: Place, variant: Variant = "official") -> None:
    """List everything missing or wrong, one line a problem; exit code 1 if there is any, 2 for wrong use."""
    from mip.evaluation.kinds import BENCHMARKS, look, problems

    survey = look(_kind(kind), path, variant=variant)
    lines = problems(survey)
    for line in lines:
        print(line)
    for note in survey.notes:
        print(f"note: {note}")
    combinations = len({task["combination"] for task in survey.tasks})
    print(
        f"{path} ({kind}): {len(survey.tasks)} tasks of {combinations} combinations can be used; {len(lines)} problems"
    )
    if lines:
        print(f"This benchmark is {BENCHMARKS[_kind(kind)].published}.")
        raise typer.Exit(1)


@app.command()
def tasks(
    kind: KindName,
    path: Place,
    out: Annotated[Path, typer.Argument(help="Table to write, .parquet.")],
    variant: Variant = "official",
    seed: Annotated[int, typer.Option(help="One seed a task is derived from it.", min=0)] = 420,
    prompts: Annotated[int | None, typer.Option(help="The first ones of each combination; else all.", min=1)] = None,
    combinations: Annotated[int | None, typer.Option(help="The first ones; else all.", min=1)] = None,
) -> None:
    """Write the table of tasks that generation and evaluation read."""
    from mip.evaluation.kinds import read_benchmark
    from mip.tables import write_table

    if out.exists():
        raise ConfigError(f"got {out}, which exists; give another name")
    rows, dropped = read_benchmark(
        _kind(kind),
        path,
        variant=variant,
        prompts_per_combination=prompts or sys.maxsize,
        combinations=combinations,
        seed=seed,
    )
    if not rows:
        raise DataError(f"{path} gives no task that can be used; `mip benchmark check {kind} {path}` tells why")
    write_table(out, "tasks", rows, {"benchmark": kind, "variant": variant, "seed": str(seed)})
    lost = sum(row["unit"] == "task" for row in dropped)
    print(
        f"wrote {out}: {len(rows)} tasks of {len({row['combination'] for row in rows})} combinations, {lost} left out"
    )


def _kind(name: str) -> "Kind":
    from mip.evaluation.kinds import Kind

    return Kind(name)
