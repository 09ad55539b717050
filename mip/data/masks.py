"""extract: annotations -> masks with their geometry.

Run lengths stay run lengths: areas and boxes are computed from them, and no dense mask is made. Boxes and areas that
the file states are not used.
"""

import json
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any

from pycocotools import mask as coco

from mip.config import Extract
from mip.data import parts
from mip.data.fields import finite
from mip.data.images import ImageError, RleError, check_rle, decode, mask_area, mask_box, read_bytes
from mip.errors import DataError
from mip.tables import Row, file_hash, fingerprint, rejected

_PROOF = 1  # pixels of the shorter side: a JPEG that decodes at its smallest scale has been read to its end


class Reason(StrEnum):
    """Why `extract` rejects an image or an object."""

    UNREADABLE = "unreadable"
    BROKEN_IMAGE = "broken_image"
    TOO_LARGE = "too_large"
    WRONG_SIZE = "wrong_size"
    BAD_JSON = "bad_json"
    NO_ANNOTATIONS = "no_annotations"
    TOO_MANY_ANNOTATIONS = "too_many_annotations"
    NO_OBJECTS = "no_objects"
    BAD_ANNOTATION = "bad_annotation"
    DUPLICATE_ID = "duplicate_id"
    BAD_RLE = "bad_rle"
    EMPTY_MASK = "empty_mask"
    TOO_SMALL = "too_small"


class _Refused(Exception):
    """An image or an object ends here."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, " ".join(detail.split())[:200]


def extract_shard(config: Extract, *, index_part: Path, out: Path) -> Path:
    """Prove that a shard's images decode and read their masks. Returns out/part-<shard>.parquet (kind masks).

    Rejected images and objects go to out/rejected-<shard>.parquet; nothing in a file is raised.
    """
    shard = parts.shard_name(index_part)
    made_from = {"stage": "extract", "params": fingerprint(config=config), "index": file_hash(index_part)}
    images = kept_images = annotations = kept_objects = 0
    with parts.PartWriter(out, shard=shard, kind="masks", made_from=made_from) as part:
        for row in parts.stream_rows(index_part, "index"):
            images += 1
            identity = f"{shard}:{row['image_id']}"
            try:
                listed = _annotations(row, config)
                _prove(row, config)
            except _Refused as error:
                part.reject([rejected("image", identity, error.reason, error.detail)])
                continue
            masks, dropped = read_masks(listed, row=row, identity=identity, min_area=config.min_area)
            if not masks:
                dropped.append(
                    rejected("image", identity, Reason.NO_OBJECTS, f"all {len(listed)} annotations were rejected")
                )
            part.keep(masks)
            part.reject(dropped)
            annotations, kept_objects, kept_images = (
                annotations + len(listed),
                kept_objects + len(masks),
                kept_images + bool(masks),
            )
        part.check("image", came=images, kept=kept_images)
        part.check("object", came=annotations, kept=kept_objects)
    return parts.part_path(out, shard)


def finish(*, index: Path, out: Path) -> Path:
    """Join the shards' rejected tables and check that no image was lost. Returns `out`."""
    shards = [parts.shard_name(part) for part in parts.parts(index)]
    parts.finish(out, shards=shards)
    parts.check_stage(
        "image", came=parts.count_rows(index), kept=parts.count_distinct(out, "masks", "image_id"), out=out
    )
    return out


def _annotations(row: Row, config: Extract) -> list[Any]:
    try:
        data = read_bytes(Path(row["annotation_path"]), offset=row["annotation_offset"], size=row["annotation_size"])
    except DataError as error:
        raise _Refused(Reason.UNREADABLE, str(error)) from None
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _Refused(Reason.BAD_JSON, str(error)) from None
    listed = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(listed, list):
        raise _Refused(Reason.BAD_JSON, "no list `annotations`")
    if not listed:
        raise _Refused(Reason.NO_ANNOTATIONS)
    if len(listed) > config.max_annotations:
        raise _Refused(Reason.TOO_MANY_ANNOTATIONS, f"{len(listed)}, at most {config.max_annotations}")
    return listed


