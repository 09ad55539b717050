"""extract: index -> masks, one task a shard."""

from prefect import flow, unmapped

from flows.shards import is_finished, missing_from, publish, work_folder
from flows.stage import run_stage
from mip.config import Paths, Profile
from mip.data.parts import count_rows, parts
from tasks.extract import extract_shard, finish_extract


@flow
def extract(name: str, profile: Profile) -> int:
    """Extract every shard's masks."""
    paths = Paths(name)
    shards = parts(paths.index)
    work = work_folder(paths.work / "extract", config=profile.extract, inputs=shards)
    if not is_finished(work):
        extract_shard.map(
            config=unmapped(profile.extract), index_part=missing_from(work, shards), out=unmapped(work)
        ).result()
        finish_extract(index=paths.index, out=work)
    return count_rows(publish(work, out=paths.masks))


if __name__ == "__main__":
    run_stage(extract)
