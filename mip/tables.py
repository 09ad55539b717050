"""Every table between two stages: its columns, its version, and how it is written whole.

A table is Parquet. Its metadata name the kind, the version and what it was made from. No clock enters the bytes: with
the same packages, the same rows give the same file.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from mip.errors import DataError, SchemaError

Row = dict[str, Any]

_BOX = pa.list_(pa.float64(), 4)  # x1, y1, x2, y2 in pixels of the stored image; x2, y2 are exclusive
_OBJECT = pa.struct(
    [
        ("object_id", pa.string()),
        ("label", pa.string()),
        ("logit", pa.float64()),  # confidence of the label
        ("margin", pa.float64()),  # over the second-best label; null where labels are given
        ("rle", pa.string()),  # COCO compressed run lengths, of the stored image's size
        ("box", _BOX),
        ("area", pa.int64()),  # pixels
    ]
)
_FILE = [  # where an image's bytes are: read in place, nothing is unpacked
    ("image_id", pa.string()),
    ("shard", pa.string()),
    ("source", pa.string()),
    ("image_path", pa.string()),
    ("image_offset", pa.int64()),
    ("image_size", pa.int64()),  # bytes
    ("annotation_path", pa.string()),
    ("annotation_offset", pa.int64()),
    ("annotation_size", pa.int64()),  # bytes
    ("width", pa.int32()),  # pixels, as the annotation says
    ("height", pa.int32()),
]
_SAMPLE = [
    ("sample_id", pa.string()),
    *_FILE,
    ("caption", pa.string()),
    ("objects", pa.list_(_OBJECT)),
]
_SCORES = [
    ("text_image", pa.list_(pa.float64())),  # cos(name, object), one an object
    (
        "image_image",
        pa.list_(pa.float64()),
    ),  # cos(object i, object j) for (0,1), (0,2), (1,2), ... in the order of combinations
    ("score", pa.float64()),
]
_REFERENCE = pa.struct(
    [
        ("name", pa.string()),  # class word, as the prompt has it
        ("concept", pa.string()),  # identity: folder of the reference images
        ("images", pa.list_(pa.string())),
        (
            "boxes",
            pa.list_(pa.list_(pa.float64())),
        ),  # of the object in the image resized to a shorter side of 800; empty: whole image
    ]
)
_DETECTION = pa.struct(
    [
        ("label", pa.string()),
        ("score", pa.float64()),
        ("box", _BOX),
        ("reference", pa.int32()),  # the one it stands for; null for an extra one
    ]
)

VERSION = 1
SCHEMAS: Mapping[str, pa.Schema] = {
    "index": pa.schema(_FILE),
    "masks": pa.schema(
        [
            ("image_id", pa.string()),
            ("object_id", pa.string()),
            ("rle", pa.string()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("box", _BOX),
            ("area", pa.int64()),
            ("predicted_iou", pa.float64()),
            ("stability_score", pa.float64()),
        ]
    ),
    "samples": pa.schema(_SAMPLE),
    "scores": pa.schema([("sample_id", pa.string()), *_SCORES]),
    "manifest": pa.schema(
        [
            *_SAMPLE,
            *_SCORES,
            ("rank", pa.int32()),
            ("phash", pa.string()),
            ("weight", pa.float64()),
            ("models", pa.string()),
        ]
    ),
    "rejected": pa.schema(
        [("unit", pa.string()), ("id", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
    ),
    "tasks": pa.schema(
        [
            ("task_id", pa.string()),  # "<combination>-<prompt number>"
            ("combination", pa.int32()),
            ("prompt_number", pa.int32()),
            ("prompt", pa.string()),
            ("caption", pa.string()),  # what CLIP-T compares with; null: the prompt
            ("category", pa.string()),  # "pet+pet", from the concepts' folder names
            ("seed", pa.int64()),
            ("references", pa.list_(_REFERENCE)),
        ]
    ),
    "images": pa.schema(
        [
            ("task_id", pa.string()),
            ("method", pa.string()),
            ("path", pa.string()),  # relative to the table's folder
            ("sha256", pa.string()),
            ("seed", pa.int64()),
            ("scale", pa.float64()),
        ]
    ),
    # One row per (sample, augmentation); rows, views and masks are numbers within the shard's tensors.
    "features": pa.schema(
        [
            ("split", pa.string()),  # train or val
            ("sample_id", pa.string()),
            ("augmentation", pa.int32()),
            ("shard", pa.string()),  # file name
            ("row", pa.int32()),
            ("weight", pa.float64()),
            ("caption", pa.int32()),  # number in the texts
            ("names", pa.list_(pa.int32())),  # likewise, one an object; the next two columns too
            ("views", pa.list_(pa.int32())),
            ("masks", pa.list_(pa.int32())),
            ("time_ids", pa.list_(pa.int32(), 6)),  # original height, width; crop top, left; target height, width
        ]
    ),
    # Where latents or images are not cached: their source, one row per row of `features`, in the same order.
    "live": pa.schema(
        [
            ("image_path", pa.string()),
            ("image_offset", pa.int64()),
            ("image_size", pa.int64()),  # bytes
            ("image_sha256", pa.string()),
            (
                "objects",
                pa.list_(pa.struct([("rle", pa.string()), ("box", _BOX), ("mirrored", pa.bool_())])),
            ),
        ]
    ),
    "texts": pa.schema([("text", pa.string())]),  # where texts are not cached: in the order of their numbers
    "per_task": pa.schema(  # what the judge says of one image
        [
            ("method", pa.string()),
            ("task_id", pa.string()),
            ("combination", pa.int32()),
            ("clip_t", pa.float64()),
            ("clip_i", pa.float64()),
            ("dino", pa.float64()),
            # From here on null where two references have one class, which labels cannot tell apart.
            ("presence", pa.float64()),
            ("swapped", pa.bool_()),
            ("leak", pa.float64()),  # null also where nothing was found
            ("leaked", pa.bool_()),
            ("confused", pa.bool_()),
            ("count_error", pa.float64()),
            ("detect_and_compare", pa.float64()),  # as swapped, null for a lone reference as well
            ("identity_margin", pa.float64()),  # likewise
            ("localisation", pa.float64()),  # null also without a relevance map or masks
            ("map_iou", pa.float64()),  # likewise
            ("similarity", pa.list_(pa.list_(pa.float64()))),  # S; rows of objects that were not found are null
            ("reference_similarity", pa.list_(pa.list_(pa.float64()))),  # G
            ("detections", pa.list_(_DETECTION)),
        ]
    ),
    "per_combination": pa.schema(
        [
            ("method", pa.string()),
            ("combination", pa.int32()),
            ("category", pa.string()),
            ("metric", pa.string()),
            ("value", pa.float64()),  # null where the combination has none
            ("n", pa.int64()),  # tasks behind it
        ]
    ),
    "curve": pa.schema(
        [
            ("step", pa.int64()),
            ("loss", pa.float64()),
            ("validation_loss", pa.float64()),  # null between validations
            ("learning_rate", pa.float64()),
            ("samples", pa.int64()),
        ]
    ),
}


def write_table(path: Path, kind: str, rows: Sequence[Row], made_from: Mapping[str, str]) -> Path:
    """Write rows as a table of this kind, whole or not at all; `made_from` names what went in, by hash."""
    schema = SCHEMAS[kind].with_metadata(
        {"mip.kind": kind, "mip.version": str(VERSION), "mip.made_from": json.dumps(dict(made_from), sort_keys=True)}
    )
    table = pa.Table.from_pylist(list(rows), schema=schema)
    with atomic(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    return path


def read_table(path: Path, kind: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A table of this kind; `path` is a file, or a folder of part-*.parquet, read in the order of their names."""
    parts = sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]
    if not path.exists() or not parts:
        raise DataError(f"there is no {kind} table at {path}; run the stage that writes it")
    tables = []
    for part in parts:
        check_kind(part, kind)
        tables.append(pq.read_table(part, columns=list(columns) if columns is not None else None))
    return pa.concat_tables([table.replace_schema_metadata() for table in tables])


