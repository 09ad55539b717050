"""benchmark: a set's tasks, `python -m flows.experiment.benchmark SET`."""

import sys

from prefect import flow

from flows.experiment import paths_of, plan
from flows.stage import run_stage
from mip.data.parts import count_rows
from mip.evaluation.experiment import Plan
from tasks.ingest import index_source


@flow
def benchmark(name: str, plan: Plan, part: str) -> int:
    """Index the set's benchmark."""
    paths = paths_of(part)
    return count_rows(index_source(plan.experiment.sets[part], out=paths.index, work=paths.work / "ingest"))


if __name__ == "__main__":
    run_stage(benchmark, *sys.argv[1:], load=plan)
