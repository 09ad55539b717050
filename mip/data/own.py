"""A user's own folder as a source: images/, masks/ and a table with one row an object (docs/own-data.md)."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import PositiveInt

from mip.config import Section
from mip.data import checks
from mip.data.files import FolderFiles
from mip.data.images import SUFFIXES, is_safe_name
from mip.data.pictures import Converted, Picture, Thing
from mip.data.problems import DATASET, Problem, Problems, Reason, Refused
from mip.tables import Row

TABLES = ("metadata.parquet", "metadata.csv", "metadata.jsonl")
REQUIRED = ("image", "label")
COLUMNS = (*REQUIRED, "mask", "value", "rle", "polygon", "caption", "box", "score")

_PARSED = ("value", "polygon", "box", "score")  # a table of texts has them as JSON

Numbered = tuple[int, Row]  # row number, from 1 without the header; the row


class OwnOptions(Section):
    """`ingest.options` of own data."""

    folder: Path  # with images/, masks/ and a table
    shard_size: PositiveInt  # images


class Own(Converted):
    """Own data."""

    Options: ClassVar[type[Section]] = OwnOptions

    def read(self) -> Iterator[Picture | Problem]:
        return read_own(self.options.folder)


def read_own(folder: Path) -> Iterator[Picture | Problem]:
    """Each image with its objects, in the order of the table. The table is held in memory, images are not."""
    problems = Problems(DATASET, str(folder))
    table = problems.take(_table, folder)
    rows = problems.take(_rows, table) if table is not None else None
    if table is None or rows is None:
        yield from problems.found
        return
    yield from _wrong_columns(table.name, rows)
    by_image: dict[str, list[Numbered]] = {}
    for number, row in enumerate(rows, start=1):
        image = row.get("image")
        if isinstance(image, str) and image:
            by_image.setdefault(image, []).append((number, row))
        else:
            yield Problem("object", f"{table.name}: row {number}", Reason.BAD_ENTRY, f"got image {image!r:.80}")
    files, taken = FolderFiles(folder), set()
    for image, numbered in by_image.items():
        yield from _picture(files, image, numbered, table=table.name, taken=taken)
    yield from _unused(files, rows)


def _wrong_columns(table: str, rows: list[Row]) -> Iterator[Problem]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for column in columns:
        if column not in COLUMNS:
            yield Problem("column", table, Reason.UNKNOWN_COLUMN, f"got column {column!r:.80}")
    for column in REQUIRED:
        if column not in columns:
            yield Problem(DATASET, table, Reason.BAD_METADATA, f"got no column {column!r}, but {', '.join(columns)}")


def _picture(
    files: FolderFiles, image: str, rows: list[Numbered], *, table: str, taken: set[str]
) -> Iterator[Picture | Problem]:
    where = f"images/{image}"
    problems = Problems("image", where)
    data = problems.take(files.read, where)
    size = problems.take(checks.image_size, data, name=where) if data is not None else None
    stem, suffix = problems.take(_named, image, taken) or ("", "")
    texts = [row["caption"] for _, row in rows if row.get("caption") is not None]
    caption = problems.take(_caption, texts) if texts else None
    mask_files: dict[str, NDArray[np.integer] | Refused] = {}
    things = []
    for number, row in rows:
        of_row = Problems("object", f"{table}: row {number}")
        thing = _thing(of_row, files, row, size=size, number=number, mask_files=mask_files)
        things += [thing] if thing is not None else []
        yield from of_row.found
    yield from problems.found
    if not problems.found and data is not None and size is not None:
        yield Picture(stem, data, suffix, size, tuple(things), caption, where)


def _named(image: str, taken: set[str]) -> tuple[str, str]:
    """The image's stem and suffix. Raises Refused."""
    path = PurePosixPath(image)
    if not is_safe_name(path.stem) or path.suffix.lower() not in SUFFIXES:
        raise Refused(Reason.UNSAFE_NAME, f"got {path.name[:200]!r}, expected NAME.jpg or NAME.png")
    if path.stem in taken:
        raise Refused(Reason.DUPLICATE, f"got a second image called {path.stem}")
    taken.add(path.stem)
    return path.stem, path.suffix.lower()


def _caption(texts: list[Any]) -> str:
    if any(text != texts[0] for text in texts):
        raise Refused(Reason.BAD_CAPTION, f"got different captions, {texts[0]!r:.80} first")
    return checks.caption_of(texts[0])


