"""Trackers and what is said during a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking
from tensorboard.backend.event_processing import event_accumulator

from mip.config import Models, load_profile
from mip.errors import ConfigError
from mip.training import reporting
from mip.training.loop import train
from mip.training.reporting import check_trackers
from tests.closure import ROOT

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


def test_values_of_each_step_reach_the_tracker_and_its_files_stay_out_of_the_results(
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
    (file,) = (tmp_path / "work" / "logs").glob("*/mip.txt")
    lines = file.read_text().splitlines()
    usual = "data_wait_share learning_rate loss peak_memory_gib samples_per_s"
    assert lines == ["parameters 3 None", f"1 {usual}", f"2 {usual}", f"3 {usual} validation_loss", "finished"]
    assert not list((tmp_path / "out").rglob("*.txt"))
    assert "step 2 of 3: loss " in caplog.text and "samples/s" in caplog.text


def test_tensorboard_gets_values_and_pictures_and_the_results_stay_the_same(
    models: Models, features: Path, make_train_config: Maker, tmp_path: Path
):
    samples = {"every": 2, "count": 1, "steps": 1, "guidance": 1.0, "scale": 1.0}
    for name, trackers in (("with", ("tensorboard",)), ("without", ())):
        config = make_train_config(steps=3, samples=samples, trackers=trackers)
        train(config, models=models, features=features, out=tmp_path / name, work=tmp_path / f"{name}-work")
    (folder,) = (tmp_path / "with-work" / "logs").glob("*/mip")
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert [event.step for event in events.Images("samples")] == [2, 3]
    assert {path.name for path in (tmp_path / "with").iterdir()} == {
        path.name for path in (tmp_path / "without").iterdir()
    }
    assert not (tmp_path / "without-work" / "logs").exists()


@pytest.mark.parametrize("profile", ["sdxl", "sdxl_plus"])
def test_the_tracker_of_sdxl_is_tensorboard_and_it_is_installed(profile: str):
    _, whole = load_profile(ROOT / "params.yaml", profile)
    assert whole.train.trackers == ("tensorboard",)
    assert check_trackers(whole.train.trackers) == ["tensorboard"]


def test_a_tracker_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reporting, "get_available_trackers", list)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        check_trackers(["tensorboard"])


def test_an_unknown_tracker_is_an_error():
    with pytest.raises(ConfigError, match=r"'tensorbord'; expected some of .*tensorboard"):
        check_trackers(["tensorbord"])
