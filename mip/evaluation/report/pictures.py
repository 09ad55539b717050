"""Pictures of the report: thumbnails, and the grid that compares methods.

Small images are enlarged by whole factors without smoothing, so that every pixel that was generated can be seen.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from mip.errors import DataError
from mip.tables import atomic

_PHOTO = 256  # pixels; from this side on a picture is stored as JPEG
_INK, _QUIET, _GROUND = (29, 33, 38), (86, 94, 104), (255, 255, 255)


@dataclass(frozen=True)
class Row:
    """One row of the grid: a prompt, references by name, images, and labels under them (none, or one an image)."""

    prompt: str
    references: tuple[tuple[str, Image.Image], ...]
    images: tuple[Image.Image, ...]
    labels: tuple[str, ...]


def load(path: Path) -> Image.Image:
    """An RGB image. Raises DataError where it is missing or does not decode."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"there is no image {path}; run the stage that writes it") from None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} does not decode ({error}); delete it and run its stage again") from None


def fit(image: Image.Image, side: int) -> Image.Image:
    """The image within side x side pixels: enlarged by a whole factor without smoothing, or reduced with it."""
    factor = side // max(image.size)
    if factor >= 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    scale = side / max(image.size)
    return image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )


def reduced(image: Image.Image, side: int) -> Image.Image:
    """The image itself, or a smaller one whose longer side is `side` pixels."""
    return image if max(image.size) <= side else fit(image, side)


def data_uri(image: Image.Image) -> str:
    """The picture inside the page: lossless where it is small, JPEG where it is a photograph's size."""
    buffer = io.BytesIO()
    kind = "jpeg" if max(image.size) >= _PHOTO else "png"
    if kind == "jpeg":
        image.save(buffer, format="JPEG", quality=88, subsampling=0)
    else:
        image.save(buffer, format="PNG", optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def file_uri(path: Path) -> str:
    """A PNG file inside the page, byte for byte."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def save(image: Image.Image, path: Path) -> Path:
    """Write a PNG, whole or not at all."""
    with atomic(path) as temporary:
        image.save(temporary, format="PNG")
    return path


def grid(rows: Sequence[Row], *, headers: Sequence[str], cell: int) -> Image.Image:
    """Rows of pictures under their prompts: references first, where there are any, then one image a header.

    `cell` is the side of an image in pixels; two pixels are meant for one CSS pixel.
    """
    stacks = max((len(row.references) + 1) // 2 for row in rows)
    gap, half = cell // 10, cell // 2
    lefts = [gap + stacks * half + (2 * gap if stacks else 0) + n * (cell + gap) for n in range(len(headers))]
    text, strong = _font("DejaVuSans.ttf", cell // 11), _font("DejaVuSans-Bold.ttf", cell // 11)
    width = lefts[-1] + cell + gap
    parts = [_header(headers, lefts=lefts, has_references=stacks > 0, font=strong, cell=cell, width=width)]
    parts += [_row(row, lefts=lefts, font=text, cell=cell, width=width) for row in rows]
    sheet = Image.new("RGB", (width, sum(part.height for part in parts)), _GROUND)
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    return sheet


def _header(
    headers: Sequence[str],
    *,
    lefts: Sequence[int],
    has_references: bool,
    font: ImageFont.FreeTypeFont,
    cell: int,
    width: int,
) -> Image.Image:
    gap = cell // 10
    titles = [(left, _wrapped(title, font, cell)) for left, title in zip(lefts, headers, strict=True)]
    if has_references:
        titles.insert(0, (gap, _wrapped("References", font, cell)))
    strip = Image.new("RGB", (width, gap + _line(font) * max(len(lines) for _, lines in titles)), _GROUND)
    for left, lines in titles:
        _write(strip, lines, left=left, top=gap, font=font, colour=_INK)
    return strip


def _row(row: Row, *, lefts: Sequence[int], font: ImageFont.FreeTypeFont, cell: int, width: int) -> Image.Image:
    gap, half, line = cell // 10, cell // 2, _line(font)
    prompt = _wrapped(row.prompt, font, width - 2 * gap)
    top = gap + line * len(prompt)
    labels = [_wrapped(label, font, cell) for label in row.labels]
    strip = Image.new("RGB", (width, top + cell + line * max(map(len, labels), default=0) + gap // 2), _GROUND)
    _write(strip, prompt, left=gap, top=gap, font=font, colour=_QUIET)
    for n, (_, reference) in enumerate(row.references):
        _paste(strip, reference, left=gap + (n // 2) * half, top=top + (n % 2) * half, side=half)
    if row.references:
        # A thin line keeps the photos, which lie one above the other, apart.
        ImageDraw.Draw(strip).line([(gap, top + half), (lefts[0] - 1, top + half)], fill=_GROUND, width=4)
    for left, image in zip(lefts, row.images, strict=False):  # rows may have fewer images than the widest one
        _paste(strip, image, left=left, top=top, side=cell)
    for left, lines in zip(lefts, labels, strict=False):
        _write(strip, lines, left=left, top=top + cell + 2, font=font, colour=_QUIET)
    return strip


def _write(
    sheet: Image.Image,
    lines: Sequence[str],
    *,
    left: int,
    top: int,
    font: ImageFont.FreeTypeFont,
    colour: tuple[int, int, int],
) -> None:
    pen = ImageDraw.Draw(sheet)
    for number, words in enumerate(lines):
        pen.text((left, top + number * _line(font)), words, fill=colour, font=font)


def _line(font: ImageFont.FreeTypeFont) -> int:
    return round(font.size * 1.35)


def _paste(sheet: Image.Image, image: Image.Image, *, left: int, top: int, side: int) -> None:
    fitted = fit(image, side)
    sheet.paste(fitted, (left + (side - fitted.width) // 2, top + (side - fitted.height) // 2))


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that comes with matplotlib, so that every machine draws the same letters."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width or not lines[-1] else [*lines, word]
    return lines
