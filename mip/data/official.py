"""The public loader's filter and crops, flaws included: for comparison with recorded results, not for use.

Pure functions of one sample; reading files and replacing a rejected sample by another is the caller's affair. Ours are
`mip.data.samples` (which objects) and `mip.training.crops` (what is shown of them). docs/parity.md lists what differs.

Boxes are x1, y1, x2, y2. Before the square crop they are floats in pixels of the stored image; after it they are
integers in pixels of the crop, and x2, y2 are the last pixels inside.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mip.errors import DataError

AREA = (0.08, 0.7)  # of the stored image
RATIO = (0.3, 3)  # width / height before the crop, height / width after it
MIN_LOGIT = 0.3
VALUES = (2, 5)  # distinct mask values in a box, background included
MIN_FILL = 0.6  # share of the most frequent value, background included
MAX_CONTAINED = 0.8  # overlap / smaller area
MIN_CROPPED_AREA = 200  # pixels of the crop
REFERENCE_SIDE = 224
DROP_RATES = (0.05, 0.05, 0.05)  # image, text, both
CLIP_MEAN_STD = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_WHITE = 255

Box = Sequence[float]
Bytes = NDArray[np.uint8]
Bools = NDArray[np.bool_]
IntBox = tuple[int, int, int, int]


class NoValidBox(DataError):
    """No box passes the rules before the crop."""


class LostObjects(DataError):
    """After the crop, fewer than two boxes pass the rules or the first two have one name."""


@dataclass(frozen=True)
class Annotation:
    """One sample's JSON, without entries that have no box (background); `value` is not read."""

    caption: str
    original_size: tuple[int, int]  # height, width of the image before it was stored
    labels: tuple[str, ...]
    logits: tuple[float, ...]
    boxes: tuple[Box, ...]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "Annotation":
        """From the parsed file; its `original_size` is (width, height)."""
        width, height = content["original_size"]
        boxed = [mask for mask in content.get("final_masks", ()) if "box" in mask]
        labels, logits, boxes = (tuple(mask[key] for mask in boxed) for key in ("label", "logit", "box"))
        return cls(content["text"], (height, width), labels, logits, boxes)


@dataclass(frozen=True, eq=False)
class Entity:
    """An object that is left after the crop."""

    name: str
    box: IntBox
    outside_HW: Bools  # of the box
    mask_HW: Bools  # of the object, filled
    alone_HW3: Bytes  # on white, cut to its box and padded to a square, or to one pixel less


@dataclass(frozen=True, eq=False)
class Prepared:
    """A sample as it is trained on, before normalisation and dropout."""

    chosen: tuple[int, ...]  # places among the annotation's boxes, by descending logit
    top_left: tuple[int, int]  # as given to the UNet
    image_HW3: Bytes
    segments_HW: Bytes
    entities: tuple[Entity, ...]


def prepare(
    annotation: Annotation, image: Image.Image, segments: Image.Image, *, size: int, rng: Random, max_objects: int
) -> Prepared:
    """Choose the boxes, cut the square and the objects.

    Args:
        annotation: of this image.
        image: any mode.
        segments: mode L, of the image's size; one value for each object, 0 for the background.
        size: side of the square, pixels.
        rng: draws the place of the square, and nothing else.
        max_objects: how many are kept; the public code's default is 2.

    Raises:
        NoValidBox: none passes the rules before the crop.
        LostObjects: too few pass those after it.
    """
    chosen = choose_boxes(annotation, np.asarray(segments))
    if not chosen:
        raise NoValidBox("got a sample in which no box passes the filter; the public code takes another sample")
    start = draw_start(rng, annotation.boxes, width=image.width, height=image.height)
    pixels_HW3 = np.asarray(crop_square(image.convert("RGB"), start, size=size, resample=Image.Resampling.BILINEAR))
    segments_HW, *outside = (
        np.asarray(crop_square(one, start, size=size, resample=Image.Resampling.NEAREST))
        for one in (segments, *(_outside(annotation.boxes[place], segments.size) for place in chosen))
    )
    named = zip((annotation.labels[place] for place in chosen), outside, strict=True)
    entities = tuple(_entities(named, pixels_HW3, segments_HW))[:max_objects]
    if len(entities) < 2 or entities[0].name == entities[1].name:
        found = ", ".join(entity.name for entity in entities) or "no object"
        raise LostObjects(f"got {found} after the crop; expected two or more, the first two of different names")
    return Prepared(
        chosen=tuple(chosen),
        top_left=top_left(start, width=image.width, height=image.height, size=size),
        image_HW3=pixels_HW3,
        segments_HW=segments_HW,
        entities=entities,
    )


