"""draw: one method draws a set, `python -m flows.experiment.draw SET METHOD`."""

import sys

from prefect import flow

from flows.experiment import adapter_of, paths_of, plan
from flows.stage import always, run_stage
from mip.data.parts import count_rows
from mip.evaluation.experiment import Plan
from tasks.generate import generate_images


@flow
def draw(name: str, plan: Plan, part: str, method: str) -> int:
    """Choose the method's scale on the set's validation tasks and draw the set."""
    paths = paths_of(part)
    out = generate_images(
        plan.experiment.generate,
        method=method,
        models=plan.profile.models,
        judge=plan.profile.evaluate,
        index=paths.index,
        adapter=adapter_of(method, plan),
        out=paths.images / method,
        work=paths.work / "draw" / method,
    )
    return count_rows(out / "images.parquet")


if __name__ == "__main__":
    run_stage(draw, *sys.argv[1:], runs_torch=always, load=plan)
