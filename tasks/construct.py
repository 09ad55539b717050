"""construct: masks and labels become samples."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from mip.config import Construct
from mip.data import samples


@task(cache_policy=NO_CACHE, task_run_name="construct-{index_part.stem}")
def construct_shard(
    config: Construct, *, index_part: Path, masks_part: Path, labels_folder: Path | None, out: Path
) -> Path:
    """Write the samples of one shard to `out`."""
    return samples.construct_shard(
        config, index_part=index_part, masks_part=masks_part, labels_folder=labels_folder, out=out
    )


@task(cache_policy=NO_CACHE)
def finish_construct(*, index: Path, out: Path) -> Path:
    """Join what was rejected and check that no image got lost."""
    return samples.finish(index=index, out=out)
