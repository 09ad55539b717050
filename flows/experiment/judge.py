"""judge: all methods' images of a set, or of the layouts, become numbers: `python -m flows.experiment.judge PART`."""

import sys

from prefect import flow

from flows.experiment import paths_of, plan
from flows.stage import always, run_stage
from mip.data.parts import count_rows
from mip.evaluation.experiment import Plan
from mip.evaluation.judge import locate_tasks
from tasks.evaluate import evaluate_methods
from tasks.provenance import provenance


@flow
def judge(name: str, plan: Plan, part: str) -> int:
    """Judge the images of all methods."""
    paths, config, methods = paths_of(part), plan.profile.evaluate, plan.experiment.methods
    if part == "layouts":
        index = paths_of(plan.experiment.layouts.set).index
        source = index / "source"
        locate_tasks(source / "layouts", index, paths.index)
        config = config.model_copy(update={"calibration": (source / "calibration").as_posix()})
        methods = plan.experiment.layouts.methods
    tables = [paths.images / method / "images.parquet" for method in methods]
    evaluate_methods(
        config,
        index=paths.index,
        images=paths.images,
        methods=methods,
        judge_cache=paths.judge,
        metrics=paths.metrics,
        provenance=provenance(plan.profile, inputs=[paths.index / "tasks.parquet", *tables], beside=plan.experiment),
    )
    return sum(count_rows(table) for table in tables)


if __name__ == "__main__":
    run_stage(judge, *sys.argv[1:], runs_torch=always, load=plan)
