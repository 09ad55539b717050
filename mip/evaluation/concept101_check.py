"""Everything that is missing or wrong in a Concept101 folder; `benchmarks.read_concept101` stops at the first fault."""

import json
import re
from pathlib import Path
from typing import Any

from mip.evaluation.benchmarks import BOX_FRAME, Reason, Variant, known_errors, read_concept101
from mip.evaluation.survey import Fault, Photos, Survey, line_of, upright_size

FILE = "dataset_multiconcept.json"

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def survey_concept101(
    folder: Path, *, variant: Variant, prompts_per_combination: int, combinations: int | None, seed: int
) -> Survey:
    """As `read_concept101`; faults are collected, and boxes are compared with their photos."""
    survey = Survey()
    entries = _entries(folder / FILE, survey)[:combinations]
    lines = {name: _lines(folder, name, survey) for name in dict.fromkeys(name for _, _, name in entries)}
    for number, concepts, name in entries:
        _check_prompts(number, len(concepts), lines[name], f"prompts/{name}", survey, variant)
    concepts = list(dict.fromkeys(concept for _, concepts, _ in entries for concept in concepts))
    if survey.faults:
        _check_photos(folder, concepts, survey, survey)
        return survey
    survey.tasks, dropped = read_concept101(
        folder,
        variant=variant,
        prompts_per_combination=prompts_per_combination,
        combinations=combinations,
        seed=seed,
    )
    # A folder without photos is told once, not once a task.
    survey.dropped += [row for row in dropped if row["reason"] != Reason.NO_IMAGES]
    _check_photos(folder, concepts, survey, Survey())
    _check_boxes(folder, survey)
    same = {t["combination"] for t in survey.tasks if len({r["name"] for r in t["references"]}) < len(t["references"])}
    if same:
        survey.notes.append(f"{len(same)} combinations are of one class; no measure of confusion counts them")
    return survey


def _entries(path: Path, survey: Survey) -> list[tuple[int, list[str], str]]:
    """Number, folders of the concepts and prompt file of every entry that can be read."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        survey.fault(FILE, Fault.MISSING_FILE, f"there is no {path}")
        return []
    except (OSError, ValueError) as error:
        survey.fault(FILE, Fault.BAD_FILE, f"not JSON ({line_of(error)})")
        return []
    entries = []
    for number, entry in enumerate(content if isinstance(content, list) else [content]):
        try:
            *concepts, last = entry
            folders = [Path(concept["instance_data_dir"]).name for concept in concepts if concept["class_prompt"]]
            entries.append((number, folders, Path(last["prompt_filename_compose"]).name))
        except (TypeError, KeyError, ValueError):
            survey.fault(f"{FILE} entry {number}", Fault.BAD_ENTRY, "")
    if not entries and not survey.faults:
        survey.fault(FILE, Fault.BAD_FILE, "no entry")
    return entries


def _lines(folder: Path, name: str, survey: Survey) -> list[str]:
    path = folder / "prompts" / name
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        kind = Fault.BAD_FILE if path.exists() else Fault.MISSING_FILE
        survey.fault(f"prompts/{name}", kind, line_of(error) if path.exists() else f"there is no {path}")
        return []
    if not lines:
        survey.fault(f"prompts/{name}", Fault.BAD_FILE, "it holds no prompt; give one a line")
    return lines


def _check_prompts(entry: int, count: int, lines: list[str], name: str, survey: Survey, variant: Variant) -> None:
    """Placeholders that have no concept, and concepts that have no placeholder."""
    known = {error["official"]: error for error in known_errors()["prompts"] if entry in error["entries"]}
    slots = {str(slot) for slot in range(count)}
    for number, line in enumerate(lines):
        used, where = set(_PLACEHOLDER.findall(line)), f"entry {entry}, {name} prompt {number}"
        if wrong := sorted(used - slots):
            survey.drop("prompt", where, Fault.BAD_PLACEHOLDER, f"got {{{wrong[0]}}} for {count} concepts")
        elif line in known and variant == "official":
            survey.notes.append(f"{where}: a published error, kept by variant official: {known[line]['reason']}")
        elif line not in known and (lacking := sorted(slots - used)):
            survey.drop("prompt", where, Fault.NOT_NAMED, f"{line!r} lacks {{{lacking[0]}}}")


def _check_photos(folder: Path, concepts: list[str], survey: Survey, of_files: Survey) -> None:
    """Concepts without a readable photo; what is wrong with single files goes to `of_files`."""
    photos = Photos(folder, of_files)
    for concept in concepts:
        if not photos.in_folder(folder / "benchmark_dataset" / concept):
            survey.drop("concept", f"benchmark_dataset/{concept}", Reason.NO_IMAGES, "no readable image")


def _check_boxes(folder: Path, survey: Survey) -> None:
    """Photos without a box are noted; a box outside of its photo is wrong."""
    references = {row["concept"]: row for task in survey.tasks for row in task["references"]}
    for concept, row in references.items():
        without = [Path(image).name for image, box in zip(row["images"], row["boxes"], strict=True) if not box]
        if without:
            survey.notes.append(
                f"json_data/{concept}: no box for {len(without)} of {len(row['images'])} photos, which are used whole"
            )
        for image, box in zip(row["images"], row["boxes"], strict=True):
            if box and _is_outside(box, upright_size(Path(image))):
                where = f"json_data/{concept}/{Path(image).stem}.json"
                survey.drop("file", where, Reason.BAD_BOX, f"box {box} lies outside of the photo")


def _is_outside(box: list[float], size: tuple[int, int]) -> bool:
    width, height = (side * BOX_FRAME // min(size) for side in size)
    return not (max(0, int(box[0])) < min(width, int(box[2])) and max(0, int(box[1])) < min(height, int(box[3])))
