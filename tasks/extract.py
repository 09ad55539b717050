"""extract: an index becomes masks."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from mip.config import Extract
from mip.data import masks


@task(cache_policy=NO_CACHE, task_run_name="extract-{index_part.stem}")
def extract_shard(config: Extract, *, index_part: Path, out: Path) -> Path:
    """Write the masks of one shard's images to `out`."""
    return masks.extract_shard(config, index_part=index_part, out=out)


@task(cache_policy=NO_CACHE)
def finish_extract(*, index: Path, out: Path) -> Path:
    """Join what was rejected and check that no image got lost."""
    return masks.finish(index=index, out=out)
