"""train: features become an adapter."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from mip.config import Models, Train
from mip.training import loop


@task(cache_policy=NO_CACHE)
def train_adapter(config: Train, *, models: Models, features: Path, out: Path, work: Path) -> Path:
    """Train the adapter, from the last state in `work` if there is one; write its weights and curve to `out`."""
    return loop.train(config, models=models, features=features, out=out, work=work)
