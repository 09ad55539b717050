"""The same two pictures in every format that a user may bring: a red and a green rectangle, a blue and a white one."""

import csv
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mip.data.images import encode_mask

SIZE = (64, 48)  # width, height
BOXES = {  # of the first and second object of each picture
    "a": ((4, 4, 28, 40), (34, 6, 60, 44)),
    "b": ((2, 10, 30, 46), (36, 2, 62, 30)),
}
LABELS = {"a": ("ball", "cup"), "b": ("star", "fish")}
CAPTIONS = {"a": "a ball and a cup", "b": "a star and a fish"}
COLOURS = {"a": ("red", "lime"), "b": ("blue", "white")}


def picture(name: str) -> Image.Image:
    """The picture."""
    image = Image.new("RGB", SIZE, "gray")
    for box, colour in zip(BOXES[name], COLOURS[name], strict=True):
        image.paste(colour, box)
    return image


def mask(name: str) -> np.ndarray:
    """Levels 0, 1 and 2."""
    levels = np.zeros(SIZE[::-1], np.uint8)
    for level, (x1, y1, x2, y2) in enumerate(BOXES[name], start=1):
        levels[y1:y2, x1:x2] = level
    return levels


def rle(name: str, place: int) -> str:
    """The compressed counts of an object."""
    return encode_mask(mask(name) == place + 1)


def polygon(name: str, place: int) -> list[float]:
    """The corners of an object."""
    x1, y1, x2, y2 = BOXES[name][place]
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def save_mask(levels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels).save(path)


def own_rows() -> list[dict[str, Any]]:
    """One row an object; of picture a by mask file, of picture b by run lengths and by polygon."""
    a, b = ({"image": f"{name}.png", "caption": CAPTIONS[name]} for name in "ab")
    return [
        a | {"label": "ball", "mask": "a.png", "value": 1, "box": list(BOXES["a"][0]), "score": 0.9},
        a | {"label": "cup", "mask": "a.png", "value": 2, "score": 0.8},
        b | {"label": "star", "rle": rle("b", 0)},
        b | {"label": "fish", "polygon": [polygon("b", 1)], "score": 0.7},
    ]


def write_own(folder: Path, rows: list[dict[str, Any]] | None = None, *, table: str = "metadata.jsonl") -> Path:
    """An own folder with this table."""
    (folder / "images").mkdir(parents=True)
    for name in "ab":
        picture(name).save(folder / "images" / f"{name}.png")
    save_mask(mask("a"), folder / "masks" / "a.png")
    return write_rows(folder, own_rows() if rows is None else rows, table=table)


def write_rows(folder: Path, rows: list[dict[str, Any]], *, table: str = "metadata.jsonl") -> Path:
    """The table of an own folder alone."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if table.endswith(".jsonl"):
        (folder / table).write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif table.endswith(".csv"):
        with (folder / table).open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            plain = (str, int, float)
            writer.writerows({c: v if isinstance(v, plain) else json.dumps(v) for c, v in row.items()} for row in rows)
    else:
        pq.write_table(pa.Table.from_pylist([{c: row.get(c) for c in columns} for row in rows]), folder / table)
    return folder


def coco() -> dict[str, Any]:
    """Instances: polygons, compressed and uncompressed run lengths, a crowd."""
    names = sorted({label for labels in LABELS.values() for label in labels})
    counts = np.diff(np.flatnonzero(np.diff(np.concatenate([[-1], (mask("b") == 1).T.ravel(), [-1]])))).tolist()
    shapes = [
        [polygon("a", 0)],
        {"size": list(SIZE[::-1]), "counts": rle("a", 1)},
        {"size": list(SIZE[::-1]), "counts": counts},
        [polygon("b", 1)],
    ]
    annotations = [
        {
            "id": 10 + n,
            "image_id": 1 + n // 2,
            "category_id": 1 + names.index(LABELS["ab"[n // 2]][n % 2]),
            "segmentation": shape,
            "iscrowd": 0,
        }
        for n, shape in enumerate(shapes)
    ]
    return {
        "images": [
            {"id": n, "file_name": f"{name}.png", "width": SIZE[0], "height": SIZE[1]}
            for n, name in enumerate("ab", start=1)
        ],
        "annotations": annotations,
        "categories": [{"id": n, "name": name} for n, name in enumerate(names, start=1)],
    }


def write_coco(folder: Path, change: Callable[[dict[str, Any]], object] = lambda content: None) -> Path:
    """A folder with images/ and instances.json."""
    (folder / "images").mkdir(parents=True)
    for name in "ab":
        picture(name).save(folder / "images" / f"{name}.png")
    content = coco()
    change(content)
    (folder / "instances.json").write_text(json.dumps(content))
    return folder


def subject_json(name: str) -> dict[str, Any]:
    """The JSON of a subject dataset's sample."""
    listed = [
        {"value": n, "label": label, "logit": 0.9 - n / 10, "box": list(box)}
        for n, (label, box) in enumerate(zip(LABELS[name], BOXES[name], strict=True), start=1)
    ]
    return {
        "text": CAPTIONS[name],
        "original_size": list(SIZE),
        "final_masks": [{"value": 0, "label": "background"}, *listed],
    }


def subject_files() -> dict[str, bytes]:
    """The files of a subject dataset by relative name."""
    files = {"selected_indexes.pkl": pickle.dumps(["a", "b"])}
    for name in "ab":
        files[f"images/{name}.png"] = png(picture(name))
        files[f"masks/{name}.png"] = png(Image.fromarray(mask(name)))
        files[f"jsons/{name}.json"] = json.dumps(subject_json(name)).encode()
    return files


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    """Files by relative name."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_concept101(folder: Path) -> Path:
    """A benchmark of one combination with two prompts."""
    entry = [
        {"class_prompt": "cat", "instance_data_dir": "./benchmark_dataset/pet_cat1"},
        {"class_prompt": "dog", "instance_data_dir": "./benchmark_dataset/pet_dog1"},
        {"prompt_filename_compose": "prompts/pets.txt"},
    ]
    (folder / "prompts").mkdir(parents=True)
    (folder / "dataset_multiconcept.json").write_text(json.dumps([entry]))
    (folder / "prompts" / "pets.txt").write_text("a {0} and a {1}\na {1} by a {0}\n")
    for concept in ("pet_cat1", "pet_dog1"):
        (folder / "benchmark_dataset" / concept).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "benchmark_dataset" / concept / "1.png")
    return folder
