"""A user's own benchmark: one YAML or JSON file with subjects, their photos, and prompts.

subjects:
  rex:                            # an identity
    name: dog                     # what prompts call it
    images: [photos/rex1.jpg]     # files, or one folder; relative to this file
    boxes: [[10, 20, 300, 400]]   # optional: one an image, x1, y1, x2, y2 in pixels of the upright photo, or null
combinations:
  - subjects: [rex, tom]
    prompts: ["a {0} and a {1} on the beach"]     # {0} is the first subject's name; plain names do as well
    seeds: [7]                    # optional: one a prompt
    category: pet+pet             # optional; else the names
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mip.config import Section
from mip.evaluation.benchmarks import BOX_FRAME, Reason, task_seed
from mip.evaluation.survey import Fault, Photos, Survey, line_of, unnamed, upright_size
from mip.tables import Row, check_conservation

Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
Box = tuple[float, float, float, float]

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


class Subject(Section):
    """One identity and its photos."""

    name: Text
    images: Annotated[tuple[Text, ...], Field(min_length=1)] | Text
    boxes: tuple[Box | None, ...] | None = None


class Combination(Section):
    """Subjects that are drawn together."""

    subjects: Annotated[tuple[str, ...], Field(min_length=1)]
    prompts: Annotated[tuple[Text, ...], Field(min_length=1)]
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] | None = None
    category: Text | None = None


class Own(Section):
    """The whole file."""

    subjects: Annotated[Mapping[str, Subject], Field(min_length=1)]
    combinations: Annotated[tuple[Combination, ...], Field(min_length=1)]


def read_own(
    file: Path, *, prompts_per_combination: int, combinations: int | None, seed: int
) -> tuple[list[Row], list[Row]]:
    """The tasks of the file and what was left out.

    Args:
        file: .json, else YAML; paths of images in the rows begin with its folder, as it is given.
        prompts_per_combination: the first ones are taken.
        combinations: the first ones are taken; None takes all.
        seed: one seed per task is derived from it, where the file gives none.

    Raises:
        DataError: the file is missing or not what it should be.
    """
    survey = survey_own(file, prompts_per_combination=prompts_per_combination, combinations=combinations, seed=seed)
    return survey.result(file)


def survey_own(file: Path, *, prompts_per_combination: int, combinations: int | None, seed: int) -> Survey:
    """As `read_own`; faults are collected."""
    survey = Survey()
    if (own := _parsed(file, survey)) is None:
        return survey
    photos = Photos(file.parent, survey)
    references = {key: _reference(key, subject, photos) for key, subject in own.subjects.items()}
    for number, combination in enumerate(own.combinations):
        _check(f"combinations.{number}", combination, own, survey)
    if survey.faults:
        return survey
    came = 0
    for number, combination in enumerate(own.combinations[:combinations]):
        used = [references[key] for key in combination.subjects]
        empty = [row["concept"] for row in used if not row["images"]]
        for place, prompt in enumerate(combination.prompts[:prompts_per_combination]):
            came += 1
            task = _task(number, place, prompt, combination, used, seed)
            if empty:
                detail = f"no readable image of {', '.join(empty)}"
                survey.drop("task", task["task_id"], Reason.NO_IMAGES, detail)
            else:
                survey.tasks.append(task)
    check_conservation("task", came, len(survey.tasks), survey.dropped)
    return survey


def _parsed(file: Path, survey: Survey) -> Own | None:
    try:
        text = file.read_text(encoding="utf-8")
        content: Any = json.loads(text) if file.suffix.lower() == ".json" else YAML(typ="safe").load(text)
        return Own.model_validate(content)
    except ValidationError as error:
        for one in error.errors():
            place = ".".join(map(str, one["loc"])) or file.name
            given = "" if one["type"] in ("missing", "extra_forbidden") else f"got {one['input']!r}; "
            survey.fault(place, Fault.BAD_ENTRY, f"{given}{one['msg'][0].lower()}{one['msg'][1:]}")
    except FileNotFoundError:
        survey.fault(file.name, Fault.MISSING_FILE, f"there is no {file}")
    except (OSError, ValueError, YAMLError) as error:
        survey.fault(file.name, Fault.BAD_FILE, f"not readable ({line_of(error)})")
    return None


def _check(place: str, combination: Combination, own: Own, survey: Survey) -> None:
    """What the types cannot say of a combination."""
    if unknown := [key for key in combination.subjects if key not in own.subjects]:
        survey.fault(f"{place}.subjects", Fault.UNKNOWN_SUBJECT, f"got {', '.join(unknown)}; expected keys of subjects")
        return
    if combination.seeds is not None and len(combination.seeds) != len(combination.prompts):
        told = f"got {len(combination.seeds)} seeds for {len(combination.prompts)} prompts"
        survey.fault(f"{place}.seeds", Fault.BAD_SEEDS, told)
    names = [own.subjects[key].name for key in combination.subjects]
    for number, prompt in enumerate(combination.prompts):
        where = f"{place}.prompts.{number}"
        known = {str(slot) for slot in range(len(names))}
        if wrong := [text for text in _PLACEHOLDER.findall(prompt) if text not in known]:
            told = f"got {{{wrong[0]}}} for {len(names)} subjects"
            survey.fault(where, Fault.BAD_PLACEHOLDER, told)
        elif lacking := unnamed(_filled(prompt, names), names):
            survey.fault(where, Fault.NOT_NAMED, f"{prompt!r} lacks {', '.join(lacking)}")


def _reference(key: str, subject: Subject, photos: Photos) -> Row:
    """The row of a subject, with the photos that can be read."""
    survey, place = photos.survey, f"subjects.{key}.boxes"
    if isinstance(subject.images, str):
        images = photos.in_folder(photos.root / subject.images)
        boxes: list[Box | None] = [None] * len(images)
        if not (photos.root / subject.images).is_dir():
            survey.drop("file", subject.images, Fault.MISSING_IMAGE, "there is no such folder; a file stands in a list")
        if subject.boxes is not None:
            survey.fault(place, Fault.BAD_ENTRY, "boxes go with a list of images; name the files")
    else:
        images, boxes = [photos.root / name for name in subject.images], list(subject.boxes or ())
        if subject.boxes is None:
            boxes = [None] * len(images)
        elif len(boxes) != len(images):
            survey.fault(
                place, Fault.BAD_ENTRY, f"got {len(boxes)} boxes for {len(images)} images; null stands for none"
            )
    kept = [
        (image, _framed(f"{place}.{number}", image, box, survey))
        for number, (image, box) in enumerate(zip(images, boxes, strict=False))
        if photos.is_readable(image)
    ]
    return {
        "name": subject.name,
        "concept": key,
        "images": [image.as_posix() for image, _ in kept],
        "boxes": [box for _, box in kept],
    }


def _framed(place: str, image: Path, box: Box | None, survey: Survey) -> list[float]:
    """The box in the frame of the table, where the photo's shorter side has 800 pixels; empty for none."""
    if box is None:
        return []
    width, height = upright_size(image)
    if not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
        told = f"got {list(box)} for a photo of {width} x {height}; expected x1 < x2 and y1 < y2 inside it"
        survey.fault(place, Fault.BAD_ENTRY, told)
        return []
    return [number * BOX_FRAME / min(width, height) for number in box]


def _filled(prompt: str, names: list[str]) -> str:
    return _PLACEHOLDER.sub(lambda match: names[int(match[1])], prompt)


def _task(number: int, place: int, prompt: str, combination: Combination, references: list[Row], seed: int) -> Row:
    task_id = f"{number:03d}-{place:02d}"
    names = [reference["name"] for reference in references]
    filled = _filled(prompt, names)
    return {
        "task_id": task_id,
        "combination": number,
        "prompt_number": place,
        "prompt": filled,
        "caption": filled,
        "category": combination.category or "+".join(names),
        "seed": task_seed(seed, task_id) if combination.seeds is None else combination.seeds[place],
        "references": references,
    }
