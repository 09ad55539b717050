"""All that a reader of a benchmark finds at once: tasks, what is left out, and what keeps the whole from being read."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from mip.errors import DataError
from mip.evaluation.benchmarks import IMAGE_SUFFIXES, Reason
from mip.tables import Row, rejected

_ORIENTATION, _LYING = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that exchange width and height


class Fault(StrEnum):
    """What is wrong with a benchmark, beside the reasons of `benchmarks.Reason`."""

    MISSING_FILE = "missing_file"
    BAD_FILE = "bad_file"  # not JSON, not YAML, not text, or without what it should hold
    BAD_ENTRY = "bad_entry"  # one entry of a file is not what it should be
    MISSING_IMAGE = "missing_image"
    UNKNOWN_SUBJECT = "unknown_subject"
    BAD_PLACEHOLDER = "bad_placeholder"  # a prompt has {2} and there are two subjects
    NOT_NAMED = "not_named"  # a prompt does not name a reference
    BAD_SEEDS = "bad_seeds"


@dataclass
class Survey:
    """What lies in a benchmark."""

    tasks: list[Row] = field(default_factory=list)
    dropped: list[Row] = field(default_factory=list)  # left out; the rest can be used
    faults: list[Row] = field(default_factory=list)  # with one of these, nothing can be used
    notes: list[str] = field(default_factory=list)  # nothing is wrong, but a reader of the results should know

    def fault(self, identity: str, reason: Fault, detail: str) -> None:
        """Add one that keeps the whole from being read."""
        self.faults.append(rejected("file", identity, reason, detail))

    def drop(self, unit: str, identity: str, reason: Fault | Reason, detail: str) -> None:
        """Add one that leaves something out."""
        self.dropped.append(rejected(unit, identity, reason, detail))

    def result(self, path: Path) -> tuple[list[Row], list[Row]]:
        """The tasks and what was left out, as tables have it. Raises DataError that names every fault."""
        if self.faults:
            said = "; ".join(f"{row['id']}: {row['detail']}" for row in self.faults)
            raise DataError(f"{path} cannot be read as this benchmark: {said}")
        return self.tasks, self.dropped


@dataclass
class Photos:
    """Photos of references, each looked at once; what is wrong with one goes to the survey."""

    root: Path  # names in the survey are relative to it
    survey: Survey
    _known: dict[Path, bool] = field(default_factory=dict)

    def in_folder(self, folder: Path) -> list[Path]:
        """Readable images of a folder, by name; none where there is no folder."""
        return [path for path in sorted(folder.iterdir()) if self.is_readable(path)] if folder.is_dir() else []

    def is_readable(self, path: Path) -> bool:
        """Whether it is an image that can be opened."""
        if path not in self._known:
            fault = _why_not(path)
            self._known[path] = fault is None
            if fault is not None:
                self.survey.drop("file", self.name(path), *fault)
        return self._known[path]

    def name(self, path: Path) -> str:
        """How the survey calls it."""
        return (path.relative_to(self.root) if path.is_relative_to(self.root) else path).as_posix()


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height of a readable photo, turned as its EXIF says; its pixels are not decoded."""
    with Image.open(path) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(_ORIENTATION) in _LYING else (width, height)


def unnamed(prompt: str, names: Sequence[str]) -> list[str]:
    """The names that a prompt has less often than there are references of that name."""
    words = _words(prompt)
    return [name for name in dict.fromkeys(names) if _occurrences(words, _words(name)) < names.count(name)]


def line_of(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _occurrences(words: list[str], part: list[str]) -> int:
    return sum(words[start : start + len(part)] == part for start in range(len(words)))


def _why_not(path: Path) -> tuple[Fault | Reason, str] | None:
    if not path.exists():
        return Fault.MISSING_IMAGE, ""
    if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith(".") or not path.is_file():
        return Reason.NOT_AN_IMAGE, ""
    try:
        with Image.open(path) as image:
            image.verify()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return Reason.BROKEN_IMAGE, line_of(error)
    return None