def _thing(
    problems: Problems,
    files: FolderFiles,
    row: Row,
    *,
    size: tuple[int, int] | None,
    number: int,
    mask_files: dict[str, NDArray[np.integer] | Refused],
) -> Thing | None:
    """The object of a row, None where something is wrong with it."""

    def optional(name: str, check: Callable[[Any], Any]) -> Any:
        return problems.take(check, row[name]) if row.get(name) is not None else None

    label, score = problems.take(checks.label_of, row.get("label")), optional("score", checks.score_of)
    box, value = optional("box", checks.box_of), optional("value", checks.value_of)
    given = [name for name in ("mask", "rle", "polygon") if row.get(name) is not None]
    segmentation = None
    if len(given) != 1:
        problems.refuse(Reason.NO_MASK, f"got {' and '.join(given) or 'none of the three'}")
    elif given == ["mask"]:
        levels = problems.take(_levels, files, row["mask"], size=size, mask_files=mask_files)
        if levels is not None and (row.get("value") is None or value is not None):
            segmentation = problems.take(checks.level_mask, levels, value=value, box=box, name=f"masks/{row['mask']}")
    elif size is not None and given == ["polygon"]:
        segmentation = problems.take(checks.polygon_mask, row["polygon"], width=size[0], height=size[1])
    elif size is not None:
        segmentation = {"size": [size[1], size[0]], "counts": row["rle"]}  # `extract` checks the counts
    if problems.found or label is None or segmentation is None:
        return None
    return Thing(str(number), segmentation, label, 1.0 if score is None else score, problems.where)


def _levels(
    files: FolderFiles,
    mask: Any,
    *,
    size: tuple[int, int] | None,
    mask_files: dict[str, NDArray[np.integer] | Refused],
) -> NDArray[np.integer]:
    """A mask file, read once for all objects of its image."""
    if not isinstance(mask, str) or not mask:
        raise Refused(Reason.BAD_ENTRY, f"got mask {mask!r:.80}, expected a file under masks/")
    if mask not in mask_files:
        try:
            mask_files[mask] = checks.mask_levels(files.read(f"masks/{mask}"), size=size, name=f"masks/{mask}")
        except Refused as refused:
            mask_files[mask] = refused
    levels = mask_files[mask]
    if isinstance(levels, Refused):
        raise levels
    return levels


def _unused(files: FolderFiles, rows: list[Row]) -> Iterator[Problem]:
    named = {str(PurePosixPath(f"{folder}s", str(row.get(folder)))) for row in rows for folder in ("image", "mask")}
    for name in files.names():
        if name.startswith(("images/", "masks/")) and name not in named:
            unit = "image" if name.startswith("images/") and name.lower().endswith(SUFFIXES) else "file"
            yield Problem(unit, name, Reason.UNUSED_FILE, "no row names it")


# Tables -------------------------------------------------------------------------------------------------------------


def _table(folder: Path) -> Path:
    found = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(found) != 1:
        raise Refused(Reason.BAD_METADATA, f"got {' and '.join(file.name for file in found) or 'none of them'}")
    return found[0]


def _rows(table: Path) -> list[Row]:
    """The table's rows without empty cells. Raises Refused."""
    read = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}[table.suffix]
    try:
        rows = [
            {name: _cell(name, value) for name, value in row.items() if not _is_empty(value)} for row in read(table)
        ]
    except (ValueError, RecursionError, csv.Error, pa.ArrowException, OSError) as error:
        raise Refused(Reason.BAD_METADATA, f"got {table.name}, which cannot be read: {error}") from None
    if not rows:
        raise Refused(Reason.BAD_METADATA, f"got {table.name} without a row")
    return rows


def _csv(table: Path) -> Iterator[Row]:
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="cells without a column", strict=True)
        yield from reader


def _jsonl(table: Path) -> Iterator[Row]:
    for number, line in enumerate(io.StringIO(table.read_text(encoding="utf-8-sig")), start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object")
            yield row


def _parquet(table: Path) -> Iterator[Row]:
    with pq.ParquetFile(table) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


def _is_empty(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _cell(name: str, value: Any) -> Any:
    if name in _PARSED and isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value  # the column's own check says what is wrong with it
    return value
