"""layouts: one method draws where the layout is given, `python -m flows.experiment.layouts METHOD`."""

import json
import sys

from prefect import flow

from flows.experiment import adapter_of, paths_of, plan
from flows.stage import always, run_stage
from mip.data.parts import count_rows
from mip.evaluation.experiment import Plan
from tasks.generate import generate_on_layouts

_LIKE = {"oracle": "mip"}  # draws with another method's adapter and scale


@flow
def layouts(_: str, plan: Plan, method: str) -> int:
    """Draw the layouts at the scale that the method chose for their set."""
    given = plan.experiment.layouts
    paths, own = paths_of(given.set), paths_of("layouts")
    like = _LIKE.get(method, method)
    out = generate_on_layouts(
        plan.experiment.generate,
        method=method,
        models=plan.profile.models,
        layouts=paths.index / "source" / "layouts",
        level=given.level,
        scale=json.loads((paths.images / like / "scale.json").read_text())["scale"],
        adapter=adapter_of(like, plan),
        out=own.images / method,
        work=own.work / "draw" / method,
    )
    return count_rows(out / "images.parquet")


if __name__ == "__main__":
    run_stage(layouts, *sys.argv[1:], runs_torch=always, load=plan)
