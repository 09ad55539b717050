"""construct: masks, labels and captions become samples, by the authors' filter.

The rules are theirs, their constants are parameters. Ours: masks are the true ones, not gray levels; a label is found
as a whole word; of two objects of one name the surer stays, and the next object takes the other's place. Their rule
that a box must show something besides its object is left out: with true masks it only strikes rectangular objects.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco

from mip.config import Construct, Rules
from mip.data import labels, parts
from mip.data.captions import compose, is_same, names
from mip.data.images import coco_rle
from mip.data.labels import Label, Labelled, Labeller
from mip.tables import Row, file_hash, fingerprint, rejected

_CHUNK = 16  # images that are labelled together


class Reason(StrEnum):
    """Why `construct` rejects an object or an image; `labels.Reason` holds those of the labels themselves."""

    BOX_TOO_SMALL = "box_too_small"
    BOX_TOO_LARGE = "box_too_large"
    ASPECT = "aspect"
    LOW_FILL = "low_fill"
    LOW_LOGIT = "low_logit"
    NOT_IN_CAPTION = "label_not_in_caption"
    CROWDED_BOX = "crowded_box"
    CONTAINED = "contained"
    SAME_NAME = "same_name"
    SURPLUS = "surplus"
    IMAGE_REJECTED = "image_rejected"
    EMPTY_CAPTION = "empty_caption"
    CAPTION_WITHOUT_OBJECTS = "caption_without_objects"
    TOO_FEW_OBJECTS = "too_few_objects"


@dataclass(frozen=True)
class Candidate:
    """A mask with its label."""

    mask: Row
    label: Label

    @property
    def box(self) -> Sequence[float]:
        return self.mask["box"]


class _Tally:
    """The objects of one image that are left, and why the others are not."""

    def __init__(self) -> None:
        self.reasons: dict[str, tuple[StrEnum, str]] = {}

    def drop(self, mask: Row, reason: StrEnum, detail: str = "") -> None:
        self.reasons[mask["object_id"]] = (reason, detail)


def construct_shard(
    config: Construct, *, index_part: Path, masks_part: Path, labels_folder: Path | None, out: Path
) -> Path:
    """Choose the objects and the caption of a shard's images. Returns out/part-<shard>.parquet (kind samples).

    `labels_folder`: what the source brings; construct.labels.path, where set, is used instead. With labels by open_clip
    it serves for captions alone, and captions are composed of the labels where it is None.
    """
    shard = parts.shard_name(masks_part)
    labeller = labels.labeller(config, shard=shard, labels_folder=labels_folder)
    made_from = {
        "stage": "construct",
        "params": fingerprint(config=config),
        "index": file_hash(index_part),
        "masks": file_hash(masks_part),
        "labels": f"{config.labels.kind}:{labeller.identity}",
    }
    images = objects = kept_images = kept_objects = 0
    with parts.PartWriter(out, shard=shard, kind="samples", made_from=made_from) as part:
        part.reject(labeller.rejected)
        for chunk in _chunks(index_part, masks_part):
            for (row, masks), (sample, dropped) in zip(chunk, _samples(config, labeller, chunk), strict=True):
                images, objects = images + 1, objects + len(masks)
                part.reject(dropped)
                if sample is not None:
                    part.keep([{"sample_id": f"{shard}:{row['image_id']}", **row, **sample}])
                    kept_images, kept_objects = kept_images + 1, kept_objects + len(sample["objects"])
        part.check("image", came=images, kept=kept_images)
        part.check("object", came=objects, kept=kept_objects)
    return parts.part_path(out, shard)


def finish(*, index: Path, out: Path) -> Path:
    """Join the shards' rejected tables. Raises DataError where a shard of the index is missing. Returns `out`."""
    parts.finish(out, shards=[parts.shard_name(part) for part in parts.parts(index)])
    return out


Chunk = list[tuple[Row, list[Row]]]