def read_rows(path: Path, kind: str, columns: Sequence[str] | None = None) -> list[Row]:
    """The same as a list of dictionaries."""
    return read_table(path, kind, columns).to_pylist()


def check_kind(path: Path, kind: str) -> dict[str, str]:
    """What a table was made from. Raises SchemaError where it is of another kind or version, or no Parquet at all."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowInvalid, OSError) as error:
        raise SchemaError(
            f"{path} is not a readable Parquet file ({error}); delete it and run its stage again"
        ) from None
    found, version = metadata.get(b"mip.kind", b"?").decode(), metadata.get(b"mip.version", b"?").decode()
    if (found, version) != (kind, str(VERSION)):
        raise SchemaError(
            f"{path} is a {found!r} table of version {version}; expected {kind!r} of "
            f"version {VERSION}; run its stage again"
        )
    return json.loads(metadata[b"mip.made_from"])


def rejected(unit: str, identity: str, reason: str, detail: str = "") -> Row:
    """A row of the `rejected` table: `unit` says what was dropped (image, object, sample, shard, ...)."""
    return {"unit": unit, "id": identity, "reason": reason, "detail": detail}


def check_conservation(unit: str, came: int, kept: int, dropped: Iterable[Row]) -> None:
    """Rows in = rows out + rows rejected. A violation is our own error, never the user's."""
    lost = sum(row["unit"] == unit for row in dropped)
    assert came == kept + lost, (
        f"{came} {unit}s came in, {kept} went out and {lost} were rejected: {came - kept - lost} unaccounted for"
    )


class atomic:
    """`with atomic(path) as temporary:` write there; on success it becomes `path` in one step, else it is gone."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        os.close(handle)
        self.temporary = Path(name)
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.temporary.unlink(missing_ok=True)
            return
        umask = os.umask(0)
        os.umask(umask)
        self.temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only the owner may read
        with self.temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(self.temporary, self.path)


def write_text(path: Path, text: str) -> Path:
    """Write a text file, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, content: object) -> Path:
    """Write JSON with stable keys, whole or not at all."""
    return write_text(path, json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def file_hash(path: Path) -> str:
    """SHA-256 of a file, or of a folder's relative names and contents in sorted order."""
    digest = hashlib.sha256()
    for part in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        digest.update(f"{part.relative_to(path) if path.is_dir() else ''}\0{part.stat().st_size}\0".encode())
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def fingerprint(**parts: object) -> str:
    """Hash of what a result depends on: parameters (JSON-able or pydantic), hashes of inputs, versions."""
    plain = {k: v.model_dump(mode="json") if isinstance(v, BaseModel) else v for k, v in parts.items()}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:32]
