"""The pipeline end to end, through DVC and Prefect, on a copy of this checkout: the smallest run of the embedded world.

The tests follow one another on one copy, in the order of this file: run, run again, change a threshold, misspell it.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.repro import active, server
from mip.config import METHODS, STAGES, Paths
from mip.tables import read_rows
from tests.closure import ROOT

pytestmark = [
    pytest.mark.smoke,
    pytest.mark.skipif(not (ROOT / "data/toybox/base").is_dir(), reason="the toybox's networks are not here"),
]

COPIED = (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "dvc.yaml", "params.yaml", "pyproject.toml")


@dataclass(frozen=True)
class Checkout:
    """A copy of this checkout, as a repository of its own, and the environment of its commands."""

    folder: Path
    environment: dict[str, str]

    @property
    def paths(self) -> Paths:
        return Paths("smoke", root=self.folder)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)

    def repro(self) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "dvc", "repro")

    def replace(self, old: str, new: str) -> None:
        """Change params.yaml, in the block of smoke."""
        file = self.folder / "params.yaml"
        before, smoke, after = file.read_text().partition("\nsmoke:\n")
        assert old in after
        file.write_text(before + smoke + after.replace(old, new, 1))


def _ran(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The stages that DVC ran, in order."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("Running stage ")]
    return [line.split("'")[1] for line in lines]


def _stages_from(first: str) -> set[str]:
    stages = STAGES[STAGES.index(first) :]
    return {
        name for stage in stages for name in ([f"generate@{m}" for m in METHODS] if stage == "generate" else [stage])
    }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("flows", "tasks", "mip"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("toybox", "smoke"):
        (folder / "data" / name).mkdir(parents=True)
    shutil.copytree(ROOT / "data/toybox/base", folder / "data/toybox/base")
    (folder / "data/smoke/base").symlink_to("../toybox/base")
    for name in COPIED:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    home = tmp_path_factory.mktemp("prefect")
    with server(home) as url:
        environment = {**os.environ, "PATH": path, "PREFECT_API_URL": url, "PREFECT_HOME": str(home)}
        copy = Checkout(folder, environment)
        copy.run("git", "init", "--quiet")
        with active("smoke", file=folder / "params.yaml"):
            yield copy


@pytest.fixture(scope="module")
def first(checkout: Checkout) -> subprocess.CompletedProcess[str]:
    return checkout.repro()


def test_every_stage_runs(first: subprocess.CompletedProcess[str]):
    assert first.returncode == 0, first.stderr[-3000:]
    assert set(_ran(first)) == _stages_from("ingest")


def test_the_report_and_its_numbers_are_written(checkout: Checkout, first: subprocess.CompletedProcess[str]):
    metrics = json.loads(checkout.paths.metrics.read_text())
    assert metrics["schema_version"] == 1
    assert set(metrics["methods"]) == set(METHODS)
    assert all((checkout.paths.reports / name).stat().st_size for name in ("report.md", "report.html", "metrics.json"))


def test_every_task_has_an_image_of_every_method(checkout: Checkout, first: subprocess.CompletedProcess[str]):
    tasks = [row["task_id"] for row in read_rows(checkout.paths.index / "tasks.parquet", "tasks")]
    for method in METHODS:
        rows = read_rows(checkout.paths.images / method / "images.parquet", "images")
        assert [row["task_id"] for row in rows] == tasks


def test_every_stage_leaves_its_time(checkout: Checkout, first: subprocess.CompletedProcess[str]):
    timings = {file.stem: json.loads(file.read_text()) for file in checkout.paths.timings.glob("*.json")}
    assert set(timings) == _stages_from("ingest")
    assert all(set(timing) == {"wall_s", "cpu_s", "rows"} for timing in timings.values())


def test_nothing_unfinished_is_left(checkout: Checkout, first: subprocess.CompletedProcess[str]):
    assert [str(file) for file in checkout.paths.work.rglob("*.parquet")] == []


def test_a_second_run_runs_nothing(checkout: Checkout, first: subprocess.CompletedProcess[str]):
    again = checkout.repro()
    assert (again.returncode, _ran(again)) == (0, [])


def test_a_new_threshold_runs_manifest_and_what_follows(checkout: Checkout, first: subprocess.CompletedProcess[str]):
    scores = sorted(row["score"] for row in read_rows(checkout.paths.scores, "scores"))
    checkout.replace("threshold: -1.0", f"threshold: {scores[len(scores) // 2]:.6f}")
    again = checkout.repro()
    assert again.returncode == 0, again.stderr[-3000:]
    ours = {"manifest", "features", "train", "generate@mip", "evaluate", "report"}
    assert set(_ran(again)) == ours  # the other methods' images depend on no manifest


def test_a_misspelt_parameter_is_one_clear_line_through_dvc(
    checkout: Checkout, first: subprocess.CompletedProcess[str]
):
    checkout.replace("max_per_class_pair:", "max_per_klass_pair:")
    done = checkout.repro()
    assert done.returncode != 0
    assert "error: params.yaml: " in done.stderr
    assert "smoke.manifest.max_per_klass_pair: unknown parameter" in done.stderr
    assert "Traceback" not in done.stderr
