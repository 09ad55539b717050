"""What the objects of an image are called: from label files, or by open_clip over a vocabulary.

A label file is <shard>.labels.jsonl, one image a line:
    {"image_id": "sa_12", "caption": "a ball", "labels": [{"object_id": "3", "label": "ball", "logit": 0.83}]}
A caption that is null is composed of the labels of the chosen objects.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mip.config import Construct, GivenLabels, OpenClipLabels
from mip.data.fields import finite, is_text
from mip.data.images import BLACK, cutout, load
from mip.errors import ConfigError, DataError
from mip.tables import Row, file_hash, rejected


class Reason(StrEnum):
    """Why a label, or a line of labels, is rejected."""

    BAD_LINE = "bad_line"
    DUPLICATE_LINE = "duplicate_line"
    BAD_LABEL = "bad_label"
    DUPLICATE_LABEL = "duplicate_label"
    UNKNOWN_OBJECT = "unknown_object"
    NO_LABELS = "no_labels"
    NO_LABEL = "no_label"
    LOW_MARGIN = "low_margin"
    UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Label:
    """The name of an object."""

    name: str
    logit: float  # confidence: as the file says, or the probability among the vocabulary
    margin: float | None  # cosine of the best name less that of the second; None where labels are given


@dataclass(frozen=True)
class Labelled:
    """An image's labels by object id. `caption` is None where there is none; `reason` rejects the whole image."""

    labels: Mapping[str, Label]
    caption: str | None
    rejected: list[Row] = field(default_factory=list)  # of unit label: what the file says and could not be used
    missing: Mapping[str, Reason] = field(default_factory=dict)  # objects without a usable label
    reason: Reason | None = None
    detail: str = ""


class Labeller(Protocol):
    """Anything that names objects."""

    identity: str  # for lineage: a hash of the weights or of the file
    rejected: list[Row]  # what was wrong before any image was seen

    def label(self, images: Sequence[tuple[Row, Sequence[Row]]]) -> list[Labelled]:
        """Name the masks of each (index row, mask rows); one answer an image."""
        ...


def labeller(config: Construct, *, shard: str, labels_folder: Path | None) -> Labeller:
    """The labeller of the configuration for one shard.

    `labels_folder` holds what the source brings; `construct.labels.path` wins over it. Raises ConfigError where labels
    should be given and are not, DataError for a missing file.
    """
    labels = config.labels
    if isinstance(labels, GivenLabels) and labels.path is not None:
        labels_folder = Path(labels.path)
    file = labels_folder / f"{shard}.labels.jsonl" if labels_folder is not None else None
    if isinstance(labels, OpenClipLabels):
        return OpenClipLabeller(labels, captions=GivenLabeller(file) if file is not None and file.is_file() else None)
    if file is None:
        raise ConfigError(
            "construct.labels.path is null and the source brings no labels; name a folder, or use kind: open_clip"
        )
    if not file.is_file():
        raise DataError(
            f"there is no label file {file}; write one for each shard, or use construct.labels.kind: open_clip"
        )
    return GivenLabeller(file)


class GivenLabeller:
    """Labels and captions from a shard's file."""

    def __init__(self, file: Path) -> None:
        self.identity = file_hash(file)
        self.rejected: list[Row] = []
        self._lines: dict[str, dict[str, Any]] = {}
        for number, text in enumerate(_lines(file), start=1):
            line, problem = _parsed(text)
            if line is None:
                self.rejected.append(rejected("line", f"{file.name}:{number}", Reason.BAD_LINE, problem))
            elif line["image_id"] in self._lines:
                self.rejected.append(
                    rejected("line", f"{file.name}:{number}", Reason.DUPLICATE_LINE, "the first one is kept")
                )
            else:
                self._lines[line["image_id"]] = line

    def caption(self, image_id: str) -> str | None:
        """The caption of an image, None where there is no line for it."""
        line = self._lines.get(image_id)
        return None if line is None else line["caption"]

    def label(self, images: Sequence[tuple[Row, Sequence[Row]]]) -> list[Labelled]:
        return [self._label(row, masks) for row, masks in images]

    def _label(self, row: Row, masks: Sequence[Row]) -> Labelled:
        line = self._lines.get(row["image_id"])
        if line is None:
            return Labelled({}, None, reason=Reason.NO_LABELS)
        labels: dict[str, Label] = {}
        dropped: list[Row] = []
        for position, entry in enumerate(line["labels"]):
            name, label = _label(entry)
            if label is not None and name not in labels:
                labels[name] = label
                continue
            problem = Reason.BAD_LABEL if label is None else Reason.DUPLICATE_LABEL
            identity = f"{row['shard']}:{row['image_id']}:{name or f'#{position}'}"
            dropped.append(rejected("label", identity[:300], problem, str(entry)[:200]))
        missing = {name: Reason.NO_LABEL for name in {mask["object_id"] for mask in masks} - labels.keys()}
        return Labelled(labels, line["caption"], rejected=dropped, missing=missing)


