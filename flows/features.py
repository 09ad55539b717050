"""features: manifest -> features."""

from prefect import flow

from flows.stage import always, run_stage
from mip.config import Paths, Profile
from mip.data.parts import count_rows
from tasks.features import encode_features


@flow
def features(name: str, profile: Profile) -> int:
    """Encode the manifest's samples."""
    paths = Paths(name)
    encode_features(
        profile.features,
        models=profile.models,
        manifest=paths.manifest,
        out=paths.features,
        work=paths.work / "features",
    )
    return count_rows(paths.manifest / "train.parquet") + count_rows(paths.manifest / "val.parquet")


if __name__ == "__main__":
    run_stage(features, runs_torch=always)
