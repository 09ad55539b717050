"""Benchmarks in the layout of Concept101: its folder to rows of tasks, and its reference photos.

    dataset_multiconcept.json               combinations: two or more concepts and a file of prompts
    prompts/*.txt                           one prompt a line, with {0}, {1}, ... for the class names
    benchmark_dataset/CONCEPT/*             reference photos
    json_data/CONCEPT/IMAGE.json            optional: where the object is, with the image's shorter side at 800 pixels

The published errors are data (concept101_errors.json, with reasons), applied only where the files hold what it quotes.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageOps, UnidentifiedImageError

from mip.errors import DataError
from mip.tables import Row, check_conservation, rejected

Variant = Literal["official", "corrected"]
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
BOX_FRAME = 800  # pixels of the shorter side, in which the boxes are given

_ERRORS = Path(__file__).with_name("concept101_errors.json")


class Reason(StrEnum):
    """Why something of a benchmark was left out."""

    NO_IMAGES = "no_images"  # a task: a concept's folder is missing, or holds no readable image
    REPEATED_PROMPT = "repeated_prompt"  # a task of the corrected variant: the combination has this prompt already
    NOT_AN_IMAGE = "not_an_image"  # a file in a concept's folder, by its name
    BROKEN_IMAGE = "broken_image"  # a file that is named as an image and is none
    BAD_BOX = "bad_box"  # a file in json_data that says nothing usable; the whole image is used


@dataclass
class _Concepts:
    """The folder's reference images, each concept read once."""

    folder: Path
    needs_images: bool
    dropped: list[Row] = field(default_factory=list)
    _known: dict[str, tuple[list[str], list[list[float]]]] = field(default_factory=dict)

    def images_and_boxes(self, concept: str) -> tuple[list[str], list[list[float]]]:
        if not self.needs_images:
            return [], []
        if concept not in self._known:
            self._known[concept] = self._read(concept)
        return self._known[concept]

    def _read(self, concept: str) -> tuple[list[str], list[list[float]]]:
        place = self.folder / "benchmark_dataset" / concept
        images = [p for p in sorted(place.iterdir()) if self._is_image(p)] if place.is_dir() else []
        return [p.as_posix() for p in images], [self._box(concept, p) for p in images]

    def _is_image(self, path: Path) -> bool:
        name = path.relative_to(self.folder).as_posix()
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith(".") or not path.is_file():
            self.dropped.append(rejected("file", name, Reason.NOT_AN_IMAGE))
            return False
        try:
            with Image.open(path) as image:
                image.verify()
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            self.dropped.append(rejected("file", name, Reason.BROKEN_IMAGE, _line(error)))
            return False
        return True

    def _box(self, concept: str, image: Path) -> list[float]:
        path = self.folder / "json_data" / concept / f"{image.stem}.json"
        if not path.exists():
            return []
        try:
            boxes = [mask["box"] for mask in json.loads(path.read_text(encoding="utf-8"))["mask"] if "box" in mask]
            box = [float(number) for number in boxes[0]]
            if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
                raise ValueError(f"got box {box}; expected x1, y1, x2, y2")
        except (ValueError, TypeError, KeyError, IndexError, OSError) as error:
            self.dropped.append(
                rejected("file", path.relative_to(self.folder).as_posix(), Reason.BAD_BOX, _line(error))
            )
            return []
        return box


def read_concept101(
    folder: Path,
    *,
    variant: Variant,
    prompts_per_combination: int,
    combinations: int | None,
    seed: int,
    needs_images: bool = True,
) -> tuple[list[Row], list[Row]]:
    """The tasks of a Concept101 folder and what was left out, with reasons.

    Args:
        folder: paths of images in the rows begin with it, as it is given.
        variant: "official", as published, or "corrected".
        prompts_per_combination: the first ones are taken.
        combinations: the first ones are taken; None takes all.
        seed: one seed per task is derived from it.
        needs_images: False reads prompts only, of a folder without photos; references then hold no images.

    Returns:
        Rows of kind "tasks" in the order of the file, and rows of kind "rejected" (units "task" and "file").

    Raises:
        DataError: a file is missing or not what it should be.
    """
    entries = _entries(folder)[:combinations]
    concepts = _Concepts(folder, needs_images)
    tasks: list[Row] = []
    dropped: list[Row] = []
    came = 0
    for combination, (entry, prompt_file) in enumerate(entries):
        lines = _lines(folder, prompt_file)[:prompts_per_combination]
        references = [_reference(combination, concept, concepts, variant) for concept in entry]
        came += len(lines)
        for number, line in enumerate(lines):
            task = _task(combination, number, line, references, variant, seed)
            if (drop := _why_not(task, tasks, needs_images, variant)) is not None:
                dropped.append(drop)
            else:
                tasks.append(task)
    check_conservation("task", came, len(tasks), dropped)
    return tasks, dropped + concepts.dropped


