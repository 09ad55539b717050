"""Checks of single fields that users write: names, numbers, boxes, polygons, mask files. Each raises Refused."""

import io
import json
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco

from mip.data.fields import finite, is_text
from mip.data.images import encode_mask
from mip.data.problems import Reason, Refused

MAX_PIXELS = 100_000_000  # of an image or mask; `extract` has a limit of its own

_MARGIN = 1.0  # pixels by which a polygon may lie outside its image
_OUTLINE = 64  # times width + height: more boundary than any outline has, and pycocotools allocates all of it
_HIGHEST = (1 << 16) - 1  # level of a mask
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_GRAY = ("1", "L", "P", "I;16", "I")


def json_of(data: bytes) -> Any:
    """Parsed JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refused(Reason.BAD_JSON, f"{type(error).__name__}: {error}"[:200]) from None


def label_of(value: Any) -> str:
    """A name."""
    if not is_text(value) or not value.strip():
        raise Refused(Reason.BAD_LABEL, f"got label {_short(value)}")
    return " ".join(value.split())


def caption_of(value: Any) -> str:
    """A caption."""
    if not is_text(value) or not value.strip():
        raise Refused(Reason.BAD_CAPTION, f"got caption {_short(value)}")
    return " ".join(value.split())


def score_of(value: Any, *, unit: bool = True) -> float:
    """A finite number, from 0 to 1 if `unit`."""
    score = finite(value)
    if score is None or (unit and not 0 <= score <= 1):
        raise Refused(Reason.BAD_SCORE, f"got score {_short(value)}")
    return score


def value_of(value: Any) -> int:
    """A mask's level; 7.0 is 7, as tables with gaps have it."""
    level = finite(value)
    if level is None or level != int(level) or not 1 <= level <= _HIGHEST:
        raise Refused(Reason.BAD_VALUE, f"got value {_short(value)}")
    return int(level)


def box_of(value: Any) -> tuple[float, ...]:
    """x1, y1, x2, y2 in pixels."""
    corners = [finite(v) for v in value] if isinstance(value, list | tuple) else []
    box = tuple(v for v in corners if v is not None)
    if len(corners) != 4 or len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
        raise Refused(Reason.BAD_BOX, f"got box {_short(value)}")
    return box


def polygon_mask(value: Any, *, width: int, height: int) -> dict[str, Any]:
    """Run lengths of the union of polygons [[x1, y1, x2, y2, ...], ...]."""
    parts = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    outline = 0.0
    for part in parts:
        corners = [finite(v) for v in part] if isinstance(part, list) else []
        if len(corners) < 6 or len(corners) % 2 or None in corners:
            raise Refused(Reason.BAD_POLYGON, f"got polygon {_short(part)}")
        points = np.asarray(corners, np.float64).reshape(-1, 2)
        if points.min() < -_MARGIN or (points > (width + _MARGIN, height + _MARGIN)).any():
            low, high = points.min(axis=0).tolist(), points.max(axis=0).tolist()
            raise Refused(Reason.BAD_POLYGON, f"got a polygon from {low} to {high} in an image of {width} x {height}")
        outline += float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())
    if outline > _OUTLINE * (width + height):
        raise Refused(Reason.BAD_POLYGON, f"got an outline of {outline:.0f} pixels in an image of {width} x {height}")
    merged: Any = coco.merge(coco.frPyObjects(parts, height, width))
    if coco.area(merged) == 0:
        raise Refused(Reason.EMPTY_MASK, f"got polygon {_short(value)}, which covers no pixel")
    return {"size": [height, width], "counts": merged["counts"].decode("ascii")}


def level_mask(
    levels: NDArray[np.integer], *, value: int | None, box: Sequence[float] | None, name: str
) -> dict[str, Any]:
    """Run lengths of the pixels of one level; of all that are not 0 where `value` is None and there is one such level.

    `box`: what the object's box is said to be, to notice a level that is another object's.
    """
    if value is None and len(np.unique(levels[levels != 0])) > 1:
        raise Refused(Reason.AMBIGUOUS_MASK, f"{name} holds {_present(levels)}")
    mask = levels != 0 if value is None else levels == value
    if not mask.any():
        raise Refused(Reason.EMPTY_MASK, f"got value {value}; {name} holds {_present(levels)}")
    if box is not None:
        x1, y1, x2, y2 = (max(0, v) for v in (int(box[0]), int(box[1]), math.ceil(box[2]), math.ceil(box[3])))
        if not mask[y1:y2, x1:x2].any():
            raise Refused(Reason.MASK_OUTSIDE_BOX, f"got value {value}, of which {name} has nothing in box {list(box)}")
    return {"size": list(mask.shape), "counts": encode_mask(mask)}


def image_size(data: bytes, *, name: str) -> tuple[int, int]:
    """(width, height) of a JPEG or PNG, upright. Only its header is read."""
    image = _opened(data, formats=("JPEG", "PNG"), name=name, reason=Reason.BROKEN_IMAGE)
    try:
        turned = image.getexif().get(0x0112, 1) in _TURNED
    except Exception as error:
        raise Refused(Reason.BROKEN_IMAGE, f"got {name}: {type(error).__name__}") from None
    return (image.height, image.width) if turned else image.size


def mask_levels(data: bytes, *, size: tuple[int, int] | None, name: str) -> NDArray[np.integer]:
    """H x W levels of a mask file; `size` is the (width, height) that it must have, None where that is unknown."""
    image = _opened(data, formats=("PNG",), name=name, reason=Reason.BAD_MASK)
    if image.mode not in _GRAY:
        raise Refused(Reason.BAD_MASK, f"got {name} of mode {image.mode}")
    if size is not None and image.size != size:
        given = f"got {name} of {image.width} x {image.height}, its image is {size[0]} x {size[1]}"
        raise Refused(Reason.WRONG_SIZE, given)
    try:
        levels = np.asarray(image)
    except Exception as error:  # decoders of foreign bytes raise nearly anything
        raise Refused(Reason.BAD_MASK, f"got {name}: {type(error).__name__}") from None
    return levels.astype(np.uint8) if levels.dtype == np.bool_ else levels


def _opened(data: bytes, *, formats: tuple[str, ...], name: str, reason: Reason) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        raise Refused(Reason.TOO_LARGE, f"got {name}: {error}") from None
    except Exception:
        raise Refused(reason, f"got {name}, which is no {' or '.join(formats)}") from None
    if image.width * image.height > MAX_PIXELS:
        raise Refused(Reason.TOO_LARGE, f"got {name} of {image.width} x {image.height} pixels, at most {MAX_PIXELS}")
    return image


def _present(levels: NDArray[np.integer]) -> str:
    present = np.unique(levels).tolist()
    return ", ".join(map(str, present[:12])) + (", ..." if len(present) > 12 else "")


def _short(value: Any) -> str:
    return repr(value)[:80]
