"""Contact sheets: samples as small pictures with their objects framed and a few words below."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mip.data.images import load
from mip.errors import DataError
from mip.tables import Row, atomic

_CELL = 160  # pixels of a picture's side
_TEXT = 13  # pixels of a line
_LINES = 3
_COLUMNS = 8
_COLOURS = ((230, 60, 50), (40, 110, 230), (30, 150, 70), (200, 130, 20), (140, 60, 190))


@dataclass(frozen=True)
class Tile:
    """One picture: a row that names its image's bytes and its objects, and the lines below it."""

    row: Row
    lines: tuple[str, ...]


def write_sheet(path: Path, tiles: Sequence[Tile], *, title: str) -> Path:
    """Write a PNG with all tiles, eight a line, under a title."""
    rows = max(1, -(-len(tiles) // _COLUMNS))
    cell, head = _CELL + _LINES * _TEXT + 8, 24
    sheet = Image.new("RGB", (_COLUMNS * (_CELL + 8) + 8, head + rows * cell + 8), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    draw.text((8, 6), title, fill="black", font=ImageFont.load_default(size=13))
    for number, tile in enumerate(tiles):
        left, top = 8 + number % _COLUMNS * (_CELL + 8), head + number // _COLUMNS * cell + 4
        sheet.paste(_picture(tile.row), (left, top))
        for line, text in enumerate(tile.lines[:_LINES]):
            draw.text((left, top + _CELL + 2 + line * _TEXT), _fitted(text, font), fill="black", font=font)
    with atomic(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path


def _picture(row: Row) -> Image.Image:
    """A square of _CELL pixels; gray where the image cannot be read."""
    square = Image.new("RGB", (_CELL, _CELL), (200, 200, 200))
    try:
        image = load(row, reduced=_CELL)
    except DataError:
        return square
    scale = _CELL / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    draw = ImageDraw.Draw(image)
    factor = image.width / row["width"]  # of the stored image, in whose pixels the boxes are
    for number, thing in enumerate(row["objects"]):
        x1, y1, x2, y2 = (side * factor for side in thing["box"])
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=_COLOURS[number % len(_COLOURS)], width=2)
    square.paste(image, ((_CELL - image.width) // 2, (_CELL - image.height) // 2))
    return square


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= _CELL:
        return text
    while text and font.getlength(text + "...") > _CELL:
        text = text[:-1]
    return text + "..."
