"""unselected: as many samples as the manifest has, whatever their score, and their features."""

from prefect import flow

from flows.experiment import paths_of, plan
from flows.stage import always, run_stage
from mip.config import Paths
from mip.data.parts import count_rows
from mip.evaluation.experiment import Plan
from tasks.features import encode_features
from tasks.manifest import build_manifest


@flow
def unselected(name: str, plan: Plan) -> int:
    """Build the manifest and encode it."""
    of_profile, own = Paths(plan.experiment.profile), paths_of("unselected")
    manifest = build_manifest(
        plan.unselected,
        index=of_profile.index,
        masks=of_profile.masks,
        samples=of_profile.samples,
        scores=of_profile.scores,
        out=own.manifest,
    )
    profile = plan.profile
    encode_features(
        profile.features, models=profile.models, manifest=manifest, out=own.features, work=own.work / "features"
    )
    return count_rows(manifest / "train.parquet") + count_rows(manifest / "val.parquet")


if __name__ == "__main__":
    run_stage(unselected, runs_torch=always, load=plan)
