"""score: samples get their object quality score."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from mip.config import Score
from mip.data import quality


@task(cache_policy=NO_CACHE, task_run_name="score-{samples_part.stem}")
def score_shard(config: Score, *, samples_part: Path, out: Path) -> Path:
    """Write the scores of one shard's samples to `out`."""
    return quality.score_shard(config, samples_part=samples_part, out=out)


@task(cache_policy=NO_CACHE)
def finish_score(*, samples: Path, out: Path) -> Path:
    """Join what was rejected and check that no sample got lost."""
    return quality.finish(samples=samples, out=out)
