"""Models of SDXL's real size with random weights: what can be had of it where nothing can be downloaded."""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from mip.model.adapter import MIPAdapter
from mip.model.pipeline import MIPAdapterXLPipeline
from mip.model.projection import ImageProjection, Resampler, variant_named

CONTEXT_WIDTH = 2048  # 768 of the first text encoder and 1280 of the second
_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": CONTEXT_WIDTH,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
_TEXT: dict[str, dict[str, Any]] = {
    "first": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "second": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
    },
}
# OpenCLIP's ViT-bigG and ViT-H, which the two released adapters were trained with.
_VISION: dict[str, dict[str, Any]] = {
    "sdxl": {"hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48, "projection_dim": 1280},
    "sdxl_plus": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "projection_dim": 1024},
}


def unet() -> UNet2DConditionModel:
    """SDXL's UNet, on the default device and in the default precision."""
    return UNet2DConditionModel(**_UNET).eval().requires_grad_(False)


def projection(variant: str) -> nn.Module:
    """The image projection of the released adapter."""
    if variant == "sdxl":
        return ImageProjection(feature_width=1280, tokens=4, context_width=CONTEXT_WIDTH)
    return Resampler(
        feature_width=1280, tokens=16, context_width=CONTEXT_WIDTH, width=1280, depth=4, heads=20, ff_width=5120
    )


def adapter(variant: str, base: UNet2DConditionModel) -> MIPAdapter:
    """An adapter of the released shapes for this UNet, with its keys and values and a gate of zeros."""
    return MIPAdapter.fresh(base, projection=projection(variant), variant=variant_named(variant)).requires_grad_(False)


def pipeline(variant: str, tokenizer: CLIPTokenizer) -> MIPAdapterXLPipeline:
    """The whole pipeline without an adapter, on the default device and in the default precision."""
    shared: dict[str, Any] = {
        "vocab_size": 49408,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    first, second = (CLIPTextConfig(**shared, **_TEXT[which]) for which in ("first", "second"))
    vision = CLIPVisionConfig(num_attention_heads=16, image_size=224, patch_size=14, **_VISION[variant])
    return MIPAdapterXLPipeline(
        vae=AutoencoderKL(**_VAE).eval(),
        text_encoder=CLIPTextModel(first).eval(),
        text_encoder_2=CLIPTextModelWithProjection(second).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet(),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),  # pyright: ignore[reportArgumentType]
        image_encoder=CLIPVisionModelWithProjection(vision).eval(),
    )


def of_random_weights(
    variant: str, tokenizer: CLIPTokenizer, *, device: str, dtype: torch.dtype
) -> MIPAdapterXLPipeline:
    """The whole pipeline, made where it will run: no copy in float32 is needed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return pipeline(variant, tokenizer)
    finally:
        torch.set_default_dtype(before)