def _chunks(index_part: Path, masks_part: Path) -> Iterator[Chunk]:
    """(index row, mask rows) of the images that have masks, some at a time; both tables are in the same order."""
    index = parts.stream_rows(index_part, "index")

    def images() -> Iterator[tuple[Row, list[Row]]]:
        for image_id, masks in groupby(parts.stream_rows(masks_part, "masks"), key=lambda mask: mask["image_id"]):
            row = next((row for row in index if row["image_id"] == image_id), None)
            assert row is not None, (
                f"{masks_part} holds image {image_id}, which {index_part} does not have in this order"
            )
            yield row, list(masks)

    paired = images()
    while chunk := list(islice(paired, _CHUNK)):
        yield chunk


def _samples(config: Construct, labeller: Labeller, chunk: Chunk) -> Iterator[tuple[Row | None, list[Row]]]:
    tallies = [_Tally() for _ in chunk]
    # Geometry first: what its box rules out need not be named by a network.
    shaped = [
        (row, by_geometry(config.rules, row, masks, tally)) for (row, masks), tally in zip(chunk, tallies, strict=True)
    ]
    for (row, masks), (_, left), tally, labelled in zip(chunk, shaped, tallies, labeller.label(shaped), strict=True):
        yield _sample(config, row=row, masks=masks, left=left, tally=tally, labelled=labelled)


def _sample(
    config: Construct, *, row: Row, masks: Sequence[Row], left: Sequence[Row], tally: _Tally, labelled: Labelled
) -> tuple[Row | None, list[Row]]:
    """The sample of an image (None where it is rejected) and the rejected rows of its objects, labels and itself."""
    for mask in left:
        if mask["object_id"] in labelled.missing:
            tally.drop(mask, labelled.missing[mask["object_id"]])
    candidates = [
        Candidate(mask, labelled.labels[mask["object_id"]]) for mask in left if mask["object_id"] in labelled.labels
    ]
    chosen = choose(config, candidates, labelled.caption, tally)
    reason, detail = _image_reason(config, chosen=chosen, candidates=candidates, labelled=labelled)
    identity = f"{row['shard']}:{row['image_id']}"
    if reason is not None:
        for mask in masks:
            if mask["object_id"] not in tally.reasons:
                tally.drop(mask, Reason.IMAGE_REJECTED, reason)
    dropped = [
        rejected("object", f"{identity}:{mask['object_id']}", *tally.reasons[mask["object_id"]])
        for mask in masks
        if mask["object_id"] in tally.reasons
    ]
    dropped += labelled.rejected
    known = {mask["object_id"] for mask in masks}
    dropped += [
        rejected("label", f"{identity}:{name}"[:300], labels.Reason.UNKNOWN_OBJECT, label.name)
        for name, label in labelled.labels.items()
        if name not in known
    ]
    if reason is not None:
        return None, [*dropped, rejected("image", identity, reason, detail)]
    caption = labelled.caption if labelled.caption is not None else compose([c.label.name for c in chosen])
    return {"caption": caption, "objects": [_object(candidate) for candidate in chosen]}, dropped


def _image_reason(
    config: Construct, *, chosen: Sequence[Candidate], candidates: Sequence[Candidate], labelled: Labelled
) -> tuple[StrEnum | None, str]:
    caption = labelled.caption
    if labelled.reason is not None:
        return labelled.reason, labelled.detail
    if caption == "":
        return Reason.EMPTY_CAPTION, ""
    if len(chosen) >= config.min_objects:
        return None, ""
    if caption is not None and candidates and not any(names(caption, c.label.name) for c in candidates):
        return Reason.CAPTION_WITHOUT_OBJECTS, caption[:200]
    return Reason.TOO_FEW_OBJECTS, f"{len(chosen)}, at least {config.min_objects}"


def _object(candidate: Candidate) -> Row:
    mask, label = candidate.mask, candidate.label
    return {
        "object_id": mask["object_id"],
        "label": label.name,
        "logit": label.logit,
        "margin": label.margin,
        "rle": mask["rle"],
        "box": mask["box"],
        "area": mask["area"],
    }


# The rules, in the order in which they are applied ------------------------------------------------------------------