def task_seed(seed: int, task_id: str) -> int:
    """A seed of the task's own, the same for every method, batch size and machine; 0 to 2**31 - 1."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task_id}".encode()).digest()[:4]) >> 1


def load_reference(path: Path, box: Sequence[float] | None) -> Image.Image:
    """A reference photo in RGB, cut to its object.

    Args:
        path: any format and mode; turned as its EXIF says, transparency shown on white.
        box: x1, y1, x2, y2 in the frame where the shorter side has 800 pixels; none or empty: the photo as it is.

    Raises:
        DataError: the file is missing or no image, or the box lies outside of it.
    """
    try:
        with Image.open(path) as file:
            image = _on_white(ImageOps.exif_transpose(file))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is not a readable image ({_line(error)}); put the reference photo there") from None
    if not box:
        return image
    shorter = min(image.size)
    # Truncated, as the public loader does: the other side may lose a fraction of a pixel.
    width, height = (side * BOX_FRAME // shorter for side in image.size)
    x1, y1 = max(0, int(box[0])), max(0, int(box[1]))
    x2, y2 = min(width, int(box[2])), min(height, int(box[3]))
    if x1 >= x2 or y1 >= y2:
        raise DataError(
            f"got box {list(box)} for {path} of {width} x {height} pixels (shorter side {BOX_FRAME}); it is empty"
        )
    return image.resize((width, height), Image.Resampling.BILINEAR).crop((x1, y1, x2, y2))


def known_errors() -> Mapping[str, Any]:
    """The published errors of Concept101: which entries, what they say, what is right, and why."""
    return _known_errors()


@cache
def _known_errors() -> dict[str, Any]:
    return json.loads(_ERRORS.read_text(encoding="utf-8"))


def _entries(folder: Path) -> list[tuple[list[Row], str]]:
    """Concepts and name of the prompt file of every combination."""
    path = folder / "dataset_multiconcept.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"there is no {path}; give the folder that holds Concept101's dataset_multiconcept.json"
        ) from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({_line(error)})") from None
    entries = []
    for number, entry in enumerate(content if isinstance(content, list) else [content]):
        try:
            *concepts, last = entry
            rows = [{"name": str(c["class_prompt"]), "concept": Path(c["instance_data_dir"]).name} for c in concepts]
            entries.append((rows, Path(last["prompt_filename_compose"]).name))
        except (TypeError, KeyError, ValueError):
            raise DataError(
                f"{path}: entry {number} is not a list of concepts (class_prompt, instance_data_dir) that ends with a "
                "prompt_filename_compose"
            ) from None
    return entries


def _lines(folder: Path, name: str) -> list[str]:
    """Prompts with placeholders; blanks at their ends are kept, as published."""
    path = folder / "prompts" / name
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable prompt file ({_line(error)})") from None
    if not lines:
        raise DataError(f"{path} holds no prompt; give one a line")
    return lines


def _reference(combination: int, concept: Row, concepts: _Concepts, variant: Variant) -> Row:
    name = concept["name"]
    for error in known_errors()["classes"] if variant == "corrected" else ():
        is_quoted = (concept["concept"], name) == (error["concept"], error["official"])
        if combination in error["entries"] and is_quoted:
            name = error["corrected"]
    images, boxes = concepts.images_and_boxes(concept["concept"])
    return {"name": name, "concept": concept["concept"], "images": images, "boxes": boxes}


def _task(combination: int, number: int, line: str, references: Sequence[Row], variant: Variant, seed: int) -> Row:
    task_id = f"{combination:03d}-{number:02d}"
    for error in known_errors()["prompts"] if variant == "corrected" else ():
        if combination in error["entries"] and line == error["official"]:
            line = error["corrected"]
    prompt = line
    for slot, reference in enumerate(references):
        prompt = prompt.replace("{" + str(slot) + "}", reference["name"])
    caption = prompt.strip()
    for error in known_errors()["captions"] if variant == "official" else ():
        if combination in error["entries"] and line in error["prompts"]:
            caption = error["official"].replace("{prompt}", prompt)
    return {
        "task_id": task_id,
        "combination": combination,
        "prompt_number": number,
        "prompt": prompt,
        "caption": caption,
        "category": "+".join(reference["concept"].partition("_")[0] for reference in references),
        "seed": task_seed(seed, task_id),
        "references": list(references),
    }


def _why_not(task: Row, kept: Sequence[Row], needs_images: bool, variant: Variant) -> Row | None:
    if needs_images and (empty := [r["concept"] for r in task["references"] if not r["images"]]):
        detail = f"no readable image in benchmark_dataset/{', benchmark_dataset/'.join(empty)}"
        return rejected("task", task["task_id"], Reason.NO_IMAGES, detail)
    if variant == "corrected" and any(task["combination"] in e["entries"] for e in known_errors()["repeats"]):
        for other in kept:
            if (other["combination"], other["prompt"]) == (task["combination"], task["prompt"]):
                return rejected("task", task["task_id"], Reason.REPEATED_PROMPT, f"as {other['task_id']}")
    return None


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
