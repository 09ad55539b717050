"""evaluate: images become numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from mip.config import Evaluate
from mip.evaluation import metrics as evaluation


@task(cache_policy=NO_CACHE)
def evaluate_methods(
    config: Evaluate,
    *,
    index: Path,
    images: Path,
    methods: Sequence[str],
    judge_cache: Path,
    metrics: Path,
    provenance: Mapping[str, Any],
) -> Path:
    """Judge all methods' images; write metrics.json to `metrics` and its tables beside it."""
    return evaluation.evaluate(
        config,
        index=index,
        images=images,
        methods=methods,
        judge_cache=judge_cache,
        metrics=metrics,
        provenance=provenance,
    )
