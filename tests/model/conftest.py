"""Tiny random models with SDXL's shape, built from configuration; nothing is downloaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from mip.model.adapter import MIPAdapter
from mip.model.checkpoint import save_adapter
from mip.model.pipeline import MIPAdapterXLPipeline
from mip.model.projection import ImageProjection, Resampler, variant_named
from mip.model.references import References
from mip.model.request import Reference

CONTEXT_WIDTH = 12  # 4 of the first text encoder and 8 of the second
POOLED_WIDTH = 16
FEATURE_WIDTH = 6
TEXT_TOKENS = 77


def build_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 1,
        "attention_head_dim": (2, 4),
        "norm_num_groups": 4,
        "cross_attention_dim": CONTEXT_WIDTH,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + POOLED_WIDTH,
    }
    return UNet2DConditionModel(**(config | changes)).eval().requires_grad_(False)


def build_adapter(unet: UNet2DConditionModel, variant: str = "sdxl", *, has_gate: bool = True) -> MIPAdapter:
    """An adapter whose every weight matters: random keys, values and gate."""
    torch.manual_seed(1)
    if variant == "sdxl":
        projection = ImageProjection(feature_width=FEATURE_WIDTH, tokens=4, context_width=CONTEXT_WIDTH)
    else:
        projection = Resampler(
            feature_width=8, tokens=5, context_width=CONTEXT_WIDTH, width=8, depth=1, heads=1, ff_width=16
        )
    adapter = MIPAdapter.fresh(unet, projection=projection, variant=variant_named(variant), has_gate=has_gate)
    for parameter in adapter.trainable_parameters():
        torch.nn.init.normal_(parameter.data)
    return adapter.requires_grad_(False)


def build_references(counts: list[int], seed: int = 2, slots: int | None = None, **changes: Any) -> References:
    """Random references; row b has counts[b] of them and names of 1, 2, 3, ... tokens."""
    random = torch.Generator().manual_seed(seed)
    batch, slots = len(counts), slots or max(counts)
    number_N = torch.arange(slots)
    present_BN = number_N < torch.tensor(counts)[:, None]
    position_T = torch.arange(TEXT_TOKENS)
    words_NT = (position_T >= 1) & (position_T <= number_N[:, None] + 1)
    values: dict[str, Any] = {
        "image_BNRE": torch.randn(batch, slots, 4, CONTEXT_WIDTH, generator=random),
        "phrase_BNTE": torch.randn(batch, slots, TEXT_TOKENS, CONTEXT_WIDTH, generator=random),
        "words_BNT": words_NT & present_BN[..., None],
        "present_BN": present_BN,
        "scale_BN": torch.rand(batch, slots, generator=random) + 0.5,
    }
    return References(**(values | changes))


def predict(unet: UNet2DConditionModel, batch: int = 1, *, height: int = 8, width: int = 8, **kwargs: Any) -> Tensor:
    """The UNet's prediction for fixed random inputs; kwargs go to cross-attention."""
    random = torch.Generator().manual_seed(3)
    dtype = unet.dtype
    conditions = {
        "text_embeds": torch.randn(batch, POOLED_WIDTH, generator=random).to(dtype),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(batch, -1).to(dtype),
    }
    context_BTE = torch.randn(batch, TEXT_TOKENS, CONTEXT_WIDTH, generator=random).to(dtype)
    latents_B4HW = torch.randn(batch, 4, height, width, generator=random).to(dtype)
    return unet(
        latents_B4HW, 500, context_BTE, added_cond_kwargs=conditions, cross_attention_kwargs=kwargs or None
    ).sample


# The builders as fixtures, so that tests need no import from a conftest.
make_unet = pytest.fixture(scope="session", name="make_unet")(lambda: build_unet)
make_adapter = pytest.fixture(scope="session", name="make_adapter")(lambda: build_adapter)
make_references = pytest.fixture(scope="session", name="make_references")(lambda: build_references)
run_unet = pytest.fixture(scope="session", name="run_unet")(lambda: predict)
make_image_encoder = pytest.fixture(scope="session", name="make_image_encoder")(lambda: build_image_encoder)


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """A plain UNet."""
    return build_unet()


@pytest.fixture
def installed(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A UNet with an adapter in it."""
    build_adapter(unet).install(unet)
    return unet


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    """One token per letter, and one for the word "cat"."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [",", "."]
    words = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        "ca",
        "cat</w>",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TEXT_TOKENS)


def build_image_encoder(**changes: int) -> CLIPVisionModelWithProjection:
    torch.manual_seed(4)
    config: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
        "projection_dim": FEATURE_WIDTH,
    }
    config.update(changes)
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**config)).eval()


@pytest.fixture
def build_pipeline(tokenizer: CLIPTokenizer) -> Callable[[], MIPAdapterXLPipeline]:
    """A tiny pipeline without an adapter; the same weights every time."""

    def build() -> MIPAdapterXLPipeline:
        torch.manual_seed(5)
        shared = {
            "vocab_size": len(tokenizer),
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        vae_config: dict[str, Any] = {
            "block_out_channels": (4, 4),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": 4,
            "norm_num_groups": 2,
        }
        vae = AutoencoderKL(**vae_config)
        text_encoder = CLIPTextModel(CLIPTextConfig(hidden_size=4, **shared))
        text_encoder_2 = CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=8, projection_dim=POOLED_WIDTH, **shared)
        )
        pipe = MIPAdapterXLPipeline(
            vae=vae.eval(),
            text_encoder=text_encoder.eval(),
            text_encoder_2=text_encoder_2.eval(),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=build_unet(),
            scheduler=EulerDiscreteScheduler(),  # pyright: ignore[reportArgumentType]
            image_encoder=build_image_encoder(),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """Three different photos, the last of them not square."""
    random = torch.Generator().manual_seed(6)
    sizes = [(32, 32), (40, 40), (60, 30)]
    return [
        Image.frombytes("RGB", size, bytes(torch.randint(256, (size[0] * size[1] * 3,), generator=random).tolist()))
        for size in sizes
    ]


@pytest.fixture(scope="session")
def adapter_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapter files for the tiny UNet: both variants and a plain IP-Adapter."""
    folder = tmp_path_factory.mktemp("adapters")
    unet = build_unet()
    adapters = {
        "sdxl": build_adapter(unet),
        "sdxl_plus": build_adapter(unet, "sdxl_plus"),
        "plain": build_adapter(unet, has_gate=False),
    }
    for name, adapter in adapters.items():
        save_adapter(folder / f"{name}.safetensors", adapter.checkpoint())
    return {name: folder / f"{name}.safetensors" for name in adapters}


@pytest.fixture
def pipe(build_pipeline: Callable[[], MIPAdapterXLPipeline], adapter_files: dict[str, Path]) -> MIPAdapterXLPipeline:
    """A tiny pipeline with the adapter of the variant sdxl."""
    pipeline = build_pipeline()
    pipeline.load_mip_adapter(adapter_files["sdxl"])
    return pipeline


@pytest.fixture
def objects(photos: list[Image.Image]) -> list[Reference]:
    """A reference for each photo."""
    return [Reference(name, [photo]) for name, photo in zip(("cat", "dog", "red hat"), photos, strict=True)]
