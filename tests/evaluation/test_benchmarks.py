"""Reading a Concept101 folder: the published one where it is at hand, and a small one with all that can go wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mip.errors import DataError
from mip.evaluation.benchmarks import Reason, known_errors, load_reference, read_concept101, task_seed
from mip.tables import Row

SHARED = Path(os.environ.get("MIP_SHARED", Path(__file__).parents[3] / "shared"))
CONCEPT101, GOLDEN = SHARED / "concept101", SHARED / "golden" / "eval" / "concept101_prompts.json"
needs_concept101 = pytest.mark.skipif(
    not (CONCEPT101.exists() and GOLDEN.exists()), reason=f"no Concept101 in {SHARED}; set MIP_SHARED to its parent"
)


def _published(variant: str) -> tuple[list[Row], list[Row]]:
    return read_concept101(
        CONCEPT101,
        variant=variant,  # pyright: ignore[reportArgumentType]
        prompts_per_combination=12,
        combinations=None,
        seed=420,
        needs_images=False,
    )


def _small(folder: Path, **changes: object) -> tuple[list[Row], list[Row]]:
    settings = {"variant": "official", "prompts_per_combination": 12, "combinations": None, "seed": 420}
    return read_concept101(folder, **(settings | changes))  # pyright: ignore[reportArgumentType]


@pytest.fixture
def folder(benchmark: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(benchmark, tmp_path / "benchmark"))


@needs_concept101
def test_official_prompts_and_scored_captions_are_the_published_ones_in_order():
    golden = json.loads(GOLDEN.read_text())["rows"]
    tasks, dropped = _published("official")
    assert dropped == [] and len(tasks) == 1212
    for task, row in zip(tasks, golden, strict=True):
        assert (task["combination"], task["prompt"], task["caption"]) == (
            row["comb_idx"],
            row["prompt"],
            row["evaluated_caption"],
        )
        assert [r["name"] for r in task["references"]] == row["entity_names"]
        assert [r["concept"] for r in task["references"]] == row["concepts"]


@needs_concept101
def test_corrected_prompts_differ_only_by_the_known_errors():
    official = {task["task_id"]: task for task in _published("official")[0]}
    tasks, dropped = _published("corrected")
    assert [(row["id"], row["reason"]) for row in dropped] == [
        ("099-10", Reason.REPEATED_PROMPT),
        ("100-10", Reason.REPEATED_PROMPT),
    ]
    changed = {task["combination"] for task in tasks if task["prompt"] != official[task["task_id"]]["prompt"]}
    # Entry 4 names the chair a chair in every prompt.
    assert changed == {4, *range(82, 89)}
    assert not any("_gen" in task["caption"] for task in tasks)


@needs_concept101
def test_published_folders_without_photos_lose_every_task_and_say_why():
    tasks, dropped = read_concept101(
        CONCEPT101, variant="official", prompts_per_combination=12, combinations=None, seed=420
    )
    assert tasks == [] and len(dropped) == 1212
    assert dropped[0]["detail"].startswith("no readable image in benchmark_dataset/furniture_sofa1")


def test_each_known_error_has_a_reason():
    lists = [errors for errors in known_errors().values() if isinstance(errors, list)]
    assert lists and all(error["reason"] and error["entries"] for errors in lists for error in errors)


def test_tasks_carry_names_photos_boxes_and_category(benchmark: Path):
    tasks, dropped = _small(benchmark)
    assert dropped == [] and [task["task_id"] for task in tasks] == [f"00{c}-0{p}" for c in (0, 1) for p in (0, 1, 2)]
    assert (tasks[1]["prompt"], tasks[1]["caption"]) == ("the dog by the cat ", "the dog by the cat")
    assert tasks[0]["category"] == "pet+pet"
    cat, dog = tasks[0]["references"]
    assert [Path(p).name for p in cat["images"]] == ["0.png", "1.png"] and cat["boxes"] == [[0, 0, 400, 800], []]
    assert dog["boxes"] == [[], []]


def test_the_first_combinations_and_prompts_are_taken(benchmark: Path):
    tasks, _ = _small(benchmark, prompts_per_combination=2, combinations=1)
    assert [task["task_id"] for task in tasks] == ["000-00", "000-01"]


def test_seeds_belong_to_tasks_not_to_positions(benchmark: Path):
    some, _ = _small(benchmark, prompts_per_combination=1)
    more, _ = _small(benchmark)
    seeds = {task["task_id"]: task["seed"] for task in more}
    assert all(seeds[task["task_id"]] == task["seed"] for task in some) and len(set(seeds.values())) == len(seeds)
    assert task_seed(420, "000-00") == 1344113201


def test_a_missing_concept_rejects_its_tasks_only(folder: Path):
    shutil.rmtree(folder / "benchmark_dataset" / "things_cup1")
    tasks, dropped = _small(folder)
    assert [task["combination"] for task in tasks] == [0, 0, 0]
    assert [(row["unit"], row["reason"]) for row in dropped] == [("task", Reason.NO_IMAGES)] * 3


def test_stray_and_broken_files_are_ignored_and_counted(folder: Path):
    place = folder / "benchmark_dataset" / "pet_dog1"
    (place / ".DS_Store").write_bytes(b"x")
    (place / "readme.txt").write_text("x")
    (place / "2.jpg").write_bytes(b"no image")
    tasks, dropped = _small(folder)
    assert len(tasks) == 6 and len(tasks[0]["references"][1]["images"]) == 2
    assert sorted((row["id"].rpartition("/")[2], row["reason"]) for row in dropped) == [
        (".DS_Store", Reason.NOT_AN_IMAGE),
        ("2.jpg", Reason.BROKEN_IMAGE),
        ("readme.txt", Reason.NOT_AN_IMAGE),
    ]


@pytest.mark.parametrize("content", ["no json", "{}", '{"mask": [{"box": [5, 5, 5, 9]}]}', '{"mask": []}'])
def test_a_box_that_is_none_is_counted_and_the_whole_image_used(folder: Path, content: str):
    (folder / "json_data" / "pet_cat1" / "0.json").write_text(content)
    tasks, dropped = _small(folder)
    assert tasks[0]["references"][0]["boxes"] == [[], []]
    assert [row["reason"] for row in dropped] == [Reason.BAD_BOX]


def test_prompts_can_be_read_without_photos(folder: Path):
    shutil.rmtree(folder / "benchmark_dataset")
    tasks, dropped = _small(folder, needs_images=False)
    assert len(tasks) == 6 and dropped == [] and tasks[0]["references"][0]["images"] == []


def test_a_path_in_the_file_cannot_leave_the_folder(folder: Path):
    file = folder / "dataset_multiconcept.json"
    file.write_text(file.read_text().replace("./benchmark_dataset/pet_cat1", "../../../etc"))
    _, dropped = _small(folder)
    assert "benchmark_dataset/etc" in dropped[0]["detail"]


@pytest.mark.parametrize("content", ["no json", "[[{}]]", "{}"])
def test_a_file_that_is_not_the_benchmark_is_an_error_in_one_line(folder: Path, content: str):
    (folder / "dataset_multiconcept.json").write_text(content)
    with pytest.raises(DataError, match=r"dataset_multiconcept.json"):
        _small(folder)


def test_a_missing_prompt_file_is_an_error(folder: Path):
    (folder / "prompts" / "both.txt").unlink()
    with pytest.raises(DataError, match="not a readable prompt file"):
        _small(folder)


def test_a_photo_without_box_is_taken_as_it_is(tmp_path: Path):
    Image.new("RGBA", (5, 3), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    image = load_reference(tmp_path / "clear.png", [])
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (5, 3), (255, 255, 255))


def test_a_photo_is_turned_as_its_exif_says(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_reference(tmp_path / "turned.jpg", None).size == (4, 6)


def test_a_box_outside_of_the_photo_is_an_error(tmp_path: Path):
    Image.new("RGB", (10, 10)).save(tmp_path / "photo.png")
    with pytest.raises(DataError, match="it is empty"):
        load_reference(tmp_path / "photo.png", [900, 0, 950, 10])


def test_reading_a_benchmark_does_not_import_torch():
    code = "import sys, mip.evaluation.benchmarks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