def _prove(row: Row, config: Extract) -> None:
    try:
        data = read_bytes(Path(row["image_path"]), offset=row["image_offset"], size=row["image_size"])
        decode(data, max_pixels=config.max_pixels, reduced=_PROOF, size=(row["width"], row["height"]))
    except ImageError as error:
        raise _Refused(Reason(error.reason.value), error.detail) from None
    except DataError as error:
        raise _Refused(Reason.UNREADABLE, str(error)) from None


def read_masks(annotations: Iterable[Any], *, row: Row, identity: str, min_area: int) -> tuple[list[Row], list[Row]]:
    """Rows of kind masks and of kind rejected, one of either for each annotation, in the file's order."""
    masks: list[Row] = []
    dropped: list[Row] = []
    seen: set[str] = set()
    for position, annotation in enumerate(annotations):
        name = f"#{position}"  # until the annotation's own id is known
        try:
            name = _object_id(annotation)
            if name in seen:
                raise _Refused(Reason.DUPLICATE_ID, "the first of this id is kept")
            seen.add(name)
            masks.append(_mask(annotation, name=name, row=row, min_area=min_area))
        except _Refused as error:
            dropped.append(rejected("object", f"{identity}:{name}"[:300], error.reason, error.detail))
    return masks, dropped


def _object_id(annotation: Any) -> str:
    if not isinstance(annotation, dict):
        raise _Refused(Reason.BAD_ANNOTATION, f"got {type(annotation).__name__}; expected an object")
    name = annotation.get("id")
    if isinstance(name, bool) or not isinstance(name, int | str) or name == "" or not str(name).isprintable():
        raise _Refused(Reason.BAD_ANNOTATION, f"got id {name!r}; expected a number or a string")
    return str(name)


def _mask(annotation: dict[str, Any], *, name: str, row: Row, min_area: int) -> Row:
    size = {"width": row["width"], "height": row["height"]}
    counts = _counts(annotation.get("segmentation"), **size)
    area = mask_area(counts, **size)
    if area == 0:
        raise _Refused(Reason.EMPTY_MASK)
    if area < min_area:
        raise _Refused(Reason.TOO_SMALL, f"{area} pixels, at least {min_area}")
    return {
        "image_id": row["image_id"],
        "object_id": name,
        "rle": counts,
        **size,
        "box": mask_box(counts, **size),
        "area": area,
        "predicted_iou": finite(annotation.get("predicted_iou")),
        "stability_score": finite(annotation.get("stability_score")),
    }


def _counts(segmentation: Any, *, width: int, height: int) -> str:
    """Checked compressed counts; plain lists of runs, as COCO also writes them, are compressed."""
    if not isinstance(segmentation, dict):
        raise _Refused(Reason.BAD_RLE, f"got segmentation {type(segmentation).__name__}; expected size and counts")
    if segmentation.get("size") != [height, width]:
        raise _Refused(Reason.WRONG_SIZE, f"mask {segmentation.get('size')!r}, image [{height}, {width}]")
    counts = segmentation.get("counts")
    if (
        isinstance(counts, list)
        and all(type(run) is int and run >= 0 for run in counts)
        and sum(counts) == width * height
    ):
        runs: Any = {"size": [height, width], "counts": counts}  # the stubs do not know this form
        return coco.frPyObjects(runs, height, width)["counts"].decode("ascii")
    if not isinstance(counts, str):
        raise _Refused(Reason.BAD_RLE, f"got counts {type(counts).__name__}; expected run lengths of the image's size")
    try:
        check_rle(counts, width=width, height=height)
    except RleError as error:
        raise _Refused(Reason.BAD_RLE, str(error)) from None
    return counts
