"""Generation: seeds, batches, resuming, metadata, maps, choice of the scale."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mip.config import Evaluate, Generate, Models
from mip.errors import CheckpointError, ConfigError
from mip.evaluation import generation
from mip.evaluation.crew import Crew
from mip.evaluation.generation import Painter, generate
from mip.evaluation.methods import METHODS, method_named
from mip.evaluation.scales import Candidate, candidate, choose
from mip.tables import file_hash, read_rows
from tests.closure import ROOT

# diffusers' Euler scheduler makes a NumPy array of a tensor in a way that NumPy 2 warns of.


@pytest.fixture
def draw(judge_config: Evaluate, models: Models, index: Path, adapter_files: dict[str, Path], tmp_path: Path):
    """Run the stage; gives its output folder."""

    def run(config: Generate, method: str = "mip", *, name: str = "out", adapter: Path | None = None) -> Path:
        return generate(
            config,
            method=method,
            models=models,
            judge=judge_config,
            index=index,
            adapter=adapter or adapter_files["sdxl"],
            out=tmp_path / name / method,
            work=tmp_path / "work",
        )

    return run


def _pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]).astype(int)


def _one_scale(config: Generate, **changes: object) -> Generate:
    return config.model_copy(update={"scales": (1.0,), **changes})


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.oracle])
def test_every_method_draws_every_task(draw, generate_config: Generate, index: Path, method: str):
    out = draw(_one_scale(generate_config), method)
    rows = read_rows(out / "images.parquet", "images")
    tasks = read_rows(index / "tasks.parquet", "tasks")
    assert [row["task_id"] for row in rows] == [task["task_id"] for task in tasks]
    assert all(file_hash(out / row["path"]) == row["sha256"] for row in rows)


def test_images_do_not_depend_on_the_batch(draw, generate_config: Generate):
    together = draw(_one_scale(generate_config, batch=4, maps=0), name="together")
    alone = draw(_one_scale(generate_config, batch=1, maps=0), name="alone")
    assert np.abs(_pixels(together) - _pixels(alone)).max() <= 1


def test_half_precision_draws_nearly_the_same(draw, generate_config: Generate):
    wide = draw(_one_scale(generate_config), name="wide")
    half = draw(_one_scale(generate_config, precision="bf16"), name="half")
    difference = np.abs(_pixels(wide) - _pixels(half))
    assert 0 < difference.mean() < 3


@pytest.fixture
def drawing_only_elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """After this call the tests' own process draws nothing; those it starts know nothing of that."""

    def refuse(self: Painter, job: object) -> None:
        raise AssertionError("drawn in this process")

    return lambda: monkeypatch.setattr(Painter, "draw", refuse)


def test_images_do_not_depend_on_the_number_of_processes(draw, generate_config: Generate, drawing_only_elsewhere):
    one = draw(_one_scale(generate_config), name="one")
    drawing_only_elsewhere()
    two = draw(_one_scale(generate_config, processes=2), name="two")
    assert np.abs(_pixels(one) - _pixels(two)).max() <= 1
    maps = [sorted(path.name for path in (out / "maps").iterdir()) for out in (one, two)]
    assert maps[0] == maps[1]


def test_an_error_in_another_process_is_told_as_if_it_were_here(
    draw, generate_config: Generate, adapter_files: dict[str, Path], drawing_only_elsewhere
):
    drawing_only_elsewhere()
    with pytest.raises(CheckpointError, match="got a sdxl_plus adapter, expected sdxl"):
        draw(_one_scale(generate_config, processes=2), adapter=adapter_files["sdxl_plus"])


