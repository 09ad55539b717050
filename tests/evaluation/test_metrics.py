"""From images to metrics.json, judged by tiny networks; and what the cache spares."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mip.config import Evaluate
from mip.data.openclip import Encoder
from mip.errors import DataError
from mip.evaluation.detectors import Detection, Segmentation
from mip.evaluation.encoders import Vit
from mip.evaluation.judge import Judge
from mip.evaluation.metrics import METRICS, compared_with, evaluate, metric_values
from mip.tables import Row, file_hash, read_rows, write_table
from tests.evaluation.conftest import noise

Run = Callable[..., dict]

# pycocotools makes a NumPy array in a way that NumPy 2 warns of.


def _write_images(folder: Path, tasks: Sequence[Row], *, seed: int) -> None:
    rows = []
    for number, task in enumerate(tasks):
        path = folder / f"{task['task_id']}.png"
        folder.mkdir(parents=True, exist_ok=True)
        noise(seed + number).save(path)
        row = {"task_id": task["task_id"], "method": folder.name, "path": path.name, "sha256": file_hash(path)}
        rows.append({**row, "seed": task["seed"], "scale": 1.0})
    write_table(folder / "images.parquet", "images", rows, {})


@pytest.fixture
def images(index: Path, tmp_path: Path) -> Path:
    """Images of two methods."""
    tasks = read_rows(index / "tasks.parquet", "tasks")
    for number, method in enumerate(("ip_adapter_concat", "mip")):
        _write_images(tmp_path / "images" / method, tasks, seed=100 * number + 50)
    return tmp_path / "images"


@pytest.fixture
def run(judge_config: Evaluate, index: Path, images: Path, tmp_path: Path) -> Run:
    """Evaluate; gives the content of metrics.json."""

    def evaluated(config: Evaluate = judge_config, *, name: str = "reports", index: Path = index) -> dict:
        path = evaluate(
            config,
            index=index,
            images=images,
            methods=("ip_adapter_concat", "mip"),
            judge_cache=tmp_path / "judge",
            metrics=tmp_path / name / "metrics.json",
            provenance={"git": "abc"},
        )
        return json.loads(path.read_text())

    return evaluated


def _counting(original: Callable, counts: list[int]) -> Callable:
    def counted(self, images):
        counts.append(len(images))
        return original(self, images)

    return counted


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images went through each call of a network."""
    counts: list[int] = []
    for owner, name in ((Encoder, "encode_images"), (Vit, "encode_images"), (Segmentation, "_logits")):
        monkeypatch.setattr(owner, name, _counting(getattr(owner, name), counts))
    return counts


def test_metrics_follow_the_contract(run: Run):
    content = run()
    assert (content["schema_version"], content["benchmark"], content["variant"]) == (1, "tiny", "official")
    assert (content["tasks"], content["combinations"], content["seed"]) == (4, 2, 420)
    assert list(content["methods"]) == ["ip_adapter_concat", "mip"] and content["provenance"]["git"] == "abc"
    for of_method in content["methods"].values():
        assert set(of_method) == set(METRICS)
        for metric in of_method.values():
            assert set(metric) == {"value", "low", "high", "n"}


def test_every_image_and_combination_has_its_rows(run: Run, tmp_path: Path):
    run()
    per_task = read_rows(tmp_path / "reports" / "per_task.parquet", "per_task")
    assert len(per_task) == 8 and all(len(row["similarity"]) == 2 for row in per_task)
    per_combination = read_rows(tmp_path / "reports" / "per_combination.parquet", "per_combination")
    assert len(per_combination) == 2 * 2 * len(METRICS)


