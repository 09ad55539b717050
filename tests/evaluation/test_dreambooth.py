"""The DreamBooth subjects, alone and in pairs: the published files where they are there, and a small copy to spoil."""

import json
import os
from pathlib import Path

import pytest

from mip.errors import DataError
from mip.evaluation.benchmarks import Reason
from mip.evaluation.dreambooth import CLASSES, PAIRS, read_dreambooth, read_dreambooth_pairs
from mip.evaluation.survey import Fault, unnamed
from mip.tables import Row, read_rows, write_table
from tests.evaluation.conftest import noise

SHARED = Path(os.environ.get("MIP_SHARED", Path(__file__).parents[3] / "shared"))
DREAMBOOTH = SHARED / "dreambooth"
needs_dreambooth = pytest.mark.skipif(
    not (DREAMBOOTH / PAIRS).exists(), reason=f"no DreamBooth in {SHARED}; set MIP_SHARED to its parent"
)
WHOLE = {"prompts_per_combination": 100, "combinations": None, "seed": 420}
TEXT = """Classes

subject_name,class
dog2,dog
bear_plushie,stuffed animal

Object Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token),
'a wet {0} {1}'.format(unique_token, class_token)
]
"""


def _small(reader=read_dreambooth, folder: Path = Path(), **changes: object) -> tuple[list[Row], list[Row]]:
    return reader(folder, **(WHOLE | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two subjects of two photos, and one pair with two prompts."""
    for seed, subject in enumerate(("dog2", "bear_plushie")):
        place = tmp_path / "dataset" / subject
        place.mkdir(parents=True)
        for photo in range(2):
            noise(10 * seed + photo).save(place / f"0{photo}.jpg")
    (tmp_path / "dataset" / CLASSES).write_text(TEXT)
    images = ["./dreambooth/dataset/dog2/01.jpg", "./dreambooth/dataset/bear_plushie/00.jpg"]
    prompts = ["a dog and a stuffed animal in the snow", "a red dog, next to it is a stuffed animal"]
    (tmp_path / PAIRS).write_text(json.dumps([{"prompt": prompt, "image_paths": images} for prompt in prompts]))
    return tmp_path


@needs_dreambooth
def test_the_published_subjects_give_25_tasks_each_with_all_their_photos():
    tasks, dropped = _small(folder=DREAMBOOTH)
    assert dropped == [] and len(tasks) == 750 and len({task["task_id"] for task in tasks}) == 750
    photos = {task["references"][0]["concept"]: len(task["references"][0]["images"]) for task in tasks}
    assert len(photos) == 30 and sum(photos.values()) == 158 and set(photos.values()) == {4, 5, 6}
    live = {task["references"][0]["concept"] for task in tasks if task["category"] == "live"}
    assert len(live) == 9 and all("hat" in "".join(t["prompt"] for t in tasks if t["category"] == "live") for _ in live)
    assert tasks[0]["prompt"] == "a backpack in the jungle" and not any("{" in task["prompt"] for task in tasks)
    assert not any("wearing" in task["prompt"] for task in tasks if task["category"] == "object")


@needs_dreambooth
def test_the_published_pairs_are_kept_in_order_with_one_photo_each():
    tasks, dropped = _small(read_dreambooth_pairs, DREAMBOOTH)
    published = json.loads((DREAMBOOTH / PAIRS).read_text())
    assert dropped == [] and [task["prompt"] for task in tasks] == [entry["prompt"] for entry in published]
    for task, entry in zip(tasks, published, strict=True):
        ends = ["/".join(Path(image).parts[-2:]) for image in entry["image_paths"]]
        assert ["/".join(Path(r["images"][0]).parts[-2:]) for r in task["references"]] == ends
        assert all(Path(image).is_file() for r in task["references"] for image in r["images"])
    categories = [task["category"] for task in tasks if task["prompt_number"] == 0]
    assert {kind: categories.count(kind) for kind in categories} == {
        "object+object": 10,
        "live+live": 10,
        "live+object": 10,
    }


def test_a_live_subject_and_an_object_get_prompts_of_their_own(folder: Path):
    tasks, dropped = _small(folder=folder)
    assert dropped == []
    assert [task["prompt"] for task in tasks] == [
        "a dog wearing a red hat",
        "a wet dog",
        "a stuffed animal in the snow",
        "a red stuffed animal",
    ]
    assert [task["category"] for task in tasks] == ["live", "live", "object", "object"]
    assert [len(task["references"][0]["images"]) for task in tasks] == [2, 2, 2, 2]


@pytest.mark.parametrize("reader", [read_dreambooth, read_dreambooth_pairs])
def test_the_rows_are_a_table_of_tasks(reader, folder: Path, tmp_path: Path):
    tasks, _ = _small(reader, folder)
    assert read_rows(write_table(tmp_path / "tasks.parquet", "tasks", tasks, {}), "tasks") == tasks


def test_the_first_subjects_and_prompts_are_taken_with_the_same_seeds(folder: Path):
    some, _ = _small(folder=folder, prompts_per_combination=1, combinations=1)
    assert [task["task_id"] for task in some] == ["000-00"]
    assert some[0]["seed"] == _small(folder=folder)[0][0]["seed"]


def test_the_data_set_may_lie_in_a_folder_of_its_own(folder: Path):
    (folder / "dreambooth").mkdir()
    (folder / "dataset").rename(folder / "dreambooth" / "dataset")
    tasks, dropped = _small(read_dreambooth_pairs, folder)
    assert dropped == [] and "dreambooth/dataset/dog2/01.jpg" in tasks[0]["references"][0]["images"][0]


def test_a_subject_without_photos_loses_its_tasks_only(folder: Path):
    for photo in (folder / "dataset" / "dog2").iterdir():
        photo.write_bytes(b"no image")
    tasks, dropped = _small(folder=folder)
    assert {task["references"][0]["concept"] for task in tasks} == {"bear_plushie"}
    assert [row["reason"] for row in dropped] == [Reason.BROKEN_IMAGE] * 2 + [Reason.NO_IMAGES] * 2
    assert dropped[-1]["detail"] == "no readable image in dataset/dog2"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"prompt": "a dog in the snow"}, Fault.NOT_NAMED),
        ({"image_paths": ["x/dog2/07.jpg", "x/bear_plushie/00.jpg"]}, Reason.NO_IMAGES),
        ({"image_paths": ["x/dog9/00.jpg"]}, Fault.UNKNOWN_SUBJECT),
        ({"image_paths": []}, Fault.BAD_ENTRY),
        ({"image_paths": "dog2/00.jpg"}, Fault.BAD_ENTRY),
        ({"image_paths": ["dog2/.."]}, Fault.BAD_ENTRY),
        ({"prompt": 5}, Fault.BAD_ENTRY),
    ],
)
def test_a_pair_that_cannot_be_drawn_is_left_out_with_its_reason(folder: Path, changed: dict, reason: str):
    entries = json.loads((folder / PAIRS).read_text())
    (folder / PAIRS).write_text(json.dumps([entries[0], entries[1] | changed]))
    tasks, dropped = _small(read_dreambooth_pairs, folder)
    assert len(tasks) == 1 and [row["reason"] for row in dropped if row["unit"] == "task"] == [reason]


@pytest.mark.parametrize("content", ["no json", "{}", "[]"])
def test_a_list_of_pairs_that_is_none_is_an_error(folder: Path, content: str):
    (folder / PAIRS).write_text(content)
    with pytest.raises(DataError, match=PAIRS):
        _small(read_dreambooth_pairs, folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "there is none in"), ("", "expected lines subject,class"), (TEXT[:70], "prompts for live subjects")],
)
def test_a_text_file_without_classes_or_prompts_is_an_error(folder: Path, text: str | None, message: str):
    path = folder / "dataset" / CLASSES
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(DataError, match=message):
        _small(folder=folder)


def test_both_files_that_are_missing_are_told_at_once(tmp_path: Path):
    with pytest.raises(DataError) as told:
        _small(read_dreambooth_pairs, tmp_path)
    assert CLASSES in str(told.value) and PAIRS in str(told.value)


@pytest.mark.parametrize(
    ("prompt", "names", "lacking"),
    [
        ("a toy and a toy", ["toy", "toy"], []),
        ("a toy", ["toy", "toy"], ["toy"]),
        ("a cathedral", ["cat"], ["cat"]),
        ("The Cat's hat", ["cat", "hat"], []),
        ("a stuffed bear and an animal", ["stuffed animal"], ["stuffed animal"]),
    ],
)
def test_names_are_counted_as_whole_words(prompt: str, names: list[str], lacking: list[str]):
    assert unnamed(prompt, names) == lacking
