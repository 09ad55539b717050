"""Trackers and what is said during a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking

from mip.config import Models
from mip.errors import ConfigError
from mip.training import reporting
from mip.training.loop import train
from mip.training.reporting import check_trackers

Maker = Callable[..., Any]


class Notes(tracking.GeneralTracker):
    """Writes what it is given to a file."""

    name = "notes"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str, **_: Any) -> None:
        super().__init__()
        self.file = Path(logging_dir) / f"{run_name}.txt"
        self.file.parent.mkdir(parents=True, exist_ok=True)

    @property
    def tracker(self) -> Path:
        return self.file

    def _add(self, line: object) -> None:
        with self.file.open("a") as file:
            print(line, file=file)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._add(f"parameters {values['steps']} {values['ema']}")

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self._add(f"{step} {' '.join(sorted(values))}")

    def finish(self) -> None:
        self._add("finished")


def test_values_of_each_step_reach_the_tracker_and_its_files_the_results(
    models: Models,
    features: Path,
    make_train_config: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "notes", Notes)
    monkeypatch.setattr(reporting, "PAUSE", 0.0)
    caplog.set_level("INFO", "mip")
    config = make_train_config(steps=3, trackers=("notes",))
    train(config, models=models, features=features, out=tmp_path / "out", work=tmp_path / "work")
    lines = (tmp_path / "out" / "logs" / "mip.txt").read_text().splitlines()
    usual = "data_wait_share learning_rate loss peak_memory_gib samples_per_s"
    assert lines == ["parameters 3 None", f"1 {usual}", f"2 {usual}", f"3 {usual} validation_loss", "finished"]
    assert not list((tmp_path / "work").rglob("*.txt"))
    assert "step 2 of 3: loss " in caplog.text and "samples/s" in caplog.text
    train(make_train_config(steps=3), models=models, features=features, out=tmp_path / "out", work=tmp_path / "work")
    assert not (tmp_path / "out" / "logs").exists()


def test_a_tracker_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reporting, "get_available_trackers", list)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        check_trackers(["tensorboard"])


def test_an_unknown_tracker_is_an_error():
    with pytest.raises(ConfigError, match=r"'tensorbord'; expected some of .*tensorboard"):
        check_trackers(["tensorbord"])
