"""What a complete run leaves: the adapter, its curve, its totals and its page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mip.config import Models, Train
from mip.model.adapter import MIPAdapter
from mip.model.checkpoint import save_adapter
from mip.tables import fingerprint, write_json, write_table
from mip.training.card import write_card
from mip.training.networks import image_encoder_weights
from mip.training.optimization import Average, in_place
from mip.training.progress import Progress


def write_results(
    out: Path,
    *,
    config: Train,
    models: Models,
    adapter: MIPAdapter,
    average: Average | None,
    progress: Progress,
    inputs: Mapping[str, str],
    features_from: Mapping[str, str],
    machine: Mapping[str, Any],
) -> None:
    """Write all files of `out`; see `mip.training.loop.train`.

    Args:
        out: folder; made if need be.
        config: what was trained.
        models: the frozen networks.
        adapter: its weights are those of the last step.
        average: their average, which then is the result.
        progress: the complete run.
        inputs: hashes of features, start and base.
        features_from: what the features were made from.
        machine: entries of training.json that say where it ran.
    """
    # Pictures have no influence on the weights: an adapter is the same file with and without them.
    decisive = config.model_dump(mode="json", exclude={"samples"})
    made_from = {**inputs, "parameters": fingerprint(config=decisive, models=models)}
    manifest, encoder = features_from["manifest"], (models.image_encoder, models.image_encoder_subfolder)
    metadata = {
        **made_from,
        "manifest": manifest,
        "base_model": models.base,
        "image_encoder": "/".join(filter(None, encoder)),
        "steps": str(config.steps),
        "merge": config.merge,
    }
    out.mkdir(parents=True, exist_ok=True)
    with in_place(average):
        save_adapter(out / "adapter.safetensors", adapter.checkpoint(metadata))
    (out / "adapter-raw.safetensors").unlink(missing_ok=True)
    if average is not None:
        save_adapter(out / "adapter-raw.safetensors", adapter.checkpoint(metadata))
    write_table(out / "curve.parquet", "curve", progress.curve, made_from)
    trained = sum(parameter.numel() for parameter in adapter.trainable_parameters())
    summary = {
        **progress.summary(batch=config.batch),
        **machine,
        "global_batch": config.batch,
        "trained_parameters": trained,
        "parameters": config.model_dump(mode="json"),
        "made_from": {**made_from, **features_from},
    }
    write_json(out / "training.json", summary)
    vision = image_encoder_weights(models).identity(models.image_encoder_subfolder)
    hashes = {**inputs, "manifest": manifest, "image_encoder": vision}
    write_card(out, config=config, models=models, progress=progress, trained=trained, hashes=hashes)
