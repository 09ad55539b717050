"""The profile's files as the report reads them, with a record of every file that is shown."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from mip.config import Paths
from mip.errors import DataError
from mip.evaluation.benchmarks import load_reference
from mip.evaluation.report import figures as charts
from mip.evaluation.report import pictures
from mip.tables import Row, file_hash, read_rows

Block = dict[str, Any]  # what a template shows

SHOWN = 384  # pixels; larger pictures are reduced for the page
_CRISP = 192  # pixels; smaller pictures are shown without smoothing
_CELL = 256  # pixels of an image in a sheet of figures/: 128 CSS pixels
ABSENT = "-"  # where a table has no value


@dataclass(frozen=True)
class Source:
    """A file behind a block, and the command that makes it."""

    shown: str
    command: str
    path: str
    sha256: str


@dataclass(frozen=True)
class Picture:
    """An image inside the page; `label` is printed under it, `alt` is read out."""

    uri: str
    width: int
    height: int
    alt: str
    label: str
    is_small: bool


@dataclass(frozen=True)
class Chart:
    """A chart for both colour schemes; `file` is relative to report.md."""

    title: str
    note: str
    alt: str
    file: str
    uri: str
    dark_uri: str
    width: int  # CSS pixels
    height: int


class Inputs:
    """The profile's files, with a record of which ones were shown."""

    def __init__(self, paths: Paths, methods: Sequence[str], *, figures: Path) -> None:
        self.paths = paths
        self.root = paths.reports.parent.parent
        self.figures = figures  # charts and sheets are drawn here
        self.methods = methods
        self.files: dict[tuple[str, str], Source] = {}
        for stage, path in _required(paths):
            _existing(path, stage)  # before minutes of drawing
        self.tasks = read_rows(paths.index / "tasks.parquet", "tasks")
        self._images: dict[tuple[str, str], Path] = {}
        for method in methods:
            folder = paths.images / method
            for row in read_rows(folder / "images.parquet", "images"):
                self._images[method, row["task_id"]] = folder / row["path"]

    def source(self, shown: str, stage: str, path: Path) -> Source:
        """Record that `path`, an output of `stage`, is shown. Raises DataError where it is missing."""
        name = _existing(path, stage).relative_to(self.root).as_posix()
        if (shown, name) not in self.files:
            self.files[shown, name] = Source(shown, f"dvc repro {stage}", name, file_hash(path))
        return self.files[shown, name]

    def image(self, method: str, task_id: str) -> Image.Image:
        """The image of a method for a task. Raises DataError where there is none."""
        if (method, task_id) not in self._images:
            raise DataError(f"{method} has no image of task {task_id}; run `dvc repro generate`")
        return pictures.load(self._images[method, task_id])

    def references(self, task: Row) -> list[tuple[str, Image.Image]]:
        """The first image of each reference, as the methods see it."""
        shown = []
        for reference in task["references"]:
            if not reference["images"]:
                raise DataError(
                    f"reference {reference['concept']!r} of task {task['task_id']} has no image; run `dvc repro ingest`"
                )
            box = reference["boxes"][0] if reference["boxes"] else None
            shown.append((reference["name"], load_reference(self.root / reference["images"][0], box)))
        return shown

    def chart(self, name: str, draw: Callable[[charts.Theme], Figure], *, title: str, note: str, alt: str) -> Chart:
        """Draw a chart as figures/<name>.png, and its dark twin."""
        light, dark = charts.save(draw, self.figures / f"{name}.png")
        with Image.open(light) as image:
            width, height = (round(side * 96 / charts.DPI) for side in image.size)
        return Chart(
            title, note, alt, f"figures/{light.name}", pictures.file_uri(light), pictures.file_uri(dark), width, height
        )

    def sheet(self, name: str, rows: Sequence[pictures.Row], *, headers: Sequence[str]) -> str:
        """Write rows of pictures as figures/<name>.png; returns its path relative to report.md."""
        pictures.save(pictures.grid(rows, headers=headers, cell=_CELL), self.figures / f"{name}.png")
        return f"figures/{name}.png"


def _required(paths: Paths) -> list[tuple[str, Path]]:
    """Stage and file of every table and sheet that the report cannot do without."""
    lossy = [("ingest", paths.index), ("extract", paths.masks), ("construct", paths.samples), ("score", paths.scores)]
    manifest = ("train.parquet", "val.parquet", "rejected.parquet", "funnel.json", "accepted.png", "rejected.png")
    return [
        ("ingest", paths.index / "tasks.parquet"),
        *((stage, folder / "rejected.parquet") for stage, folder in lossy),
        *(("manifest", paths.manifest / name) for name in manifest),
        ("train", paths.adapter / "curve.parquet"),
        *(("evaluate", paths.reports / f"{name}.parquet") for name in ("per_task", "per_combination")),
    ]


def _existing(path: Path, stage: str) -> Path:
    if not path.exists():
        raise DataError(f"there is no {path}; run `dvc repro {stage}`")
    return path


def picture(image: Image.Image, *, alt: str, label: str = "", side: int = SHOWN) -> Picture:
    """An image for the page, reduced to `side` pixels where it is larger."""
    shown = pictures.reduced(image, side)
    return Picture(pictures.data_uri(shown), *shown.size, alt=alt, label=label, is_small=max(shown.size) < _CRISP)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises DataError where it is missing or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"there is no {path}; run the stage that writes it") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); delete it and run its stage again") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} holds {type(content).__name__}; expected an object; run its stage again")
    return content


def plain(value: object) -> str:
    """Nested JSON in one readable line; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(part)}" for key, part in value.items())
    if isinstance(value, list):
        return "; ".join(map(plain, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3f}"