def test_a_killed_run_leaves_no_worker_behind():
    script = """
import os, time
from mip.evaluation.crew import _pool
if __name__ == "__main__":
    pool = _pool(1)
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 20
    while _is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _is_running(worker)


def _is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_same_run_gives_the_same_bytes(draw, generate_config: Generate):
    config = _one_scale(generate_config)
    assert file_hash(draw(config, name="first")) == file_hash(draw(config, name="second"))


def test_methods_start_from_the_same_noise(draw, generate_config: Generate):
    config = _one_scale(generate_config, scales=(0.0,))
    assert np.abs(_pixels(draw(config, "training_free")) - _pixels(draw(config, "base"))).max() <= 1


def test_an_interrupted_run_goes_on_where_it_was(draw, generate_config: Generate, monkeypatch: pytest.MonkeyPatch):
    config = _one_scale(generate_config, batch=1, maps=0)
    whole = draw(config, name="whole")
    calls = []
    original = Painter._draw_batch

    def fails_at_the_third(self, tasks, **kwargs):
        calls.append(tasks[0]["task_id"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, tasks, **kwargs)

    monkeypatch.setattr(Painter, "_draw_batch", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        draw(config, name="resumed")
    resumed = draw(config, name="resumed")
    assert calls == ["000-00", "000-01", "001-00", "001-00", "001-01"]
    assert file_hash(resumed) == file_hash(whole)


def test_an_image_says_what_it_was_made_from(draw, generate_config: Generate):
    out = draw(_one_scale(generate_config))
    with Image.open(out / "000-00.png") as image:
        said = json.loads(image.info["mip"])
    assert (said["task"], said["prompt"], said["method"], said["scale"]) == ("000-00", "a cat and a dog.", "mip", 1.0)
    assert said["made_from"]["adapter"] and said["seed"] > 0


def test_another_adapter_changes_nothing_for_methods_without_it(
    draw, generate_config: Generate, adapter_files: dict[str, Path]
):
    config = _one_scale(generate_config)
    one = draw(config, "ip_adapter_mean", name="one")
    other = draw(config, "ip_adapter_mean", name="other", adapter=adapter_files["sdxl_plus"])
    assert file_hash(one) == file_hash(other)


def test_maps_are_shares_of_each_reference_at_latent_size(draw, generate_config: Generate):
    out = draw(_one_scale(generate_config))
    assert sorted(path.name for path in (out / "maps").iterdir()) == ["000-00.npz", "000-01.npz"]
    with np.load(out / "maps" / "000-00.npz") as file:
        relevance_NHW = file["relevance_NHW"]
        assert file["names"].tolist() == ["cat", "dog"]
    assert relevance_NHW.dtype == np.float32 and relevance_NHW.shape == (2, 8, 8)
    np.testing.assert_allclose(relevance_NHW.sum(axis=0), 1, atol=1e-5)


def test_methods_without_relevance_have_no_maps(draw, generate_config: Generate):
    assert not (draw(_one_scale(generate_config), "ip_adapter_concat") / "maps").exists()


def test_the_scale_is_chosen_on_validation_tasks_and_all_figures_are_kept(draw, generate_config: Generate):
    choice = json.loads((draw(generate_config, "training_free") / "scale.json").read_text())
    assert [one["scale"] for one in choice["candidates"]] == [0.5, 1.0]
    assert choice["scale"] in (0.5, 1.0) and all(one["tasks"] == 2 for one in choice["candidates"])


def _tried(scale: float, *, confused: float, clip_t: float) -> Candidate:
    return Candidate(scale, confused=confused, confused_error=0.05, clip_t=clip_t, tasks=4)


def test_text_decides_among_scales_whose_confusion_cannot_be_told_apart():
    beyond_noise = _tried(0.2, confused=0.5, clip_t=0.9)
    least = _tried(1.2, confused=0.4, clip_t=0.6)
    alike = [_tried(scale, confused=0.44, clip_t=fit) for scale, fit in ((0.9, 0.7), (0.8, 0.7), (0.6, 0.65))]
    assert choose([beyond_noise, least, *alike]).scale == 0.8
    assert choose([beyond_noise, least]).scale == 1.2


def test_a_candidate_is_a_macro_mean_with_its_standard_error():
    confused = {"a": [True, True], "b": [False, True], "c": [False, False]}  # means 1, .5, 0

    class Verdict(SimpleNamespace):
        def verdict(self, threshold: float) -> SimpleNamespace:
            assert threshold == 0.1
            return SimpleNamespace(is_confused=self.confused)

    images = [
        SimpleNamespace(task={"combination": c}, sha256=f"{c}{n}", open=None, confused=value)
        for c, values in confused.items()
        for n, value in enumerate(values)
    ]
    judge = SimpleNamespace(
        clip_images=lambda openers: dict.fromkeys(openers, np.array([1.0, 0.0])),
        clip_text=lambda drawn: np.array([[0.6, 0.8]] * len(drawn)),
        findings=lambda drawn: [Verdict(confused=one.confused) for one in drawn],
    )
    tried = candidate(judge, images, scale=0.5, threshold=0.1)  # pyright: ignore[reportArgumentType]
    assert (tried.scale, tried.confused, tried.tasks) == (0.5, 0.5, 6)
    assert tried.confused_error == pytest.approx(0.5 / 3**0.5)
    assert tried.clip_t == pytest.approx(2.5 * 0.6)


def test_a_method_without_references_has_no_scale(draw, generate_config: Generate):
    out = draw(generate_config, "base")
    assert json.loads((out / "scale.json").read_text())["scale"] is None


def test_several_scales_without_validation_tasks_are_refused(
    generate_config: Generate, judge_config: Evaluate, models: Models
):
    painter = Painter(generate_config, name="mip", method=method_named("mip"), models=models, weights=None)
    with pytest.raises(ConfigError, match="no validation tasks"):
        generation._scale(
            generate_config, Crew(1), painter=painter, judge=judge_config, index=Path(), validation=[], work=Path()
        )


def test_the_oracle_is_refused_where_no_layout_is_given(draw, generate_config: Generate):
    with pytest.raises(ConfigError, match="needs to know the layout"):
        draw(generate_config, "oracle")


def test_an_unknown_method_is_refused():
    with pytest.raises(ConfigError, match="got method 'best'; expected one of base"):
        method_named("best")


def test_missing_adapter_weights_are_refused_in_one_line(draw, generate_config: Generate, tmp_path: Path):
    with pytest.raises(CheckpointError, match="run train first"):
        draw(_one_scale(generate_config), adapter=tmp_path)
