"""A tiny world with random weights: judge networks, a pipeline on disk, a benchmark folder; nothing is downloaded."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from mip.config import Evaluate, Generate, Models
from mip.evaluation.benchmarks import read_concept101
from mip.tables import write_table
from tests.model.conftest import adapter_files, build_pipeline, tokenizer

__all__ = ["adapter_files", "build_pipeline", "tokenizer"]  # fixtures

CLASSES = ("background", "cat", "dog", "cup")
SIDE = 16  # pixels of generated images


def noise(seed: int, side: int = 24) -> Image.Image:
    """A random picture of few colours, so that regions and crops are not empty."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Folders of a ViT, a segmentation model and an open_clip model."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("networks")
    vit = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8
    )
    ViTModel(vit, add_pooling_layer=False).save_pretrained(root / "vit")
    ViTImageProcessorPil().save_pretrained(root / "vit")
    segformer = SegformerConfig(
        num_encoder_blocks=1,
        depths=[1],
        sr_ratios=[1],
        hidden_sizes=[8],
        patch_sizes=[3],
        strides=[2],
        num_attention_heads=[1],
        mlp_ratios=[1],
        decoder_hidden_size=8,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: number for number, name in enumerate(CLASSES)},
    )
    SegformerForSemanticSegmentation(segformer).save_pretrained(root / "segmenter")
    SegformerImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(root / "segmenter")
    _write_open_clip(root / "clip")
    return SimpleNamespace(vit=str(root / "vit"), segmenter=str(root / "segmenter"), clip=f"local-dir:{root / 'clip'}")


def _write_open_clip(folder: Path) -> None:
    import open_clip

    tower = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
    }
    model = open_clip.CLIP(**tower)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": tower, "preprocess_cfg": {}}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")


@pytest.fixture(scope="session")
def judge_config(networks: SimpleNamespace) -> Evaluate:
    """All judges of the tiny world; a threshold of 0 makes the segmenter see every class that wins anywhere."""
    return Evaluate.model_validate(
        {
            "clip": {"name": networks.clip, "pretrained": None, "batch": 4, "device": "cpu"},
            "dino": networks.vit,
            "detector": {"kind": "segmentation", "model": networks.segmenter, "threshold": 0.0, "min_area": 0.001},
            "appearance": networks.vit,
            "calibration": None,
            "leak_threshold": 0.1,
            "batch": 4,
            "bootstrap": 50,
            "device": "cpu",
            "seed": 5,
        }
    )


@pytest.fixture(scope="session")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Concept101 folder: two combinations of two concepts, two photos each, three prompts."""
    root = tmp_path_factory.mktemp("benchmark")
    pairs = [("cat", "pet_cat1", "dog", "pet_dog1"), ("dog", "pet_dog1", "cup", "things_cup1")]
    entries = [
        [
            {"class_prompt": a, "instance_data_dir": f"./benchmark_dataset/{first}"},
            {"class_prompt": b, "instance_data_dir": f"./benchmark_dataset/{second}"},
            {"prompt_filename_compose": "prompts/both.txt"},
        ]
        for a, first, b, second in pairs
    ]
    (root / "dataset_multiconcept.json").write_text(json.dumps(entries))
    (root / "prompts").mkdir()
    (root / "prompts" / "both.txt").write_text("a {0} and a {1}.\nthe {1} by the {0} \n\n{0}, {1}\n")
    for number, concept in enumerate(("pet_cat1", "pet_dog1", "things_cup1")):
        place = root / "benchmark_dataset" / concept
        place.mkdir(parents=True)
        for photo in range(2):
            noise(10 * number + photo).save(place / f"{photo}.png")
    (root / "json_data" / "pet_cat1").mkdir(parents=True)
    mask = [{"value": 0, "label": "background"}, {"value": 1, "label": "cat", "box": [0, 0, 400, 800]}]
    (root / "json_data" / "pet_cat1" / "0.json").write_text(json.dumps({"caption": "", "mask": mask}))
    return root


@pytest.fixture(scope="session")
def index(benchmark: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `ingest` would write of it."""
    out = tmp_path_factory.mktemp("index")
    for name, prompts in (("tasks", 2), ("validation_tasks", 1)):
        rows, _ = read_concept101(
            benchmark, variant="official", prompts_per_combination=prompts, combinations=None, seed=420
        )
        made_from = {"benchmark": "tiny", "variant": "official", "seed": "420"}
        write_table(out / f"{name}.parquet", "tasks", rows, made_from)
    return out


@pytest.fixture
def models(
    build_pipeline: Callable, adapter_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Models:
    """The tiny pipeline on disk, with a plain IP-Adapter."""
    root = tmp_path_factory.mktemp("base")
    pipe = build_pipeline()
    pipe.image_encoder.save_pretrained(root / "image_encoder")
    pipe.register_modules(image_encoder=None)
    pipe.save_pretrained(root / "pipeline")
    return Models.model_validate(
        {
            "variant": "sdxl",
            "base": str(root / "pipeline"),
            "image_encoder": str(root / "image_encoder"),
            "image_encoder_subfolder": "",
            "ip_adapter": str(adapter_files["plain"]),
            "ip_adapter_weight": None,
            "resolution": SIDE,
            "dtype": "float32",
            "device": "cpu",
        }
    )


@pytest.fixture(scope="session")
def generate_config() -> Generate:
    """Two steps, two scales, batches of three."""
    return Generate(
        steps=2, guidance=3.0, negative_prompt="", precision="no", scales=(0.5, 1.0), batch=3, processes=1, maps=2
    )
