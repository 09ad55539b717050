"""A manifest as a subject dataset: the released layout, which the public code trains on and `subject10k` reads."""

import json
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mip.data import images, parts
from mip.data.subject_dataset import BACKGROUND
from mip.errors import DataError
from mip.tables import Row

NAMES = "selected_indexes.pkl"

_PROTOCOL = 4  # of the released list; Python 3.4 and later read it
_MOST = 255  # objects: levels of 8 bits besides the background


@dataclass(frozen=True)
class Exported:
    """What was written."""

    samples: int
    objects: int
    overlapping: int  # objects that lost pixels to another one: a level holds one object a pixel


def export(manifest: Path, out: Path) -> Exported:
    """Write images/, jsons/, masks/ and the list of names to `out`, whole or not at all.

    Where objects overlap, the smaller one is on top. Raises DataError for an image that has changed, or an object of
    which nothing would be left.
    """
    if out.exists():
        raise DataError(f"got {out}, which exists; give the name of a folder that does not")
    if not manifest.is_file():
        raise DataError(f"there is no file {manifest}; give train.parquet or val.parquet of a manifest")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for folder in ("images", "jsons", "masks"):
        (partial / folder).mkdir(parents=True)
    names: set[str] = set()
    objects = overlapping = 0
    try:
        for row in parts.stream_rows(manifest, "manifest"):
            name = f"{row['shard']}-{row['image_id']}"
            if name in names or not images.is_safe_name(name):
                raise DataError(f"{manifest}: got name {name!r}; expected one plain name a sample; rename the shard")
            names.add(name)
            objects, overlapping = objects + len(row["objects"]), overlapping + _write(row, name, partial)
        (partial / NAMES).write_bytes(pickle.dumps(sorted(names), protocol=_PROTOCOL))
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(len(names), objects, overlapping)


def _write(row: Row, name: str, folder: Path) -> int:
    """One sample; how many of its objects lost pixels."""
    levels, lost = _levels(row)
    listed: list[dict[str, Any]] = [
        {"value": value, "label": thing["label"], "logit": thing["logit"], "box": thing["box"]}
        for value, thing in enumerate(row["objects"], start=1)
    ]
    size = [row["width"], row["height"]]
    content = {"text": row["caption"], "original_size": size, "final_masks": [BACKGROUND, *listed]}
    images.load(row).save(folder / "images" / f"{name}.png")
    Image.fromarray(levels).save(folder / "masks" / f"{name}.png")
    (folder / "jsons" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return lost


def _levels(row: Row) -> tuple[NDArray[np.uint8], int]:
    """H x W: object k's pixels have level k, the smaller object on top; and how many objects lost pixels."""
    things = row["objects"]
    if len(things) > _MOST:
        raise DataError(f"{row['sample_id']}: got {len(things)} objects; the layout holds {_MOST}: lower max_objects")
    levels = np.zeros((row["height"], row["width"]), np.uint8)
    for place in sorted(range(len(things)), key=lambda place: -things[place]["area"]):
        levels[images.decode_mask(things[place]["rle"], width=row["width"], height=row["height"])] = place + 1
    left = np.bincount(levels.ravel(), minlength=len(things) + 1)[1:]
    if not left.all():
        hidden = things[int(np.argmin(left))]["label"]
        raise DataError(
            f"{row['sample_id']}: {hidden!r} lies wholly under others; leave the sample out of the manifest"
        )
    return levels, sum(int(n) < thing["area"] for n, thing in zip(left, things, strict=True))