def by_geometry(rules: Rules, row: Row, masks: Sequence[Row], tally: _Tally) -> list[Row]:
    """The masks whose box has the right size and shape and is filled well enough."""
    left = []
    for mask in masks:
        reason, detail = _geometry(rules, mask, pixels=row["width"] * row["height"])
        if reason is None:
            left.append(mask)
        else:
            tally.drop(mask, reason, detail)
    return left


def _geometry(rules: Rules, mask: Row, *, pixels: int) -> tuple[Reason | None, str]:
    x1, y1, x2, y2 = mask["box"]
    box, aspect = (x2 - x1) * (y2 - y1), (x2 - x1) / (y2 - y1)
    share, fill = box / pixels, mask["area"] / box
    if share <= rules.min_box_area:
        return Reason.BOX_TOO_SMALL, f"{share:.4f} of the image"
    if share >= rules.max_box_area:
        return Reason.BOX_TOO_LARGE, f"{share:.4f} of the image"
    if not rules.min_aspect < aspect < rules.max_aspect:
        return Reason.ASPECT, f"width / height {aspect:.3f}"
    if fill < rules.min_fill:
        return Reason.LOW_FILL, f"{fill:.4f} of the box"
    return None, ""


def choose(config: Construct, candidates: Sequence[Candidate], caption: str | None, tally: _Tally) -> list[Candidate]:
    """The objects of a sample, the surest first. Without a caption none is missed: it will be composed of labels."""
    rules = config.rules
    left: list[Candidate] = []
    for candidate in candidates:
        if candidate.label.logit <= rules.min_logit:
            tally.drop(candidate.mask, Reason.LOW_LOGIT, f"{candidate.label.name} {candidate.label.logit:.4f}")
        elif rules.label_in_caption and caption is not None and not names(caption, candidate.label.name):
            tally.drop(candidate.mask, Reason.NOT_IN_CAPTION, candidate.label.name)
        else:
            left.append(candidate)
    left = _uncrowded(rules, left, tally)
    chosen: list[Candidate] = []
    whole: list[Candidate] = []  # of those that are not inside one another
    for candidate in sorted(left, key=lambda c: -c.label.logit):  # a stable sort: ties keep the file's order
        if any(_containment(candidate.box, other.box) > rules.max_containment for other in whole):
            tally.drop(candidate.mask, Reason.CONTAINED, candidate.label.name)
            continue
        whole.append(candidate)
        if config.distinct_names and any(is_same(candidate.label.name, other.label.name) for other in chosen):
            tally.drop(candidate.mask, Reason.SAME_NAME, candidate.label.name)
        elif len(chosen) == config.max_objects:
            tally.drop(candidate.mask, Reason.SURPLUS, candidate.label.name)
        else:
            chosen.append(candidate)
    return chosen


def _uncrowded(rules: Rules, candidates: Sequence[Candidate], tally: _Tally) -> list[Candidate]:
    """Candidates in whose box few enough of the other candidates' masks show, their own counted."""
    if not candidates:
        return []
    masks = [candidate.mask for candidate in candidates]
    rles = [coco_rle(mask["rle"], width=mask["width"], height=mask["height"]) for mask in masks]
    height, width = masks[0]["height"], masks[0]["width"]
    corners = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in (mask["box"] for mask in masks)]
    described: Any = np.array(corners, np.float64)  # the stubs do not know arrays of boxes
    boxes: Any = coco.frPyObjects(described, height, width)
    # With "crowd" boxes this is the share of each mask that lies inside each box.
    shown = np.asarray(coco.iou(rles, boxes, [1] * len(boxes))) > 0
    left = []
    for number, candidate in enumerate(candidates):
        count = int(shown[:, number].sum())
        if count > rules.max_masks_in_box:
            tally.drop(candidate.mask, Reason.CROWDED_BOX, f"{count} masks")
        else:
            left.append(candidate)
    return left


def _containment(box: Sequence[float], other: Sequence[float]) -> float:
    """Overlap of two boxes over the smaller one's area."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    smaller = min((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
    return max(0.0, width) * max(0.0, height) / smaller
