"""A tiny world on disk: random networks of SDXL's shape, a few images with objects, and their manifest."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from mip.config import KINDS, Features, Models, Train
from mip.data.images import encode_mask, mask_area, mask_box
from mip.model.adapter import MIPAdapter
from mip.model.checkpoint import save_adapter
from mip.model.projection import ImageProjection, Resampler, variant_named
from mip.tables import Row, write_table
from mip.training.features import encode

RESOLUTION = 16
NAMES = ("cat", "dog", "hat", "cup")


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """accelerate keeps its settings for the life of a process."""
    torch.set_num_threads(1)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def tokenizer_folder(folder: Path) -> Path:
    """One token per letter, and one for the word "cat"."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    ends = ("ca", "cat</w>", "<|startoftext|>", "<|endoftext|>")
    words = [*letters, *(f"{letter}</w>" for letter in letters), *ends]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    CLIPTokenizer.from_pretrained(folder, model_max_length=77).save_pretrained(folder)
    return folder


def build_networks(folder: Path, variant: str) -> Models:
    """Write a base pipeline, an image encoder and a plain IP-Adapter."""
    torch.manual_seed(0)
    base = folder / "base"
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder(base / name))
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    CLIPTextModel(CLIPTextConfig(hidden_size=4, **text)).save_pretrained(base / "text_encoder")
    CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=8, projection_dim=16, **text)).save_pretrained(
        base / "text_encoder_2"
    )
    vae: dict[str, Any] = {
        "block_out_channels": (4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 2,
    }
    AutoencoderKL(**vae).save_pretrained(base / "vae")
    unet_config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
    }
    unet = UNet2DConditionModel(**unet_config)
    unet.save_pretrained(base / "unet")
    EulerDiscreteScheduler(beta_schedule="scaled_linear").save_pretrained(base / "scheduler")
    (base / "model_index.json").write_text("{}")
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        projection_dim=6,
    )
    CLIPVisionModelWithProjection(vision).save_pretrained(folder / "image_encoder")
    projection = (
        ImageProjection(feature_width=6, tokens=4, context_width=12)
        if variant == "sdxl"
        else Resampler(feature_width=8, tokens=5, context_width=12, width=8, depth=1, heads=1, ff_width=16)
    )
    plain = MIPAdapter.fresh(unet, projection=projection, variant=variant_named(variant), has_gate=False)
    save_adapter(folder / "ip_adapter.safetensors", plain.checkpoint())
    return Models.model_validate(
        {
            "variant": variant,
            "base": str(base),
            "image_encoder": str(folder / "image_encoder"),
            "image_encoder_subfolder": "",
            "ip_adapter": str(folder / "ip_adapter.safetensors"),
            "ip_adapter_weight": None,
            "resolution": RESOLUTION,
            "dtype": "float32",
            "device": "cpu",
        }
    )


def build_row(
    folder: Path, number: int, *, width: int = 30, height: int = 20, boxes: list[list[int]] | None = None
) -> Row:
    """A manifest row with its image: noise, and a rectangle per object."""
    rng = np.random.default_rng(number)
    boxes = boxes if boxes is not None else [[2, 3, 9, 12], [11, 5, 18, 15], [20, 1, 26, 9]][: 2 + number % 2]
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    objects = []
    for place, (x1, y1, x2, y2) in enumerate(boxes):
        mask = np.zeros((height, width), np.bool_)
        mask[y1:y2, x1:x2] = True
        pixels[mask] = rng.integers(0, 256, 3)
        rle = encode_mask(mask)
        shape = {"width": width, "height": height}
        objects.append(
            {
                "object_id": str(place),
                "label": NAMES[(number + place) % len(NAMES)],
                "logit": 0.9,
                "margin": None,
                "rle": rle,
                "box": mask_box(rle, **shape),
                "area": mask_area(rle, **shape),
            }
        )
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    path = folder / f"{number}.png"
    path.write_bytes(buffer.getvalue())
    return {
        "sample_id": f"s{number}",
        "image_id": f"s{number}",
        "shard": "0",
        "source": "test",
        "image_path": str(path),
        "image_offset": 0,
        "image_size": len(buffer.getvalue()),
        "annotation_path": str(path),
        "annotation_offset": 0,
        "annotation_size": 0,
        "width": width,
        "height": height,
        "caption": " and ".join(f"a {thing['label']}" for thing in objects),
        "objects": objects,
        "text_image": [],
        "image_image": [],
        "score": 0.0,
        "rank": number,
        "phash": "0",
        "weight": 1.0,
        "models": "",
    }


def write_manifest(folder: Path, train: list[Row], val: list[Row]) -> Path:
    """train.parquet and val.parquet."""
    write_table(folder / "train.parquet", "manifest", train, {})
    write_table(folder / "val.parquet", "manifest", val, {})
    return folder


def features_config(**changes: Any) -> Features:
    """Two augmentations of each sample."""
    values = {"cache": KINDS, "augmentations": 2, "flip": 0.5, "min_visible": 0.5, "batch": 3, "shard": 4, "seed": 11}
    return Features.model_validate(values | changes)


def train_config(**changes: Any) -> Train:
    """A few steps in full precision."""
    values: dict[str, Any] = {
        "start": "ip_adapter",
        "merge": "weighted",
        "gated": True,
        "steps": 6,
        "batch": 4,
        "micro_batch": 4,
        "learning_rate": 1e-3,
        "warm_up": 2,
        "schedule": "cosine",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "drop_image": 0.05,
        "drop_text": 0.05,
        "drop_both": 0.05,
        "timesteps": (0.0, 1.0),
        "precision": "no",
        "validation_every": 3,
        "validation_batches": 2,
        "samples": None,
        "checkpoint_every": 2,
        "keep_checkpoints": 2,
        "optimizer": "adamw",
        "snr_gamma": None,
        "noise_offset": 0.0,
        "ema": None,
        "gradient_checkpointing": False,
        "checkpoint_minutes": None,
        "on_bad_loss": "stop",
        "patience": 3,
        "trackers": (),
        "seed": 420,
    }
    return Train.model_validate(values | changes)


# The builders as fixtures, so that tests need no import from a conftest.
make_row = pytest.fixture(scope="session", name="make_row")(lambda: build_row)
make_manifest = pytest.fixture(scope="session", name="make_manifest")(lambda: write_manifest)
make_features_config = pytest.fixture(scope="session", name="make_features_config")(lambda: features_config)
make_train_config = pytest.fixture(scope="session", name="make_train_config")(lambda: train_config)


@pytest.fixture(scope="session", params=["sdxl", "sdxl_plus"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Both variants in turn."""
    return build_networks(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Seven samples of two and three objects in turn."""
    folder = tmp_path_factory.mktemp("images")
    return [build_row(folder, number) for number in range(7)]


@pytest.fixture(scope="session")
def features(models: Models, rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five training and two validation samples, encoded."""
    folder = tmp_path_factory.mktemp("features")
    manifest = write_manifest(folder / "manifest", rows[:5], rows[5:])
    return encode(features_config(), models=models, manifest=manifest, out=folder / "out", work=folder / "work")