def choose_boxes(annotation: Annotation, segments_HW: Bytes) -> list[int]:
    """Places of the boxes that pass every rule before the crop, by descending logit."""
    chosen: list[int] = []
    for place in sorted(range(len(annotation.boxes)), key=lambda place: -annotation.logits[place]):
        box, label = annotation.boxes[place], annotation.labels[place]
        is_named = " " not in label and label in annotation.caption
        is_sure = annotation.logits[place] > MIN_LOGIT
        if is_named and is_sure and _has_good_shape(box, segments_HW.size) and _is_filled(box, segments_HW):
            if all(_contained(box, annotation.boxes[other]) <= MAX_CONTAINED for other in chosen):
                chosen.append(place)
    return chosen


def _has_good_shape(box: Box, pixels: int) -> bool:
    is_sized = AREA[0] < _area(box) / pixels < AREA[1]
    return is_sized and RATIO[0] < (box[2] - box[0]) / (box[3] - box[1]) < RATIO[1]


def _is_filled(box: Box, segments_HW: Bytes) -> bool:
    inside = _window(segments_HW, box)
    values, counts = np.unique(inside, return_counts=True)
    if not VALUES[0] <= len(values) <= VALUES[1] or counts.max() < MIN_FILL * inside.size:
        return False
    return int((segments_HW == _object_value(inside)).sum()) <= _area(box)


def _object_value(inside: Bytes) -> int:
    """The most frequent value but the lowest, which is taken for the background whatever it is."""
    values, counts = np.unique(inside, return_counts=True)
    # Recorded samples survive with one value in a box; what is cut out of them then is not recorded, and a guess.
    return int(values[1:][counts[1:].argmax()] if len(values) > 1 else values[0])


def _contained(box: Box, other: Box) -> float:
    width, height = (max(0.0, min(box[k + 2], other[k + 2]) - max(box[k], other[k])) for k in (0, 1))
    return width * height / min(_area(box), _area(other))


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _window(values_HW: Bytes, box: Box) -> Bytes:
    x1, y1, x2, y2 = map(int, box)
    return values_HW[y1:y2, x1:x2]


def draw_start(rng: Random, boxes: Sequence[Box], *, width: int, height: int) -> tuple[int, int] | None:
    """Left and top of the largest square that holds all annotated boxes, also rejected ones; None where none does."""
    side = min(width, height)
    lows = [max(0, max(box[axis + 2] for box in boxes) - side) for axis in (0, 1)]
    highs = [min(length - side, min(box[axis] for box in boxes)) for axis, length in enumerate((width, height))]
    if any(low > high for low, high in zip(lows, highs, strict=True)):
        return None
    # Both are drawn, left first, though one of them can only be 0: the draw uses up random numbers.
    left, top = (rng.randint(int(low), int(high)) for low, high in zip(lows, highs, strict=True))
    return left, top


def top_left(start: tuple[int, int] | None, *, width: int, height: int, size: int) -> tuple[int, int]:
    """What the UNet is told of the crop: stored pixels, or in the centre crop a difference that means nothing."""
    return ((height - size) // 2, (width - size) // 2) if start is None else (start[1], start[0])


def crop_square(
    image: Image.Image, start: tuple[int, int] | None, *, size: int, resample: Image.Resampling
) -> Image.Image:
    """The largest square at `start` (left, top) resized to `size`; without one, resized first and cut at its centre."""
    side = min(image.size)
    if start is not None:
        return image.crop((*start, start[0] + side, start[1] + side)).resize((size, size), resample)
    width, height = (size if length == side else int(size * length / side) for length in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), resample).crop((left, top, left + size, top + size))


def _outside(box: Box, size: tuple[int, int]) -> Image.Image:
    """Mode L: 0 in the truncated box, its last pixels included, 1 elsewhere."""
    values_HW = np.ones((size[1], size[0]), np.uint8)
    x1, y1, x2, y2 = map(int, box)
    values_HW[y1 : y2 + 1, x1 : x2 + 1] = 0
    return Image.fromarray(values_HW)


def _entities(named: Iterable[tuple[str, Bytes]], pixels_HW3: Bytes, segments_HW: Bytes) -> Iterator[Entity]:
    """Those whose box passes the rules after the crop."""
    for name, outside_HW in named:
        if (box := cropped_box(outside_HW)) is not None:
            mask_HW = fill_cavity(segments_HW == _object_value(_window(segments_HW, box)))
            yield Entity(name, box, outside_HW != 0, mask_HW, cut_entity(pixels_HW3, mask_HW, box))


