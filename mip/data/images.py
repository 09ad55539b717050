"""Images and masks as they lie on disk: byte ranges, decoding within limits, run lengths, cut-outs.

Nothing here trusts its input. Sizes are checked before anything is decoded, and run lengths before they become pixels.
"""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pycocotools import mask as coco

from mip.errors import DataError

BLACK, WHITE = 0, 255
SUFFIXES = (".jpg", ".jpeg", ".png")

_FORMATS = ("JPEG", "PNG")
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_RUN_BITS = 5  # payload of one character of COCO's compressed run lengths
_LONGEST_RUN = 7  # characters; more than any 32-bit run needs


class ImageReason(StrEnum):
    """Why an image cannot be used."""

    BROKEN = "broken_image"
    TOO_LARGE = "too_large"
    WRONG_SIZE = "wrong_size"


class ImageError(DataError):
    """An image that cannot be used, with the reason from the closed list."""

    def __init__(self, reason: ImageReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class RleError(DataError):
    """Run lengths that do not describe a mask of the stated size."""


def is_safe_name(name: str) -> bool:
    """True for a plain file name: no separators, no leading dot or dash, nothing but letters, digits and `_.-`."""
    return _SAFE_NAME.fullmatch(name) is not None


def read_bytes(path: Path, *, offset: int, size: int) -> bytes:
    """`size` bytes of a regular file from `offset`. Raises DataError where they are not all there."""
    if offset < 0 or size < 0:
        raise DataError(f"{path}: got offset {offset} and size {size}; expected none below 0; index the source again")
    if not path.is_file():
        raise DataError(f"there is no file {path}; index the source again if it has moved")
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise DataError(
            f"{path}: got {len(data)} bytes at {offset}, expected {size}; the file has changed: index the source again"
        )
    return data


def decode(
    data: bytes, *, max_pixels: int, reduced: int | None = None, size: tuple[int, int] | None = None
) -> Image.Image:
    """An upright RGB image. Raises ImageError.

    `reduced`: a shorter side of at least that many pixels is enough (a JPEG is then decoded at 1/2, 1/4 or 1/8).
    `size`: the (width, height) that the full image must have.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(ImageReason.TOO_LARGE, str(error)) from None
    except Exception as error:  # decoders of foreign bytes raise nearly anything
        raise ImageError(ImageReason.BROKEN, _one_line(error)) from None
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(ImageReason.TOO_LARGE, f"{width} x {height} pixels, at most {max_pixels} in all")
    try:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # orientations that exchange width and height
        upright = (height, width) if turned else (width, height)
        if size is not None and upright != size:
            raise ImageError(
                ImageReason.WRONG_SIZE, f"image {upright[0]} x {upright[1]}, annotation {size[0]} x {size[1]}"
            )
        if reduced is not None:
            image.draft("RGB", (reduced, reduced))
        image.load()
        return ImageOps.exif_transpose(image).convert("RGB")
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(ImageReason.BROKEN, _one_line(error)) from None


def load(row: Mapping[str, Any], *, reduced: int | None = None) -> Image.Image:
    """The image of a row that names its bytes and size (index, samples, manifest). Raises DataError, or ImageError.

    `extract` has proved the row's size against its own limit, so that size is the limit here.
    """
    data = read_bytes(Path(row["image_path"]), offset=row["image_offset"], size=row["image_size"])
    size = (row["width"], row["height"])
    return decode(data, max_pixels=size[0] * size[1], reduced=reduced, size=size)


def _one_line(error: BaseException) -> str:
    # Addresses of objects differ from run to run; the same input has to give the same bytes.
    return _ADDRESS.sub("", " ".join(f"{type(error).__name__}: {error}".split()))[:200]


def run_lengths(counts: str) -> NDArray[np.int64]:
    """COCO's compressed counts as runs (background first). Raises RleError for characters or runs that cannot be."""
    characters = np.frombuffer(counts.encode("utf-8", "replace"), np.uint8).astype(np.int64) - ord("0")
    if not len(characters):
        raise RleError("the counts are empty")
    if characters.min() < 0 or characters.max() > 63:
        raise RleError("the counts hold characters outside '0' to 'o'")
    is_last = (characters & 32) == 0
    if not is_last[-1]:
        raise RleError("the counts end in the middle of a run")
    ends = np.flatnonzero(is_last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _LONGEST_RUN:
        raise RleError(f"a run is written in {lengths.max()} characters, at most {_LONGEST_RUN}")
    places = np.arange(len(characters)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((characters & 31) << (_RUN_BITS * places), starts)
    runs -= np.where(characters[ends] & 16, np.int64(1) << (_RUN_BITS * lengths), 0)
    # From the fourth run on, each is stored as the difference to the one before the last.
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def check_rle(counts: str, *, width: int, height: int) -> NDArray[np.int64]:
    """The runs, if they cover exactly width x height pixels, else RleError. None of the pixels is allocated."""
    runs = run_lengths(counts)
    if runs.min() < 0:
        raise RleError("a run is negative")
    if runs.max() > width * height or runs.sum() != width * height:
        raise RleError(f"the runs cover {runs.sum()} pixels, expected {width} x {height} = {width * height}")
    return runs


def coco_rle(counts: str, *, width: int, height: int) -> Any:
    """The form that pycocotools takes. Only for counts that `check_rle` has passed."""
    return {"size": [height, width], "counts": counts.encode("ascii")}


def mask_area(counts: str, *, width: int, height: int) -> int:
    """Pixels of a checked mask."""
    return int(coco.area(coco_rle(counts, width=width, height=height)))


def mask_box(counts: str, *, width: int, height: int) -> list[float]:
    """x1, y1, x2, y2 of a checked mask; x2 and y2 are exclusive."""
    x, y, w, h = (float(v) for v in coco.toBbox(coco_rle(counts, width=width, height=height)))
    return [x, y, x + w, y + h]


def encode_mask(mask: NDArray[np.bool_]) -> str:
    """Compressed counts of an H x W mask."""
    encoded: Any = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return encoded["counts"].decode("ascii")


def decode_mask(counts: str, *, width: int, height: int) -> NDArray[np.bool_]:
    """H x W mask. Raises RleError before anything is allocated."""
    runs = check_rle(counts, width=width, height=height)
    is_object = np.arange(len(runs)) % 2 == 1
    return np.ascontiguousarray(np.repeat(is_object, runs).reshape(width, height).T)  # runs go down the columns


def cutout(image: Image.Image, *, rle: str, box: Sequence[float], fill: int) -> Image.Image:
    """The object alone, on a square of gray level `fill` (0-255): other pixels filled, cut to the box, padded.

    The box (xyxy, exclusive, pixels) is cut at the image's edges. Of an odd padding the extra pixel is right or below.
    """
    mask = decode_mask(rle, width=image.width, height=image.height)
    x1, y1, x2, y2 = (round(v) for v in box)
    x1, y1, x2, y2 = max(0, x1), max(0, y1), min(image.width, x2), min(image.height, y2)
    if x2 <= x1 or y2 <= y1:
        raise DataError(
            f"got box {list(box)} in an image of {image.width} x {image.height}; expected x1 < x2 and y1 < y2 inside it"
        )
    pixels = np.where(mask[y1:y2, x1:x2, None], np.asarray(image.crop((x1, y1, x2, y2))), np.uint8(fill))
    return pad_square(Image.fromarray(pixels), fill=fill)


def pad_square(image: Image.Image, *, fill: int) -> Image.Image:
    """The image centred on a square of its longer side; of an odd padding the extra pixel goes right or below."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), (fill, fill, fill))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
