"""Find a shard's images: files or members of a tar -> pairs of image and annotation -> index rows.

Only positions and sizes are read, and the first bytes of each annotation. Whatever is wrong with one file, the others
are kept.
"""

import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any

from mip.data.images import SUFFIXES, is_safe_name, read_bytes
from mip.errors import DataError
from mip.tables import Row, check_conservation, rejected

_HEADER = 4096  # bytes; SA-1B puts the image's size at the front of its JSON
_MAX_ANNOTATION = 1 << 28  # bytes; SA-1B's largest are about 1 MB
_MAX_SIDE = 1 << 20  # pixels; far more than any image that could pass max_pixels
_BLOCK = 512  # of a tar


class Reason(StrEnum):
    """Why `ingest` rejects something."""

    BAD_SHARD = "bad_shard"
    EMPTY_SHARD = "empty_shard"
    TRUNCATED_SHARD = "truncated_shard"
    NOT_A_FILE = "not_a_file"
    OUTSIDE = "outside_folder"
    UNSAFE_NAME = "unsafe_name"
    UNKNOWN_FILE = "unknown_file"
    DUPLICATE_ID = "duplicate_id"
    MISSING_IMAGE = "missing_image"
    MISSING_ANNOTATION = "missing_annotation"
    CUT_OFF = "cut_off"
    EMPTY_FILE = "empty_file"
    TOO_LARGE = "too_large"
    BAD_JSON = "bad_json"
    BAD_HEADER = "bad_header"


@dataclass(frozen=True)
class Shard:
    """A unit of work: a name that is unique in its source and safe as a file's, and the files that it reads."""

    name: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Indexed:
    """What indexing a shard gives: rows of kind index, and rows of kind rejected."""

    rows: list[Row]
    rejected: list[Row]


@dataclass(frozen=True)
class Found:
    """A file, or a member of a tar: where its bytes are. `available` is how many of them there really are."""

    name: str
    path: Path
    offset: int
    size: int
    available: int


@dataclass
class _Pair:
    image: Found | None = None
    annotation: Found | None = None


def plain(name: str) -> str:
    """A name of bytes that are no UTF-8 in characters that a table can hold."""
    return name.encode("utf-8", "replace").decode()


def index_files(files: Iterable[Found], *, shard: str, source: str) -> Indexed:
    """Pair images with annotations by their stems, in any order; every file ends in a row or is rejected."""
    pairs: dict[str, _Pair] = {}
    dropped: list[Row] = []
    for found in files:
        stem, suffix = PurePosixPath(found.name).stem, PurePosixPath(found.name).suffix.lower()
        slot = "annotation" if suffix == ".json" else "image" if suffix in SUFFIXES else None
        if slot is None or not is_safe_name(stem):
            reason = Reason.UNKNOWN_FILE if slot is None else Reason.UNSAFE_NAME
            dropped.append(rejected("file", f"{shard}:{found.name}"[:300], reason))
            continue
        pair = pairs.setdefault(stem, _Pair())
        if getattr(pair, slot) is not None:
            dropped.append(
                rejected(
                    "file",
                    f"{shard}:{found.name}",
                    Reason.DUPLICATE_ID,
                    "a second file of this name; the first is kept",
                )
            )
            continue
        setattr(pair, slot, found)
    rows: list[Row] = []
    for stem in sorted(pairs):
        row = _row(pairs[stem], stem=stem, shard=shard, source=source)
        (dropped if "reason" in row else rows).append(row)
    check_conservation("image", len(pairs), len(rows), dropped)
    return Indexed(rows, dropped)


def _row(pair: _Pair, *, stem: str, shard: str, source: str) -> Row:
    """The index row of a pair, or its rejected row."""
    identity, image, annotation = f"{shard}:{stem}", pair.image, pair.annotation
    if image is None:
        return rejected("image", identity, Reason.MISSING_IMAGE)
    if annotation is None:
        return rejected("image", identity, Reason.MISSING_ANNOTATION)
    for found in (image, annotation):
        if found.size == 0:
            return rejected("image", identity, Reason.EMPTY_FILE, found.name)
        if found.available < found.size:
            return rejected("image", identity, Reason.CUT_OFF, f"{found.name}: {found.available} of {found.size} bytes")
    if annotation.size > _MAX_ANNOTATION:
        return rejected(
            "image",
            identity,
            Reason.TOO_LARGE,
            f"{annotation.name}: {annotation.size} bytes, at most {_MAX_ANNOTATION}",
        )
    try:
        width, height = image_size(annotation)
    except _HeaderError as error:
        return rejected("image", identity, error.reason, str(error))
    return {
        "image_id": stem,
        "shard": shard,
        "source": source,
        "image_path": image.path.as_posix(),
        "image_offset": image.offset,
        "image_size": image.size,
        "annotation_path": annotation.path.as_posix(),
        "annotation_offset": annotation.offset,
        "annotation_size": annotation.size,
        "width": width,
        "height": height,
    }


