"""A benchmark of one's own from one file."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mip.errors import DataError
from mip.evaluation.benchmarks import Reason, load_reference, task_seed
from mip.evaluation.own_benchmark import read_own, survey_own
from mip.evaluation.survey import Fault
from mip.tables import Row, read_rows, write_table

WHOLE: dict[str, Any] = {"prompts_per_combination": 100, "combinations": None, "seed": 420}
YAML = """
subjects:
  rex: {name: dog, images: [photos/rex.png], boxes: [[10, 20, 50, 40]]}
  tom: {name: cat, images: photos/tom}
combinations:
  - subjects: [rex, tom]
    prompts: ["a {0} and a {1} on the beach", a cat behind a dog]
    seeds: [7, 8]
  - subjects: [tom]
    prompts: ["one {0}"]
    category: pet
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos" / "tom").mkdir(parents=True)
    Image.new("RGB", (100, 50), "red").save(tmp_path / "photos" / "rex.png")
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "photos" / "tom" / "0.png")
    (tmp_path / "own.yaml").write_text(YAML)
    return tmp_path


def _changed(folder: Path, **changes: object) -> Path:
    """The file as JSON, with `combinations_0_seeds=...` and the like put in."""
    from ruamel.yaml import YAML as Reader

    content = Reader(typ="safe").load(YAML)
    for path, value in changes.items():
        *places, last = (int(part) if part.isdigit() else part for part in path.split("_"))
        owner = content
        for place in places:
            owner = owner[place]
        owner[last] = value
    (folder / "own.json").write_text(json.dumps(content))
    return folder / "own.json"


def _read(file: Path, **changes: Any) -> tuple[list[Row], list[Row]]:
    return read_own(file, **(WHOLE | changes))


def test_the_file_gives_tasks_with_its_names_prompts_seeds_and_categories(folder: Path, tmp_path: Path):
    tasks, dropped = _read(folder / "own.yaml")
    assert dropped == []
    assert [(t["task_id"], t["prompt"], t["seed"], t["category"]) for t in tasks] == [
        ("000-00", "a dog and a cat on the beach", 7, "dog+cat"),
        ("000-01", "a cat behind a dog", 8, "dog+cat"),
        ("001-00", "one cat", task_seed(420, "001-00"), "pet"),
    ]
    assert [r["concept"] for r in tasks[0]["references"]] == ["rex", "tom"]
    assert read_rows(write_table(tmp_path / "tasks.parquet", "tasks", tasks, {}), "tasks") == tasks


def test_json_and_yaml_say_the_same(folder: Path):
    assert _read(_changed(folder)) == _read(folder / "own.yaml")


def test_a_box_in_pixels_cuts_that_part_of_the_photo(folder: Path):
    image = Image.new("RGB", (100, 50), "red")
    image.paste("lime", (10, 20, 50, 40))
    image.save(folder / "photos" / "rex.png")
    (rex, _) = _read(folder / "own.yaml")[0][0]["references"]
    cut = load_reference(Path(rex["images"][0]), rex["boxes"][0])
    assert cut.size == (640, 320) and cut.getpixel((20, 20)) == cut.getpixel((620, 300)) == (0, 255, 0)


def test_a_box_is_of_the_photo_as_its_exif_turns_it(folder: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 50)).save(folder / "photos" / "rex.png", exif=exif)
    survey = survey_own(_changed(folder, subjects_rex_boxes=[[0, 0, 50, 100]]), **WHOLE)
    assert survey.faults == []
    survey = survey_own(_changed(folder, subjects_rex_boxes=[[0, 0, 100, 50]]), **WHOLE)
    assert "photo of 50 x 100" in survey.faults[0]["detail"]


def test_the_first_prompts_and_combinations_are_taken(folder: Path):
    tasks, _ = _read(folder / "own.yaml", prompts_per_combination=1, combinations=1)
    assert [task["task_id"] for task in tasks] == ["000-00"]


def test_a_photo_that_is_missing_is_told_and_takes_its_box_along(folder: Path):
    file = _changed(
        folder, subjects_rex_images=["gone.png", "photos/rex.png"], subjects_rex_boxes=[None, [0, 0, 10, 10]]
    )
    tasks, dropped = _read(file)
    assert [(row["id"], row["reason"]) for row in dropped] == [("gone.png", Fault.MISSING_IMAGE)]
    assert tasks[0]["references"][0]["boxes"] == [[0, 0, 160, 160]]


def test_a_subject_without_photos_loses_its_tasks_only(folder: Path):
    tasks, dropped = _read(_changed(folder, subjects_rex_images=["gone.png"]))
    assert [task["task_id"] for task in tasks] == ["001-00"]
    assert [row["reason"] for row in dropped if row["unit"] == "task"] == [Reason.NO_IMAGES] * 2


def test_a_folder_that_is_none_is_told(folder: Path):
    _, dropped = _read(_changed(folder, subjects_tom_images="photos/tom/0.png"))
    assert ("photos/tom/0.png", Fault.MISSING_IMAGE) in [(row["id"], row["reason"]) for row in dropped]


@pytest.mark.parametrize(
    ("changes", "place", "reason"),
    [
        ({"subjects_rex_nmae": "dog"}, "subjects.rex.nmae", Fault.BAD_ENTRY),
        ({"subjects_rex_name": " "}, "subjects.rex.name", Fault.BAD_ENTRY),
        ({"subjects_rex_boxes": []}, "subjects.rex.boxes", Fault.BAD_ENTRY),
        ({"subjects_rex_boxes": [[0, 0, 101, 50]]}, "subjects.rex.boxes.0", Fault.BAD_ENTRY),
        ({"subjects_rex_boxes": [[5, 0, 5, 50]]}, "subjects.rex.boxes.0", Fault.BAD_ENTRY),
        ({"subjects_tom_boxes": [None]}, "subjects.tom.boxes", Fault.BAD_ENTRY),
        ({"subjects": {}}, "subjects", Fault.BAD_ENTRY),
        ({"combinations_0_subjects": ["rex", "tim"]}, "combinations.0.subjects", Fault.UNKNOWN_SUBJECT),
        ({"combinations_0_prompts_0": "a {0} and a {2}"}, "combinations.0.prompts.0", Fault.BAD_PLACEHOLDER),
        ({"combinations_0_prompts_1": "a dog"}, "combinations.0.prompts.1", Fault.NOT_NAMED),
        ({"combinations_0_seeds": [7]}, "combinations.0.seeds", Fault.BAD_SEEDS),
        ({"combinations_0_seeds": [7, -1]}, "combinations.0.seeds.1", Fault.BAD_ENTRY),
    ],
)
def test_a_mistake_is_an_error_that_names_its_place(folder: Path, changes: dict, place: str, reason: str):
    file = _changed(folder, **changes)
    assert (place, reason) in [(row["id"], row["reason"]) for row in survey_own(file, **WHOLE).faults]
    with pytest.raises(DataError, match=place.replace(".", r"\.")):
        _read(file)


def test_all_mistakes_are_told_at_once(folder: Path):
    file = _changed(
        folder, combinations_0_seeds=[7], combinations_1_prompts=["a dog"], subjects_rex_boxes=[[0, 0, 0, 0]]
    )
    assert len(survey_own(file, **WHOLE).faults) == 3


@pytest.mark.parametrize("text", ["{", "[]", "subjects: 1", "subjects: {a: 1, a: 2}"])
def test_a_file_that_is_none_is_an_error_in_one_line(tmp_path: Path, text: str):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(DataError) as told:
        _read(tmp_path / "own.yaml")
    assert "\n" not in str(told.value)
