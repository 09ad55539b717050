"""What training starts from: the frozen UNet and the adapter before its first step."""

from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from mip.config import Models, Train
from mip.model.adapter import MIPAdapter
from mip.model.checkpoint import AdapterCheckpoint, read_adapter
from mip.model.projection import load_projection
from mip.training.networks import base_weights


def load_unet(models: Models, *, precision: str) -> UNet2DConditionModel:
    """The base's UNet, frozen, without anything else of the pipeline."""
    base = base_weights(models)
    unet = UNet2DConditionModel.from_pretrained(
        base.name, revision=base.revision, subfolder="unet", torch_dtype=torch.float32
    )
    assert isinstance(unet, UNet2DConditionModel)
    unet.requires_grad_(False).eval()
    if precision != "no":
        # Autocast would cast these at every use: its cache holds only weights with a gradient. Norms stay in float32.
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        for module in unet.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(dtype)
    return unet


def start_adapter(file: Path, unet: UNet2DConditionModel, *, config: Train, models: Models) -> MIPAdapter:
    """The adapter before the first step, in float32; without a gate where none is trained.

    Raises:
        CheckpointError: a file that cannot be read, of another variant or for another base.
    """
    checkpoint = read_adapter(file, variant=models.variant)
    has_gate = config.gated and config.merge == "weighted"
    if config.start == "fresh":
        projection = load_projection(checkpoint.variant, checkpoint.image_proj)
        return MIPAdapter.fresh(unet, projection=projection, variant=checkpoint.variant, has_gate=has_gate)
    if not has_gate:
        layers = {key: tensor for key, tensor in checkpoint.layers.items() if ".text_to_weight." not in key}
        checkpoint = AdapterCheckpoint(checkpoint.image_proj, layers, checkpoint.metadata)
    return MIPAdapter.from_checkpoint(checkpoint, unet, adds_gate=has_gate)
