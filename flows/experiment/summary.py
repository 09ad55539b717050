"""summary: the experiment's tables, claims and pictures."""

from prefect import flow

from flows.experiment import paths_of, plan
from flows.stage import run_stage
from mip.config import Paths
from mip.evaluation.experiment import NAME, Plan
from tasks.experiment import summarise


@flow
def summary(name: str, plan: Plan) -> int:
    """Say what was found."""
    parts = {part: paths_of(part) for part in (*plan.experiment.sets, "layouts")}
    summarise(plan.profile.evaluate, parts=parts, out=Paths(NAME).reports / "summary")
    return len(parts)


if __name__ == "__main__":
    run_stage(summary, load=plan)