def _lines(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8", errors="replace") as lines:
        yield from (line for line in lines if line.strip())


def _parsed(text: str) -> tuple[dict[str, Any] | None, str]:
    """A line with image_id, caption and labels, or None and what is wrong with it."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        return None, " ".join(str(error).split())[:200]
    if not isinstance(line, dict) or not isinstance(line.get("image_id"), str):
        return None, "expected an object with a string `image_id`"
    caption, labels = line.get("caption"), line.get("labels", [])
    if "caption" not in line or not (caption is None or is_text(caption)):
        return None, f"got caption {str(caption)[:50]!r}; expected null or a string of at most 1000 characters"
    if not isinstance(labels, list):
        return None, "expected a list `labels`"
    caption = " ".join(caption.split()) if caption is not None else None
    return {"image_id": line["image_id"], "caption": caption, "labels": labels}, ""


def _label(entry: Any) -> tuple[str, Label | None]:
    """(object id, label); None for a label without a name or a finite confidence."""
    if not isinstance(entry, dict):
        return "", None
    identity, name, logit = str(entry.get("object_id", "")), entry.get("label"), finite(entry.get("logit"))
    if not is_text(identity):
        return "", None
    if not identity or not is_text(name) or not name.strip() or logit is None:
        return identity, None
    return identity, Label(" ".join(name.split()), logit, None)


class OpenClipLabeller:
    """Zero-shot classification of each object, cut out on black, over a vocabulary."""

    def __init__(self, config: OpenClipLabels, *, captions: GivenLabeller | None) -> None:
        from mip.data import openclip  # torch, and only here: the other labellers do without

        if len(set(config.vocabulary)) < 2 or "{}" not in config.template:
            raise ConfigError(
                f"got vocabulary {list(config.vocabulary)} and template {config.template!r} in construct.labels; "
                "expected two names or more and a template with {}"
            )
        self.min_margin, self.vocabulary = config.min_margin, tuple(dict.fromkeys(config.vocabulary))
        self.encoder = openclip.load(config.model)
        self.identity, self.captions = self.encoder.identity, captions
        self.rejected: list[Row] = [] if captions is None else captions.rejected
        self.texts = self.encoder.encode_texts([config.template.replace("{}", name) for name in self.vocabulary])

    def label(self, images: Sequence[tuple[Row, Sequence[Row]]]) -> list[Labelled]:
        loaded = [_loaded(row) if masks else None for row, masks in images]
        crops = (
            cutout(image, rle=mask["rle"], box=mask["box"], fill=BLACK)
            for image, (_, masks) in zip(loaded, images, strict=True)
            if isinstance(image, Image.Image)
            for mask in masks
        )
        features = iter(self.encoder.encode_images(crops))
        answers: list[Labelled] = []
        for image, (row, masks) in zip(loaded, images, strict=True):
            if isinstance(image, DataError):
                answers.append(Labelled({}, None, reason=Reason.UNREADABLE, detail=str(image)))
                continue
            named = {mask["object_id"]: self._label(next(features) @ self.texts.T) for mask in masks}
            sure = {name: label for name, label in named.items() if (label.margin or 0.0) >= self.min_margin}
            caption = self.captions.caption(row["image_id"]) if self.captions is not None else None
            answers.append(
                Labelled(sure, caption, missing={name: Reason.LOW_MARGIN for name in named if name not in sure})
            )
        return answers

    def _label(self, cosines: NDArray[np.float32]) -> Label:
        order = np.argsort(-cosines, kind="stable")
        best, second = float(cosines[order[0]]), float(cosines[order[1]])
        odds = np.exp(self.encoder.logit_scale * (cosines.astype(np.float64) - best))
        return Label(self.vocabulary[order[0]], float(1 / odds.sum()), best - second)


def _loaded(row: Row) -> Image.Image | DataError:
    try:
        return load(row)
    except DataError as error:
        return error
