"""score: samples -> scores, one task a shard."""

from prefect import flow, unmapped

from flows.shards import is_finished, missing_from, publish, work_folder
from flows.stage import always, run_stage
from mip.config import Paths, Profile
from mip.data.parts import count_rows, parts
from tasks.score import finish_score, score_shard


@flow
def score(name: str, profile: Profile) -> int:
    """Score every shard's samples."""
    paths = Paths(name)
    shards = parts(paths.samples)
    work = work_folder(paths.work / "score", config=profile.score, inputs=shards)
    if not is_finished(work):
        score_shard.map(
            config=unmapped(profile.score), samples_part=missing_from(work, shards), out=unmapped(work)
        ).result()
        finish_score(samples=paths.samples, out=work)
    return count_rows(publish(work, out=paths.scores))


if __name__ == "__main__":
    run_stage(score, runs_torch=always)