def cropped_box(outside_HW: Bytes) -> IntBox | None:
    """Where the map is 0; None for a box that is empty, small or thin. Its last pixels are inside."""
    rows, columns = np.nonzero(outside_HW == 0)
    if not len(rows):
        return None
    x1, y1, x2, y2 = (int(end) for end in (columns.min(), rows.min(), columns.max(), rows.max()))
    is_large = (x2 - x1) * (y2 - y1) > MIN_CROPPED_AREA
    return (x1, y1, x2, y2) if is_large and RATIO[0] < (y2 - y1) / (x2 - x1) < RATIO[1] else None


def fill_cavity(mask_HW: Bools) -> Bools:
    """Pixels with some but not all of the mask at or before them, both in their row and in their column.

    It closes holes, but also concave sides, and loses the last pixel of every row and column.
    """
    inside_HW = np.ones_like(mask_HW)
    for axis in (0, 1):
        before_HW = mask_HW.cumsum(axis=axis)
        inside_HW &= (before_HW > 0) & (before_HW < before_HW.max(axis=axis, keepdims=True))
    return inside_HW


def cut_entity(pixels_HW3: Bytes, mask_HW: Bools, box: IntBox) -> Bytes:
    """The object on white, without the box's last row and column, padded by half the difference on both sides."""
    x1, y1, x2, y2 = box
    alone_HW3 = np.where(mask_HW[..., None], pixels_HW3, _WHITE).astype(np.uint8)[y1:y2, x1:x2]
    half = abs((x2 - x1) - (y2 - y1)) // 2
    rows, columns = (half, 0) if x2 - x1 > y2 - y1 else (0, half)
    return np.pad(alone_HW3, ((rows, rows), (columns, columns), (0, 0)), constant_values=_WHITE)


def draw_view(generator: torch.Generator, *, height: int, width: int) -> tuple[bool, tuple[int, int]]:
    """Whether an entity crop is mirrored, and top and left of the reference in it once resized, of these sizes."""
    is_mirrored = bool(torch.rand(1, generator=generator) < 0.5)
    spare = (height - REFERENCE_SIDE, width - REFERENCE_SIDE)
    # A crop of the reference's own size uses up no random number.
    draws = [int(torch.randint(most + 1, (1,), generator=generator)) for most in spare] if any(spare) else [0, 0]
    return is_mirrored, (draws[0], draws[1])


def resized_shape(alone_HW3: Bytes) -> tuple[int, int]:
    """Height and width of an entity crop once its shorter side has the reference's length."""
    height, width = alone_HW3.shape[:2]
    scale = min(height, width)
    return int(REFERENCE_SIDE * height / scale), int(REFERENCE_SIDE * width / scale)


def reference_pixels(alone_HW3: Bytes, *, offset: tuple[int, int], is_mirrored: bool, antialias: bool) -> Tensor:
    """What the image encoder reads: (3, 224, 224), float32, normalised.

    Args:
        alone_HW3: an entity crop.
        offset: top and left of the reference in the resized crop.
        is_mirrored: left and right change places.
        antialias: False as in torchvision 0.14, which the public code pins; True as in torchvision 0.17 and later.
    """
    pixels_13HW = torch.from_numpy(np.ascontiguousarray(alone_HW3)).permute(2, 0, 1)[None].float() / _WHITE
    pixels_13HW = pixels_13HW.flip(-1) if is_mirrored else pixels_13HW
    resized_13HW = F.interpolate(pixels_13HW, size=resized_shape(alone_HW3), mode="bilinear", antialias=antialias)
    top, left = offset
    cut_3HW = resized_13HW[0, :, top : top + REFERENCE_SIDE, left : left + REFERENCE_SIDE]
    mean_311, std_311 = torch.tensor(CLIP_MEAN_STD).reshape(2, 3, 1, 1)
    return (cut_3HW - mean_311) / std_311


def dropped(draw: float, rates: Sequence[float] = DROP_RATES) -> tuple[bool, bool]:
    """Whether a draw from [0, 1) drops the images and the text; the sums of floats are not rounded."""
    image, text, both = rates
    is_both = image + text <= draw < image + text + both
    return draw < image or is_both, image <= draw < image + text or is_both


def find_name(ids: Sequence[int], name: Sequence[int]) -> tuple[int, int]:
    """Place of a name's tokens in a prompt's, or -1, and their number; the last place is not looked at."""
    for start in range(len(ids) - len(name)):
        if list(ids[start : start + len(name)]) == list(name):
            return start, len(name)
    return -1, len(name)