class _HeaderError(DataError):
    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def image_size(annotation: Found) -> tuple[int, int]:
    """(width, height) as the annotation says. Its first bytes are enough where the image comes first, as in SA-1B."""
    start = read_bytes(annotation.path, offset=annotation.offset, size=min(_HEADER, annotation.size))
    opening = re.match(rb'\s*\{\s*"image"\s*:\s*(?=\{)', start)
    image: object = None
    if opening:
        try:
            image, _ = json.JSONDecoder().raw_decode(start[opening.end() :].decode("utf-8", "ignore"))
        except (ValueError, RecursionError):
            image = None  # longer than the first bytes, or broken: the whole file tells
    if image is None:
        image = _whole(annotation).get("image")
    size = (image.get("width"), image.get("height")) if isinstance(image, dict) else (None, None)
    if not all(type(side) is int and 0 < side <= _MAX_SIDE for side in size):
        raise _HeaderError(Reason.BAD_HEADER, f"got image size {size!r}; expected two positive integers"[:200])
    return size  # pyright: ignore[reportReturnType]


def _whole(annotation: Found) -> dict[str, Any]:
    try:
        content = json.loads(read_bytes(annotation.path, offset=annotation.offset, size=annotation.size))
    except (ValueError, RecursionError) as error:
        raise _HeaderError(Reason.BAD_JSON, " ".join(str(error).split())[:200]) from None
    if not isinstance(content, dict):
        raise _HeaderError(
            Reason.BAD_HEADER, f"got {type(content).__name__}; expected an object with `image` and `annotations`"
        )
    return content


# Tars ---------------------------------------------------------------------------------------------------------------


def tar_shards(folder: Path) -> list[Shard]:
    """One shard for every *.tar in a folder, by name. Raises DataError for a missing folder or an unsafe name."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder} with tar shards; check ingest.options")
    tars = sorted(folder.glob("*.tar"))
    unsafe = [tar.name for tar in tars if not is_safe_name(tar.stem)]
    if unsafe:
        raise DataError(f"got shard names {unsafe}; expected letters, digits and '_.-' only; rename them")
    return [Shard(tar.stem, (tar,)) for tar in tars]


def index_tar(shard: Shard, *, source: str) -> Indexed:
    """Index an SA-1B tar in place, by byte range. A shard that ends too early keeps all that is whole."""
    (path,) = shard.files
    dropped: list[Row] = []
    found = list(_members(path, shard=shard.name, dropped=dropped))
    indexed = index_files(found, shard=shard.name, source=source)
    return Indexed(indexed.rows, [*dropped, *indexed.rejected])


def _members(path: Path, *, shard: str, dropped: list[Row]) -> Iterator[Found]:
    """A tar's plain files. What is wrong with the tar itself is added to `dropped`."""

    def drop(reason: Reason, detail: str) -> None:
        dropped.append(rejected("shard", shard, reason, detail))

    length = path.stat().st_size
    if length == 0:
        return drop(Reason.EMPTY_SHARD, "0 bytes")
    try:
        tar = tarfile.open(path, mode="r:")
    except (tarfile.TarError, OSError, ValueError) as error:
        return drop(Reason.BAD_SHARD, f"not an uncompressed tar: {' '.join(str(error).split())[:150]}")
    number = 0
    with tar:
        try:
            for member in tar:
                number += 1
                if member.isdir():
                    continue
                member.name = plain(member.name)
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    dropped.append(rejected("file", f"{shard}:{member.name}"[:300], Reason.UNSAFE_NAME))
                elif not member.isreg() or member.issparse():
                    dropped.append(
                        rejected(
                            "file", f"{shard}:{member.name}"[:300], Reason.NOT_A_FILE, "a link, device or sparse file"
                        )
                    )
                else:
                    available = min(member.size, max(0, length - member.offset_data))
                    yield Found(name.name, path, member.offset_data, member.size, available)
        except (tarfile.TarError, OSError, ValueError) as error:
            return drop(Reason.TRUNCATED_SHARD, " ".join(str(error).split())[:150])
        end = tar.offset  # pyright: ignore[reportAttributeAccessIssue]
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(_BLOCK)
    if block != bytes(_BLOCK):  # tarfile takes a damaged header for the end
        return drop(Reason.TRUNCATED_SHARD, f"no end marker at byte {end}: members behind it are lost")
    if number == 0:
        drop(Reason.EMPTY_SHARD, "a tar without members")
    return None


def index_loose(shard: Shard, *, root: Path, source: str) -> Indexed:
    """Index loose files. Links that lead out of `root`, or nowhere, are rejected."""
    dropped: list[Row] = []
    found: list[Found] = []
    for path in shard.files:
        identity = f"{shard.name}:{plain(path.relative_to(root).as_posix())}"[:300]
        if not path.is_file():
            dropped.append(rejected("file", identity, Reason.NOT_A_FILE, "a broken link or no regular file"))
        elif not path.resolve().is_relative_to(root.resolve()):
            dropped.append(rejected("file", identity, Reason.OUTSIDE, f"a link to {plain(str(path.resolve()))}"))
        else:
            size = path.stat().st_size
            found.append(Found(plain(path.name), path, 0, size, size))
    indexed = index_files(found, shard=shard.name, source=source)
    return Indexed(indexed.rows, [*dropped, *indexed.rejected])
