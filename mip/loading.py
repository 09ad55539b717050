"""From a profile's parameters to a pipeline that draws."""

from pathlib import Path

import torch

from mip.config import Models
from mip.errors import CheckpointError
from mip.evaluation.encoders import pick_device
from mip.model.pipeline import MIPAdapterXLPipeline


def load_pipeline(models: Models, *, adapter: Path | None, has_references: bool = True) -> MIPAdapterXLPipeline:
    """The base with an adapter, on its device.

    Args:
        models: names of the networks, dtype, device.
        adapter: file of our weights; None takes the plain IP-Adapter of `models`.
        has_references: False leaves adapter and image encoder out.

    Raises:
        CheckpointError: a network that cannot be had or does not fit.
    """
    try:
        pipe = MIPAdapterXLPipeline.from_pretrained(models.base, dtype=getattr(torch, models.dtype))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"got base {models.base!r}, which cannot be loaded: {reason}") from None
    assert isinstance(pipe, MIPAdapterXLPipeline)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(pick_device(models.device))
    if has_references:
        pipe.load_mip_adapter(
            models.ip_adapter if adapter is None else adapter,
            weight_name=models.ip_adapter_weight if adapter is None else None,
            image_encoder=models.image_encoder,
            image_encoder_subfolder=models.image_encoder_subfolder,
            variant=models.variant,
        )
    return pipe
