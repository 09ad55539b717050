"""The toybox's files: SA-1B tars, labels and Concept101 folders, as any reader of those formats would find them."""

import io
import json
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from mip.errors import ConfigError
from mip.evaluation import judge
from mip.evaluation.benchmarks import read_concept101
from mip.tables import file_hash, read_rows
from mip.toybox.benchmark import CHECKS, combinations, concepts, write_benchmark
from mip.toybox.scenes import CLASSES, identities
from mip.toybox.source import Toybox, ToyboxOptions

OPTIONS = ToyboxOptions(
    seed=5,
    shards=2,
    images_per_shard=30,
    wrong_label=0.12,
    look_alike=0.12,
    cut_off=0.12,
    objects=2,
    combinations=6,
    validation_combinations=3,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    Toybox(OPTIONS).prepare(folder)
    return folder


def test_the_same_options_write_the_same_bytes(made: Path, tmp_path: Path):
    Toybox(OPTIONS).prepare(tmp_path)
    assert file_hash(tmp_path) == file_hash(made)


def test_a_shard_holds_sa_1b_pairs_whose_masks_fit_their_image(made: Path):
    with tarfile.open(made / "shards" / "sa_000001.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # pyright: ignore[reportOptionalMemberAccess]
    stems = {Path(name).stem for name in files}
    assert len(files) == 2 * len(stems) == 60
    for stem in stems:
        content = json.loads(files[f"{stem}.json"])
        width, height = Image.open(io.BytesIO(files[f"{stem}.jpg"])).size
        assert (content["image"]["width"], content["image"]["height"]) == (width, height)
        for annotation in content["annotations"]:
            mask = coco.decode(annotation["segmentation"])
            assert mask.shape == (height, width)
            assert mask.sum() == annotation["area"] > 0
            assert not {"label", "category_id"} & annotation.keys()


def test_there_is_clutter_beside_the_labelled_objects(made: Path):
    labelled = [json.loads(line) for line in (made / "labels" / "sa_000000.labels.jsonl").read_text().splitlines()]
    with tarfile.open(made / "shards" / "sa_000000.tar") as tar:
        for row in labelled:
            member = tar.extractfile(f"{row['image_id']}.json")
            assert member is not None
            known = {str(a["id"]) for a in json.load(member)["annotations"]}
            assert {label["object_id"] for label in row["labels"]} < known


def test_three_in_ten_images_have_a_defect_that_a_score_should_find(made: Path):
    rows = [json.loads(line) for file in (made / "truth").iterdir() for line in file.read_text().splitlines()]
    defects = [row["defect"] for row in rows]
    assert np.mean([defect is not None for defect in defects]) > 0.25  # 0.324 expected of 60
    assert set(defects) == {None, "wrong_label", "look_alike", "cut_off"}


def test_the_benchmark_is_read_as_concept101(made: Path):
    tasks, dropped = read_concept101(
        made / "benchmark", variant="official", prompts_per_combination=12, combinations=None, seed=1
    )
    assert len(tasks) == 6 * 12 and not dropped
    assert len({task["prompt"] for task in tasks if task["combination"] == 0}) == 12
    for task in tasks:
        assert len(task["references"]) == 2
        assert all(len(r["images"]) == len(r["boxes"]) == 4 for r in task["references"])
        assert all(r["name"] in task["prompt"].split() for r in task["references"])


def test_the_benchmark_shows_held_out_identities_only():
    held_out = {(i.primary, i.secondary, i.pattern) for i in identities("benchmark")}
    of = {(c.identity.primary, c.identity.secondary, c.identity.pattern) for c in concepts("benchmark", seed=1)}
    assert of <= held_out
    assert {c.name for c in concepts("benchmark", seed=1)} == set(CLASSES)


@pytest.mark.parametrize("objects", [2, 3])
def test_the_classes_and_colours_of_a_combination_are_all_different(objects: int):
    for group in combinations("benchmark", seed=1, count=48, objects=objects):
        assert len({concept.name for concept in group}) == objects
        assert len({c for one in group for c in (one.identity.primary, one.identity.secondary)}) == 2 * objects


def test_a_benchmark_of_three_objects_is_read_as_concept101(tmp_path: Path):
    write_benchmark(tmp_path, split="benchmark", seed=1, count=2, objects=3)
    tasks, dropped = read_concept101(
        tmp_path, variant="official", prompts_per_combination=12, combinations=None, seed=1
    )
    assert len({task["prompt"] for task in tasks}) == 24 and not dropped
    assert all(len(task["references"]) == 3 for task in tasks)
    assert all(reference["name"] in task["prompt"] for task in tasks for reference in task["references"])


def test_more_combinations_than_there_are_is_an_error():
    with pytest.raises(ConfigError, match="there are"):
        combinations("benchmark", seed=1, count=100_000, objects=2)


def test_the_judge_knows_every_kind_of_check():
    assert set(CHECKS) == set(judge.CHECKS)


def test_checks_differ_from_the_right_scene_as_their_name_says(made: Path):
    task = read_rows(made / "checks-right" / "tasks.parquet", "tasks")[0]["task_id"]
    scene = {kind: np.asarray(Image.open(made / f"checks-{kind}" / "images" / f"{task}.png")) for kind in CHECKS}
    with np.load(made / "layouts" / "masks" / f"{task}.npz") as file:
        masks_NYX = file["masks_NYX"]
    anywhere = masks_NYX.any(axis=0)
    for kind in ("swapped", "blended", "missing"):
        changed = (scene[kind] != scene["right"]).any(axis=-1)
        assert (
            changed[anywhere].mean() > 0.1 and not cv2.erode(changed.astype(np.uint8), np.ones((3, 3)))[~anywhere].any()
        )
    is_gone = (scene["missing"] != scene["right"]).any(axis=-1)
    assert is_gone[masks_NYX[0]].mean() > 0.9 and not is_gone[masks_NYX[1]].any()


def test_a_layout_shows_no_colour_of_the_references(made: Path):
    for file in (made / "layouts" / "images").iterdir():
        with np.load(made / "layouts" / "masks" / f"{file.stem}.npz") as masks:
            inner = cv2.erode(masks["masks_NYX"].any(axis=0).astype(np.uint8), np.ones((3, 3))) > 0
        pixels = np.asarray(Image.open(file))[inner].astype(int)
        assert np.ptp(pixels, axis=1).max() < 25  # grey, white or the outline


def test_calibration_scenes_name_references_that_exist_wherever_the_folder_is(made: Path, tmp_path: Path):
    moved = tmp_path / "elsewhere"
    made.rename(moved)
    try:
        rows = read_rows(moved / "calibration" / "tasks.parquet", "tasks")
        assert len(rows) == 3 * 4
        for row in rows:
            assert (moved / "calibration" / "images" / f"{row['task_id']}.png").exists()
            assert all((moved / image).exists() for r in row["references"] for image in r["images"])
    finally:
        moved.rename(made)
