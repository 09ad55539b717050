"""layouts: one method draws where the layout is given, `python -m flows.experiment.layouts METHOD`."""

import sys

from prefect import flow

from flows.experiment import adapter_of, paths_of, plan
from flows.stage import always, run_stage
from mip.data.parts import count_rows
from mip.evaluation.experiment import Plan
from tasks.generate import generate_on_layouts

_LIKE = {"oracle": "mip"}  # draws with another method's adapter


@flow
def layouts(name: str, plan: Plan, method: str) -> int:
    """Choose the method's scale on the validation tasks' layouts and draw the others."""
    given = plan.experiment.layouts
    own = paths_of("layouts")
    out = generate_on_layouts(
        plan.experiment.generate,
        method=method,
        models=plan.profile.models,
        judge=plan.profile.evaluate,
        index=paths_of(given.set).index,
        level=given.level,
        adapter=adapter_of(_LIKE.get(method, method), plan),
        out=own.images / method,
        work=own.work / "draw" / method,
    )
    return count_rows(out / "images.parquet")


if __name__ == "__main__":
    run_stage(layouts, *sys.argv[1:], runs_torch=always, load=plan)
