"""The DreamBooth subjects as two benchmarks: one subject from several photos, and pairs from one photo each.

    dataset/prompts_and_classes.txt     class of every subject; 25 prompts for objects and 25 for live subjects
    dataset/SUBJECT/*.jpg               its photos, 4 to 6
    dreambench_multiip.json             pairs: a list of {"prompt", "image_paths": [".../SUBJECT/PHOTO.jpg", ...]}

The folder may also be the one above, with `dreambooth/dataset`, or `dataset` itself. A method without fine-tuning has
no unique token, so "a {0} {1} in the snow" is read as "a dog in the snow"; the pairs are published in this way.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from mip.evaluation.benchmarks import Reason, task_seed
from mip.evaluation.survey import Fault, Photos, Survey, line_of, unnamed
from mip.tables import Row, check_conservation

PAIRS = "dreambench_multiip.json"
CLASSES = "prompts_and_classes.txt"
LIVE = frozenset({"cat", "dog"})  # classes whose subjects get the prompts for live ones

_PLACES = ("dataset", "dreambooth/dataset", ".")
_CLASS = re.compile(r"^(\w+),([\w ]+)$")
_PROMPT = re.compile(r"^'(.*\{1\}.*)'\.format\(")


@dataclass(frozen=True)
class Subjects:
    """What the data set's own text file says."""

    folder: Path
    classes: Mapping[str, str]  # subject to class, in the order of the file
    prompts: Mapping[str, list[str]]  # "object" and "live"; {1} stands for the class

    def category(self, subject: str) -> str:
        """ "live" or "object"."""
        return "live" if self.classes[subject] in LIVE else "object"


def read_dreambooth(
    folder: Path, *, prompts_per_combination: int, combinations: int | None, seed: int
) -> tuple[list[Row], list[Row]]:
    """Tasks of one subject each, with all its photos, and what was left out. A combination is a subject.

    Args:
        folder: paths of images in the rows begin with it, as it is given.
        prompts_per_combination: the first ones are taken.
        combinations: the first ones are taken; None takes all.
        seed: one seed per task is derived from it.

    Raises:
        DataError: a file is missing or not what it should be.
    """
    survey = survey_dreambooth(
        folder, prompts_per_combination=prompts_per_combination, combinations=combinations, seed=seed
    )
    return survey.result(folder)


def read_dreambooth_pairs(
    folder: Path, *, prompts_per_combination: int, combinations: int | None, seed: int
) -> tuple[list[Row], list[Row]]:
    """Tasks of the published pairs, each subject with the one photo that the list names, and what was left out.

    Arguments and errors as for `read_dreambooth`.
    """
    survey = survey_pairs(folder, prompts_per_combination=prompts_per_combination, combinations=combinations, seed=seed)
    return survey.result(folder)


def survey_dreambooth(folder: Path, *, prompts_per_combination: int, combinations: int | None, seed: int) -> Survey:
    """As `read_dreambooth`; faults are collected."""
    survey = Survey()
    if (subjects := _subjects(folder, survey)) is None:
        return survey
    photos, came = Photos(folder, survey), 0
    for combination, subject in enumerate([*subjects.classes][:combinations]):
        reference = _reference(subjects, subject, photos.in_folder(subjects.folder / subject))
        for number, template in enumerate(subjects.prompts[subjects.category(subject)][:prompts_per_combination]):
            came += 1
            prompt = template.replace("{0} ", "").replace("{1}", reference["name"])
            task = _task(combination, number, prompt, subjects.category(subject), [reference], seed)
            if reference["images"]:
                survey.tasks.append(task)
            else:
                survey.drop("task", task["task_id"], Reason.NO_IMAGES, _no_image(photos, subjects, subject))
    check_conservation("task", came, len(survey.tasks), survey.dropped)
    return survey


def survey_pairs(folder: Path, *, prompts_per_combination: int, combinations: int | None, seed: int) -> Survey:
    """As `read_dreambooth_pairs`; faults are collected."""
    survey = Survey()
    subjects, pairs = _subjects(folder, survey), _pairs(folder / PAIRS, survey)
    if subjects is None or pairs is None:
        return survey
    photos, came = Photos(folder, survey), sum(row["unit"] == "task" for row in survey.dropped)
    for combination, (places, prompts) in enumerate([*pairs.items()][:combinations]):
        for number, prompt in enumerate(prompts[:prompts_per_combination]):
            came += 1
            task_id = f"{combination:03d}-{number:02d}"
            if (fault := _why_not(places, prompt, subjects, photos)) is not None:
                survey.drop("task", task_id, *fault)
                continue
            references = [_reference(subjects, subject, [subjects.folder / subject / name]) for subject, name in places]
            category = "+".join(subjects.category(subject) for subject, _ in places)
            survey.tasks.append(_task(combination, number, prompt, category, references, seed))
    same = {t["combination"] for t in survey.tasks if len({r["name"] for r in t["references"]}) < len(t["references"])}
    if same:
        survey.notes.append(f"{len(same)} pairs are of one class; no measure of confusion counts them")
    check_conservation("task", came, len(survey.tasks), survey.dropped)
    return survey


