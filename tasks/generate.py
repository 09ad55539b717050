"""generate: the benchmark's prompts become images, by one method."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from mip.config import Evaluate, Generate, Models
from mip.evaluation import generation


@task(cache_policy=NO_CACHE, task_run_name="generate-{method}")
def generate_images(
    config: Generate,
    *,
    method: str,
    models: Models,
    judge: Evaluate,
    index: Path,
    adapter: Path,
    out: Path,
    work: Path,
) -> Path:
    """Choose the method's scale on the validation tasks and draw the benchmark's tasks with it."""
    return generation.generate(
        config, method=method, models=models, judge=judge, index=index, adapter=adapter, out=out, work=work
    )


@task(cache_policy=NO_CACHE, task_run_name="layouts-{method}")
def generate_on_layouts(
    config: Generate,
    *,
    method: str,
    models: Models,
    judge: Evaluate,
    index: Path,
    level: int,
    adapter: Path,
    out: Path,
    work: Path,
) -> Path:
    """Choose the method's scale and draw where the layout is given."""
    return generation.generate_on_layouts(
        config,
        method=method,
        models=models,
        judge=judge,
        index=index,
        level=level,
        adapter=adapter,
        out=out,
        work=work,
    )
