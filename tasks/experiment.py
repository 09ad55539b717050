"""experiment: what all its parts found, in one place."""

from collections.abc import Mapping
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from mip.config import Evaluate, Paths
from mip.evaluation.report import experiment


@task(cache_policy=NO_CACHE)
def summarise(config: Evaluate, *, parts: Mapping[str, Paths], out: Path) -> Path:
    """Write the tables, the claims and the grid to `out`."""
    return experiment.summarise(config, parts=parts, out=out)
