"""features: the frozen encoders see every sample once."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from mip.config import Features, Models
from mip.training import features


@task(cache_policy=NO_CACHE)
def encode_features(config: Features, *, models: Models, manifest: Path, out: Path, work: Path) -> Path:
    """Write what the frozen encoders make of the manifest's samples to `out`."""
    return features.encode(config, models=models, manifest=manifest, out=out, work=work)
