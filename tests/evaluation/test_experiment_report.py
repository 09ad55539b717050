"""The experiment's summary, of a small invented profile that stands for each of its parts."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mip.config import METHODS, load_profile
from mip.evaluation.report import experiment, findings
from tests.evaluation.fake_profile import write_profile

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("experiment")
    paths = write_profile(root)
    config = load_profile(ROOT / "params.yaml", "toybox")[1].evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)  # references are named from the project's root
        return experiment.summarise(config, parts={"pairs": paths, "triples": paths}, out=root / "summary")


def test_every_part_has_a_table_of_all_methods_in_their_order(summary: Path):
    parts = summary.read_text().split("\n## ")[1:]
    assert [part.splitlines()[0] for part in parts] == ["Two objects", "Three objects"]
    for part in parts:
        rows = [line for line in part.splitlines() if line.startswith("| ")]
        assert [row.split(" | ")[0].removeprefix("| ") for row in rows[1 : len(METHODS) + 1]] == [
            findings.long_name(method) for method in METHODS
        ]
        assert "The judge errs" in part and "5.0 % (right)" in part
        tried = "0.6: 0.62 ± 0.10, 0.71; **0.8: 0.41 ± 0.10, 0.73**; 1: 0.47 ± 0.10, 0.72"
        assert f"- {findings.long_name('mip')}: {tried}" in part


def test_claims_are_those_of_the_rows(summary: Path):
    made = json.loads((summary.parent / "experiment.json").read_text())["claims"]["pairs"]
    rivals = [method for method in METHODS if method not in ("mip", "base")]
    assert [(claim["rival"], claim["metric"]) for claim in made] == [
        (rival, metric) for rival in rivals for metric in ("confused", "confused_present", "presence", "clip_t")
    ]
    for claim in made:
        difference = claim["difference"]["value"]
        assert difference == pytest.approx(claim["own"]["value"] - claim["other"]["value"])
        if claim["metric"] == "clip_t":  # equal by invention
            assert claim["verdict"] == "undecided" and claim["p_value"] is None


def test_the_grid_shows_every_method(summary: Path):
    with Image.open(summary.parent / "grid.png") as image:
        assert image.width > 256 * len(METHODS)
