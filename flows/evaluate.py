"""evaluate: images -> metrics."""

from prefect import flow

from flows.stage import always, run_stage
from mip.config import METHODS, Paths, Profile
from mip.data.parts import count_rows
from tasks.evaluate import evaluate_methods
from tasks.provenance import provenance


@flow
def evaluate(name: str, profile: Profile) -> int:
    """Judge the images of all methods."""
    paths = Paths(name)
    tables = [paths.images / method / "images.parquet" for method in METHODS]
    evaluate_methods(
        profile.evaluate,
        index=paths.index,
        images=paths.images,
        methods=METHODS,
        judge_cache=paths.judge,
        metrics=paths.metrics,
        provenance=provenance(profile, inputs=[paths.index / "tasks.parquet", *tables]),
    )
    return sum(count_rows(table) for table in tables)


if __name__ == "__main__":
    run_stage(evaluate, runs_torch=always)
