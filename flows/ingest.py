"""ingest: source -> index."""

from prefect import flow

from flows.stage import run_stage
from mip.config import Paths, Profile
from mip.data.parts import count_rows
from tasks.ingest import index_source


@flow
def ingest(name: str, profile: Profile) -> int:
    """Index the profile's source and benchmark."""
    paths = Paths(name)
    return count_rows(index_source(profile.ingest, out=paths.index, work=paths.work / "ingest"))


if __name__ == "__main__":
    run_stage(ingest)
