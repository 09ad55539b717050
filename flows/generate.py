"""generate: benchmark + adapter -> images of one method: `python -m flows.generate METHOD`."""

import sys

from prefect import flow

from flows.stage import always, run_stage
from mip.config import Paths, Profile
from mip.data.parts import count_rows
from tasks.generate import generate_images


@flow
def generate(name: str, profile: Profile, method: str) -> int:
    """Draw the benchmark with one method."""
    paths = Paths(name)
    out = paths.images / method
    generate_images(
        profile.generate,
        method=method,
        models=profile.models,
        judge=profile.evaluate,
        index=paths.index,
        adapter=paths.adapter,
        out=out,
        work=paths.work / "generate" / method,
    )
    return count_rows(out / "images.parquet")


if __name__ == "__main__":
    run_stage(generate, *sys.argv[1:], runs_torch=always)
