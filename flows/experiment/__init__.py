"""`make experiment`: stages outside the default graph, in experiment/dvc.yaml; what they share."""

from pathlib import Path

from flows.stage import PARAMETERS
from mip.config import Paths
from mip.evaluation.experiment import NAME, Plan, load_plan

_FILE = Path("experiment/params.yaml")


def plan() -> tuple[str, Plan]:
    """What `run_stage` hands to these flows."""
    return NAME, load_plan(PARAMETERS, _FILE)


def paths_of(part: str) -> Paths:
    """Where a set, or the control's samples, are: data/experiment/<part>, reports/experiment/<part>."""
    return Paths(f"{NAME}/{part}")


def adapter_of(method: str, plan: Plan) -> Path:
    """The adapter that a method draws with: a control's, or the profile's own."""
    if method in plan.experiment.controls:
        return paths_of("adapters").data / method
    return Paths(plan.experiment.profile).adapter
