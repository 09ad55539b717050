"""manifest: the best samples become the training and validation manifests."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from mip.config import Manifest
from mip.data import manifest


@task(cache_policy=NO_CACHE)
def build_manifest(config: Manifest, *, index: Path, masks: Path, samples: Path, scores: Path, out: Path) -> Path:
    """Choose samples by their scores, away from the benchmark; write the manifests to `out`."""
    return manifest.build(config, index=index, masks=masks, samples=samples, scores=scores, out=out)
