"""control: an adapter trained another way, `python -m flows.experiment.control METHOD`."""

import sys

from prefect import flow

from flows.experiment import adapter_of, paths_of, plan
from flows.stage import always, run_stage
from mip.config import Paths
from mip.evaluation.experiment import Plan
from tasks.train import train_adapter


@flow
def control(name: str, plan: Plan, method: str) -> int:
    """Train a control."""
    is_selected = plan.experiment.controls[method].is_selected
    samples = Paths(plan.experiment.profile) if is_selected else paths_of("unselected")
    config = plan.train(method)
    train_adapter(
        config,
        models=plan.profile.models,
        features=samples.features,
        out=adapter_of(method, plan),
        work=paths_of("adapters").work / method,
    )
    return config.steps * config.batch


if __name__ == "__main__":
    run_stage(control, *sys.argv[1:], runs_torch=always, load=plan)
