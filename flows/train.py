"""train: features -> adapter."""

from prefect import flow

from flows.stage import always, run_stage
from mip.config import Paths, Profile
from tasks.train import train_adapter


@flow
def train(name: str, profile: Profile) -> int:
    """Train the adapter."""
    paths = Paths(name)
    train_adapter(
        profile.train,
        models=profile.models,
        features=paths.features,
        out=paths.adapter,
        work=paths.work / "train",
    )
    return profile.train.steps * profile.train.batch


if __name__ == "__main__":
    run_stage(train, runs_torch=always)