def _subjects(folder: Path, survey: Survey) -> Subjects | None:
    places = [folder / place for place in _PLACES]
    dataset = next((place for place in places if (place / CLASSES).is_file()), None)
    if dataset is None:
        survey.fault(f"dataset/{CLASSES}", Fault.MISSING_FILE, f"there is none in {folder}, nor in dreambooth/dataset")
        return None
    try:
        lines = [line.strip().rstrip(",") for line in (dataset / CLASSES).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        survey.fault(CLASSES, Fault.BAD_FILE, line_of(error))
        return None
    found = (match.groups() for line in lines if (match := _CLASS.match(line)))
    classes = {subject: name for subject, name in found if subject != "subject_name"}
    prompts = dict(_prompts(lines))
    if not classes:
        survey.fault(CLASSES, Fault.BAD_FILE, "expected lines subject,class")
    for kind in ("object", "live"):
        if not prompts.get(kind):
            survey.fault(CLASSES, Fault.BAD_FILE, f"expected a list of prompts for {kind} subjects")
    return None if survey.faults else Subjects(dataset, classes, prompts)


def _prompts(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """The lists of prompts under their headings. The file is Python in form; it is never run."""
    heads = {"Object Prompts": "object", "Live Subject Prompts": "live"}
    starts = [number for number, line in enumerate(lines) if line in heads]
    for start, end in pairwise([*starts, len(lines)]):
        yield heads[lines[start]], [match[1] for line in lines[start:end] if (match := _PROMPT.match(line))]


def _pairs(path: Path, survey: Survey) -> dict[tuple[tuple[str, str], ...], list[str]] | None:
    """Prompts of each tuple of (subject, photo), in the order of the file."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        survey.fault(PAIRS, Fault.MISSING_FILE, f"there is no {path}")
        return None
    except (OSError, ValueError) as error:
        survey.fault(PAIRS, Fault.BAD_FILE, f"not JSON ({line_of(error)})")
        return None
    if not isinstance(content, list) or not content:
        survey.fault(PAIRS, Fault.BAD_FILE, "expected a list of tasks")
        return None
    pairs: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for number, entry in enumerate(content):
        try:
            places = tuple(_place(image) for image in entry["image_paths"])
            if not places or not isinstance(entry["prompt"], str):
                raise TypeError
        except (TypeError, KeyError, ValueError, AttributeError):
            survey.drop("task", f"{PAIRS} entry {number}", Fault.BAD_ENTRY, "")
            continue
        pairs.setdefault(places, []).append(entry["prompt"])
    return pairs


def _place(image: str) -> tuple[str, str]:
    """Subject and file: the end of a path, so that no path leaves the data set."""
    subject, name = PurePosixPath(image).parts[-2:]
    if ".." in (subject, name):
        raise ValueError(image)
    return subject, name


def _why_not(
    places: tuple[tuple[str, str], ...], prompt: str, subjects: Subjects, photos: Photos
) -> tuple[Fault | Reason, str] | None:
    if unknown := [subject for subject, _ in places if subject not in subjects.classes]:
        return Fault.UNKNOWN_SUBJECT, f"{', '.join(unknown)} is not in {CLASSES}"
    files = [subjects.folder / subject / name for subject, name in places]
    if lost := [photos.name(file) for file in files if not photos.is_readable(file)]:
        return Reason.NO_IMAGES, f"no readable image {', '.join(lost)}"
    if names := unnamed(prompt, [subjects.classes[subject] for subject, _ in places]):
        return Fault.NOT_NAMED, f"{prompt!r} lacks {', '.join(names)}"
    return None


def _no_image(photos: Photos, subjects: Subjects, subject: str) -> str:
    return f"no readable image in {photos.name(subjects.folder / subject)}"


def _reference(subjects: Subjects, subject: str, images: list[Path]) -> Row:
    paths = [image.as_posix() for image in images]
    return {"name": subjects.classes[subject], "concept": subject, "images": paths, "boxes": [[] for _ in paths]}


def _task(combination: int, number: int, prompt: str, category: str, references: list[Row], seed: int) -> Row:
    task_id = f"{combination:03d}-{number:02d}"
    return {
        "task_id": task_id,
        "combination": combination,
        "prompt_number": number,
        "prompt": prompt,
        "caption": prompt,
        "category": category,
        "seed": task_seed(seed, task_id),
        "references": references,
    }
