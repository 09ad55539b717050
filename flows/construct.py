"""construct: masks + labels -> samples, one task a shard."""

from pathlib import Path

from prefect import flow, unmapped

from flows.shards import is_finished, missing_from, publish, work_folder
from flows.stage import run_stage
from mip.config import Paths, Profile
from mip.data.parts import count_rows, parts
from tasks.construct import construct_shard, finish_construct


@flow
def construct(name: str, profile: Profile) -> int:
    """Construct every shard's samples."""
    paths = Paths(name)
    shards = parts(paths.masks)
    work = work_folder(paths.work / "construct", config=profile.construct, inputs=[*parts(paths.index), *shards])
    if not is_finished(work):
        masks = missing_from(work, shards)
        construct_shard.map(
            config=unmapped(profile.construct),
            index_part=[paths.index / part.name for part in masks],
            masks_part=masks,
            labels_folder=unmapped(_labels(paths)),
            out=unmapped(work),
        ).result()
        finish_construct(index=paths.index, out=work)
    return count_rows(publish(work, out=paths.samples))


def _labels(paths: Paths) -> Path | None:
    """The labels that the source brings, if it does."""
    folder = paths.index / "source" / "labels"
    return folder if folder.is_dir() else None


def _labels_by_network(profile: Profile) -> bool:
    return profile.construct.labels.kind == "open_clip"


if __name__ == "__main__":
    run_stage(construct, runs_torch=_labels_by_network)