def test_the_measures_over_all_detections_are_in_the_table(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def of_one(self, images, labels):
        """Each name once, and the first once more: one object too many, of which labels know nothing."""
        boxes = [(0, 0, 12, 24), (12, 0, 24, 24), (0, 0, 24, 12)]
        return [
            [Detection(name, 0.9 - n / 10, boxes[n], None) for n, name in enumerate([*names, names[0]][: 2 + (i == 0)])]
            for i, names in enumerate(labels)
        ]

    monkeypatch.setattr(Segmentation, "detect", of_one)
    run()
    rows = read_rows(tmp_path / "reports" / "per_task.parquet", "per_task")
    assert {len(row["detections"]) for row in rows} == {2, 3}
    for row in rows:
        assert 0 <= row["identity_margin"] <= 1
        if len(row["detections"]) == 3:
            assert row["detect_and_compare"] == 0
        else:
            s_NN, g_NN = np.array(row["similarity"]), np.array(row["reference_similarity"])
            norms = [np.linalg.norm(s_NN[order] - g_NN, ord=2) for order in ([0, 1], [1, 0])]
            assert row["detect_and_compare"] in (pytest.approx(1 - norms[0]), pytest.approx(1 - norms[1]))


def test_the_same_images_give_the_same_bytes(run: Run, tmp_path: Path):
    run(name="one")
    run(name="two")
    assert file_hash(tmp_path / "one") == file_hash(tmp_path / "two")


def test_judging_again_encodes_nothing(run: Run, encoded: list[int]):
    run()
    assert sum(encoded) > 0
    encoded.clear()
    run()
    assert encoded == []


def test_images_of_one_method_alone_are_encoded_anew(
    run: Run, encoded: list[int], images: Path, index: Path, tmp_path: Path
):
    run()
    encoded.clear()
    _write_images(images / "mip", read_rows(index / "tasks.parquet", "tasks"), seed=900)
    run()
    # CLIP, DINO and the detector see four new images each; the rest are crops of them, one a detection.
    rows = read_rows(tmp_path / "reports" / "per_task.parquet", "per_task")
    crops = sum(len(row["detections"]) for row in rows if row["method"] == "mip")
    assert encoded[:3] == [4, 4, 4] and sum(encoded) <= 12 + crops


def test_a_cache_that_was_cut_short_is_an_error_with_advice(run: Run, tmp_path: Path):
    run()
    next((tmp_path / "judge").glob("clip-*.npz")).write_bytes(b"cut")
    with pytest.raises(DataError, match="delete it"):
        run()


def test_a_missing_image_is_an_error(run: Run, images: Path):
    rows = read_rows(images / "mip" / "images.parquet", "images")
    write_table(images / "mip" / "images.parquet", "images", rows[1:], {})
    with pytest.raises(DataError, match="lacks images of 1 tasks"):
        run()


def _index_with(folder: Path, tasks: list[Row]) -> Path:
    write_table(folder / "tasks.parquet", "tasks", tasks, {})
    return folder


def test_pairs_of_one_class_are_left_out_of_confusion_and_counted(run: Run, index: Path, tmp_path: Path):
    tasks = read_rows(index / "tasks.parquet", "tasks")
    for reference in tasks[0]["references"]:
        reference["name"] = "cat"
    content = run(index=_index_with(tmp_path / "changed", tasks))
    assert content["provenance"]["judge"]["same_class_tasks"] == 1
    assert content["methods"]["mip"]["confused"]["n"] == 3 and content["methods"]["mip"]["clip_i"]["n"] == 4


def test_a_lone_reference_is_left_out_of_confusion_and_counted(run: Run, index: Path, images: Path, tmp_path: Path):
    tasks = read_rows(index / "tasks.parquet", "tasks")
    for task in tasks[:3]:
        task["references"] = task["references"][:1]
    (images / "mip" / "maps").mkdir()
    np.savez(images / "mip" / "maps" / "000-00.npz", relevance_NHW=np.ones((1, 4, 4), np.float32))
    content = run(index=_index_with(tmp_path / "changed", tasks))
    assert content["provenance"]["judge"]["single_reference_tasks"] == 3
    found = {metric: entry["n"] for metric, entry in content["methods"]["mip"].items()}
    assert found["confused"] == 1 and found["swap_rate"] <= 1 and found["localisation"] == 0
    assert found["presence"] == found["count_error"] == found["clip_i"] == 4
    rows = read_rows(tmp_path / "reports" / "per_task.parquet", "per_task")
    alone = [row for row in rows if len(row["similarity"]) == 1]
    assert len(alone) == 6 and all(row["confused"] is None and row["presence"] is not None for row in alone)
    assert all(row["detect_and_compare"] is row["identity_margin"] is None for row in alone)


def test_localisation_is_measured_where_there_are_maps(run: Run, images: Path):
    (images / "mip" / "maps").mkdir()
    np.savez(images / "mip" / "maps" / "000-00.npz", relevance_NHW=np.full((2, 4, 4), 0.5, np.float32))
    content = run()
    assert content["methods"]["ip_adapter_concat"]["localisation"] == {"value": None, "low": None, "high": None, "n": 0}
    assert content["methods"]["mip"]["localisation"]["value"] in (None, pytest.approx(0.5))


def test_the_leak_threshold_comes_from_calibration_scenes(
    judge_config: Evaluate, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "source" / "calibration"
    (folder / "images").mkdir(parents=True)
    tasks = read_rows(index / "tasks.parquet", "tasks")
    for task in tasks:
        noise(7).save(folder / "images" / f"{task['task_id']}.png")
    write_table(folder / "tasks.parquet", "tasks", tasks, {})

    def whole(self, images, labels):
        return [
            [Detection(name, 0.9, (0, 0, image.width, image.height), None) for name in names]
            for image, names in zip(images, labels, strict=True)
        ]

    monkeypatch.setattr(Segmentation, "detect", whole)
    judge = Judge(judge_config.model_copy(update={"leak_threshold": None}), cache=tmp_path / "judge")
    threshold = judge.leak_threshold(tmp_path)
    assert -2 < threshold < 2 and threshold == judge.leak_threshold(tmp_path)


def test_no_threshold_and_no_scenes_is_an_error(judge_config: Evaluate, tmp_path: Path):
    judge = Judge(judge_config.model_copy(update={"leak_threshold": None}), cache=tmp_path / "judge")
    with pytest.raises(DataError, match=r"set evaluate.leak_threshold or evaluate.calibration"):
        judge.leak_threshold(tmp_path)


def test_a_missing_reference_photo_is_an_error(run: Run, index: Path, tmp_path: Path):
    tasks = read_rows(index / "tasks.parquet", "tasks")
    tasks[0]["references"][0]["images"][0] = "gone/0.png"
    with pytest.raises(DataError, match=r"no reference photo gone/0.png"):
        run(index=_index_with(tmp_path / "changed", tasks))


@pytest.mark.parametrize(
    ("method", "methods", "other"),
    [
        ("base", ("base", "ip_adapter_concat", "mip"), "mip"),
        ("mip", ("base", "ip_adapter_concat", "mip"), "ip_adapter_concat"),
        ("mip", ("base", "mip"), "base"),
        ("mine", ("mine", "yours"), "yours"),
        ("mip", ("mip",), "mip"),
    ],
)
def test_confused_present_has_a_stated_opponent(method: str, methods: tuple[str, ...], other: str):
    assert compared_with(method, methods) == other


def test_an_image_counts_in_confused_present_only_if_both_methods_show_every_object():
    from types import SimpleNamespace

    def one(has_all: bool, is_confused: bool):
        verdict = SimpleNamespace(
            presence=1.0, is_swapped=False, leak=0.1, is_confused=is_confused, count_error=0.0, has_all=has_all
        )
        return SimpleNamespace(
            verdict=verdict, has_all=has_all, is_alone=False, clip_t=0, clip_i=0, dino=0, localisation=None
        )

    judged = {"ip_adapter_concat": [one(True, True), one(False, True)], "mip": [one(True, False), one(True, True)]}
    values = metric_values(judged, "mip")  # pyright: ignore[reportArgumentType]
    assert values["confused_present"] == [0.0, None] and values["confused"] == [0.0, 1.0]
    assert metric_values(judged, "ip_adapter_concat")["swap_rate"] == [0.0, None]  # pyright: ignore[reportArgumentType]


def test_features_do_not_depend_on_the_batch(judge_config: Evaluate):
    images = [noise(seed, side=20) for seed in range(3)]
    one = Vit(judge_config.dino, device="cpu", batch=1).encode_images(images)
    three = Vit(judge_config.dino, device="cpu", batch=3).encode_images([*images[:2], images[2].convert("RGB")])
    np.testing.assert_allclose(one, three, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1, atol=1e-6)
    assert isinstance(images[0], Image.Image)
