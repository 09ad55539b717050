"""Small shards made on the spot, and a tiny open_clip model with random weights."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mip.config import Construct, Extract, Manifest, Score
from mip.data import masks
from mip.data.images import encode_mask
from mip.data.indexing import Shard, index_tar
from mip.data.parts import PartWriter
from mip.tables import Row, write_table

SIDE = 64
EXTRACT: dict[str, Any] = {"max_annotations": 20, "max_pixels": 10_000, "min_area": 4}
RULES: dict[str, Any] = {
    "min_box_area": 0.02,
    "max_box_area": 0.7,
    "min_aspect": 0.3,
    "max_aspect": 3.0,
    "min_logit": 0.3,
    "min_fill": 0.3,
    "max_containment": 0.8,
    "max_masks_in_box": 3,
    "label_in_caption": True,
}
CONSTRUCT: dict[str, Any] = {
    "labels": {"kind": "given", "path": None},
    "rules": RULES,
    "min_objects": 2,
    "max_objects": 3,
    "distinct_names": True,
}
MANIFEST: dict[str, Any] = {
    "threshold": None,
    "top_k": None,
    "order": "score",
    "max_per_class_pair": None,
    "duplicate_distance": 0,
    "leak_distance": 0,
    "validation_share": 0.0,
    "sheet": 8,
    "seed": 7,
}


def jpeg(seed: int = 0, *, size: tuple[int, int] = (SIDE, SIDE)) -> bytes:
    """A coarse random picture: pictures of different seeds look different."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def rle(box: Sequence[int], *, size: tuple[int, int] = (SIDE, SIDE)) -> str:
    """A filled rectangle x1, y1, x2, y2."""
    mask = np.zeros((size[1], size[0]), np.bool_)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return encode_mask(mask)


def annotation(identity: Any, box: Sequence[int] = (4, 4, 24, 24), **changes: Any) -> dict[str, Any]:
    """An SA-1B annotation."""
    return {
        "id": identity,
        "segmentation": {"size": [SIDE, SIDE], "counts": rle(box)},
        "bbox": [0, 0, 1, 1],
        "area": 1,
        "predicted_iou": 0.9,
        "stability_score": 0.95,
        **changes,
    }


def sa1b_json(annotations: Sequence[Any] | None = None, *, width: Any = SIDE, height: Any = SIDE) -> bytes:
    """An SA-1B annotation file."""
    listed = [annotation(1), annotation(2, (34, 34, 58, 58))] if annotations is None else list(annotations)
    image = {"image_id": 1, "width": width, "height": height, "file_name": "x.jpg"}
    return json.dumps({"image": image, "annotations": listed}).encode()


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    """A tar with these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def pair(stem: str, *, seed: int = 0, **changes: bytes) -> dict[str, bytes]:
    """An image and its annotation; `image=` or `annotation=` replaces one."""
    image, text = changes.get("image", jpeg(seed)), changes.get("annotation", sa1b_json())
    return {f"{stem}.jpg": image, f"{stem}.json": text}


def reasons(rows: Sequence[Row], unit: str | None = None) -> list[str]:
    """The reasons of rejected rows, in order."""
    return [str(row["reason"]) for row in rows if unit is None or row["unit"] == unit]


@dataclass(frozen=True)
class Kit:
    """Everything above under one name, for tests that pytest imports apart from one another."""

    jpeg = staticmethod(jpeg)
    rle = staticmethod(rle)
    annotation = staticmethod(annotation)
    sa1b_json = staticmethod(sa1b_json)
    write_tar = staticmethod(write_tar)
    pair = staticmethod(pair)
    reasons = staticmethod(reasons)
    side = SIDE

    @staticmethod
    def extract(**changes: Any) -> Extract:
        return Extract.model_validate(EXTRACT | changes)

    @staticmethod
    def construct(*, rules: Mapping[str, Any] | None = None, **changes: Any) -> Construct:
        return Construct.model_validate(CONSTRUCT | {"rules": RULES | dict(rules or {})} | changes)

    @staticmethod
    def manifest(**changes: Any) -> Manifest:
        return Manifest.model_validate(MANIFEST | changes)

    @staticmethod
    def score(folder: Path, **changes: Any) -> Score:
        model = {"name": f"local-dir:{folder}", "pretrained": None, "batch": 3, "device": "cpu"}
        return Score.model_validate({"model": model, "template": "{}", "weight": 1.0} | changes)

    @staticmethod
    def index(root: Path, files: Mapping[str, bytes], *, shard: str = "sa_0") -> Path:
        """The part of an index with one shard."""
        path = write_tar(root / f"{shard}.tar", files)
        found = index_tar(Shard(shard, (path,)), source="sa1b")
        with PartWriter(root / "index", shard=shard, kind="index", made_from={}) as part:
            part.keep(found.rows)
            part.reject(found.rejected)
        return root / "index" / f"part-{shard}.parquet"

    @classmethod
    def masks(cls, root: Path, files: Mapping[str, bytes], **changes: Any) -> tuple[Path, Path]:
        """The index and masks parts of one shard."""
        index_part = cls.index(root, files)
        return index_part, masks.extract_shard(cls.extract(**changes), index_part=index_part, out=root / "masks")

    @staticmethod
    def labels(folder: Path, lines: Sequence[Any], *, shard: str = "sa_0") -> Path:
        """A folder with one label file; strings are written as they are."""
        folder.mkdir(parents=True, exist_ok=True)
        text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (folder / f"{shard}.labels.jsonl").write_text("\n".join(text) + "\n")
        return folder

    @staticmethod
    def tasks(folder: Path, images: Sequence[Path] = ()) -> Path:
        """A benchmark with one task of these reference images."""
        paths: list[str] = [str(path) for path in images]
        reference = {"name": "cat", "concept": "pet_cat1", "images": paths, "boxes": [[] for _ in paths]}
        task = {
            "task_id": "0-0",
            "combination": 0,
            "prompt_number": 0,
            "prompt": "a cat",
            "category": "pet",
            "seed": 1,
            "references": [reference],
        }
        write_table(folder / "tasks.parquet", "tasks", [task], {})
        return write_table(folder / "validation_tasks.parquet", "tasks", [], {})


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny open_clip model in a local folder, with a tokenizer of its own."""
    import open_clip
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("open_clip")
    words = ["<pad>", "<unk>", "<start>", "a", "photo", "of", "ball", "star", "cat", "dog", "cup", "<end>"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", len(words) - 1)]
    )
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<start>", "eos_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": len(words), "width": 32, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)  # pyright: ignore[reportArgumentType]
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text | {"hf_tokenizer_name": "local"}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return folder
