"""manifest: samples + scores -> manifest."""

from prefect import flow

from flows.stage import run_stage
from mip.config import Paths, Profile
from mip.data.parts import count_rows
from tasks.manifest import build_manifest


@flow
def manifest(name: str, profile: Profile) -> int:
    """Build the training and validation manifests."""
    paths = Paths(name)
    out = build_manifest(
        profile.manifest,
        index=paths.index,
        masks=paths.masks,
        samples=paths.samples,
        scores=paths.scores,
        out=paths.manifest,
    )
    return count_rows(out / "train.parquet") + count_rows(out / "val.parquet")


if __name__ == "__main__":
    run_stage(manifest)
