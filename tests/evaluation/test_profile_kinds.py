"""A profile chooses any kind of benchmark: from its file or folder to the tables of `ingest`."""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from mip.config import BenchmarkKind, Ingest
from mip.data import sources
from mip.data.sources import Folder, FolderOptions
from mip.errors import ConfigError
from mip.evaluation.benchmarks import Reason
from mip.evaluation.dreambooth import CLASSES, PAIRS
from mip.evaluation.kinds import Kind
from mip.tables import Row, check_kind, read_rows
from mip.toybox.scenes import draw_scene, identities, render
from tests.closure import ROOT
from tests.data.conftest import pair
from tests.data.worlds import write_concept101
from tests.evaluation.test_dreambooth import TEXT

OWN = """
subjects:
  round: {name: ball, images: [photos/ball/0.png, photos/ball/1.png], boxes: [[8, 8, 56, 56], null]}
  sharp: {name: star, images: photos/star}
  gone: {name: cup, images: photos/cup}
combinations:
  - {subjects: [round, sharp], prompts: ["a {0} and a {1} on a table", "a star by a ball"]}
  - {subjects: [sharp], prompts: ["one {0}"]}
  - {subjects: [sharp, gone], prompts: ["a {0} and a {1}"]}
"""


def _photo(path: Path, name: str, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scene = draw_scene(np.random.default_rng(number), [name], [identities("benchmark")[number]])
    Image.fromarray(render(scene, width=64, height=64).image).save(path)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A benchmark file of the embedded world; one of its subjects has no photo."""
    for name in ("ball", "star"):
        for number in range(2):
            _photo(tmp_path / "photos" / name / f"{number}.png", name, number)
    (tmp_path / "photos" / "cup").mkdir()
    (tmp_path / "own.yaml").write_text(OWN)
    return tmp_path / "own.yaml"


@pytest.fixture
def dreambooth(tmp_path: Path) -> Path:
    """Two subjects of two photos, and one pair."""
    folder = tmp_path / "dreambooth"
    for name, subject in (("fish", "dog2"), ("cup", "bear_plushie")):
        for number in range(2):
            _photo(folder / "dataset" / subject / f"0{number}.jpg", name, number)
    (folder / "dataset" / CLASSES).write_text(TEXT)
    images = ["./dreambooth/dataset/dog2/01.jpg", "./dreambooth/dataset/bear_plushie/00.jpg"]
    (folder / PAIRS).write_text(json.dumps([{"prompt": "a dog and a stuffed animal", "image_paths": images}]))
    return folder


def _config(tmp_path: Path, **changes: Any) -> Ingest:
    images = tmp_path / "images"
    images.mkdir(exist_ok=True)
    for name, content in pair("a").items():
        (images / name).write_bytes(content)
    values = {
        "source": "folder",
        "options": {"folder": str(images), "shard_size": 10},
        "benchmark": None,
        "benchmark_kind": "concept101",
        "validation": None,
        "validation_kind": "concept101",
        "benchmark_name": "mine",
        "prompts_per_combination": 1,
        "combinations": None,
        "validation_prompts_per_combination": 2,
        "validation_combinations": 1,
        "variant": "official",
        "seed": 420,
    }
    return Ingest.model_validate(values | {key: str(v) if isinstance(v, Path) else v for key, v in changes.items()})


@pytest.fixture
def ingest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ingest with these parameters; gives the index."""
    monkeypatch.setattr(sources, "create", lambda name, options: Folder(FolderOptions.model_validate(dict(options))))

    def run(**changes: Any) -> Path:
        return sources.ingest(_config(tmp_path, **changes), out=tmp_path / "index", work=tmp_path / "work")

    return run


def _tasks(index: Path, name: str = "tasks") -> list[Row]:
    return read_rows(index / f"{name}.parquet", "tasks")


def test_the_parameter_knows_every_kind():
    assert set(get_args(BenchmarkKind)) == set(Kind)


def test_an_own_file_becomes_the_table_of_tasks(ingest, own: Path):
    index = ingest(benchmark=own, benchmark_kind="own")
    tasks = _tasks(index)
    assert [(t["task_id"], t["prompt"], t["category"]) for t in tasks] == [
        ("000-00", "a ball and a star on a table", "ball+star"),
        ("001-00", "one star", "star"),
    ]
    assert [len(t["references"]) for t in tasks] == [2, 1]
    assert tasks[0]["references"][0]["boxes"] == [[100.0, 100.0, 700.0, 700.0], []]
    dropped = [row for row in read_rows(index / "rejected.parquet", "rejected") if row["unit"] == "task"]
    assert [(row["id"], row["reason"]) for row in dropped] == [("002-00", Reason.NO_IMAGES)]
    assert check_kind(index / "tasks.parquet", "tasks")["benchmark"] == "mine"


def test_the_table_names_files_that_are_there(ingest, own: Path):
    tasks = _tasks(ingest(benchmark=own, benchmark_kind="own"))
    photos = [image for task in tasks for reference in task["references"] for image in reference["images"]]
    assert len(photos) == 6 and all(Path(photo).is_file() for photo in photos)


def test_dreambooth_subjects_become_tasks_of_one_reference_with_all_photos(ingest, dreambooth: Path):
    tasks = _tasks(ingest(benchmark=dreambooth, benchmark_kind="dreambooth"))
    assert [(t["prompt"], len(t["references"]), len(t["references"][0]["images"])) for t in tasks] == [
        ("a dog wearing a red hat", 1, 2),
        ("a stuffed animal in the snow", 1, 2),
    ]


def test_dreambooth_pairs_become_tasks_of_two_references(ingest, dreambooth: Path):
    (task,) = _tasks(ingest(benchmark=dreambooth, benchmark_kind="dreambooth-pairs"))
    assert [Path(image).name for r in task["references"] for image in r["images"]] == ["01.jpg", "00.jpg"]


def test_validation_has_a_kind_of_its_own(ingest, own: Path, dreambooth: Path):
    index = ingest(benchmark=dreambooth, benchmark_kind="dreambooth-pairs", validation=own, validation_kind="own")
    assert [task["task_id"] for task in _tasks(index, "validation_tasks")] == ["000-00", "000-01"]
    assert len(_tasks(index)) == 1


def test_the_corrected_concept101_takes_validation_tasks_of_another_kind(ingest, own: Path, tmp_path: Path):
    write_concept101(tmp_path / "concept101")
    index = ingest(benchmark=tmp_path / "concept101", variant="corrected", validation=own, validation_kind="own")
    assert _tasks(index) and _tasks(index, "validation_tasks")


def test_what_does_not_fit_the_kind_is_one_error(ingest, own: Path, dreambooth: Path, tmp_path: Path):
    for changes, said in (
        ({"benchmark_kind": "own"}, "got ingest.benchmark_kind 'own' and no ingest.benchmark"),
        ({"benchmark": dreambooth, "benchmark_kind": "own"}, "expected a file for ingest.benchmark_kind own"),
        ({"benchmark": own, "benchmark_kind": "dreambooth"}, "expected a folder for ingest.benchmark_kind dreambooth"),
        ({"benchmark": tmp_path / "no.yaml", "benchmark_kind": "own"}, "there is no benchmark file"),
        ({"benchmark": own, "benchmark_kind": "own", "variant": "corrected"}, "no list of known errors"),
        ({"benchmark": own, "benchmark_kind": "own", "validation": own}, "ingest.validation_kind concept101"),
    ):
        with pytest.raises(ConfigError, match=said):
            ingest(**changes)


def test_the_page_shows_parameters_that_a_profile_takes(tmp_path: Path):
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    shown = page.partition("chooses one in its block `ingest`:")[2].partition("`prompts_per")[0]
    config = _config(tmp_path, **YAML(typ="safe").load(shown))
    assert (config.benchmark_kind, config.validation_kind, config.benchmark_name) == ("own", "dreambooth-pairs", "mine")
