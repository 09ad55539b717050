"""Pictures drawn while the adapter is trained: right, always the same, and without a trace in the weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import tracking
from PIL import Image
from ruamel.yaml import YAML

from mip.cli.push import prepare
from mip.config import Models, Samples, load_profile
from mip.tables import read_rows
from mip.training import loop
from mip.training.dataset import FeatureSet
from mip.training.loop import train
from mip.training.samples import Painter
from mip.training.start import load_unet, start_adapter
from tests.closure import ROOT

Maker = Callable[..., Any]
CELL, GAP = 16, 4  # pixels


class Killed(BaseException):
    """Stands for a signal."""


def drawing(**changes: Any) -> dict[str, Any]:
    return {"every": 2, "count": 2, "steps": 2, "guidance": 3.0, "scale": 1.0} | changes


@pytest.fixture
def run(models: Models, features: Path, make_train_config: Maker, tmp_path: Path) -> Callable[..., Path]:
    """Train into a folder of this name; runs of one name share their work."""

    def trained(name: str, **changes: Any) -> Path:
        config = make_train_config(**{"steps": 5, "checkpoint_every": 2, "samples": drawing(), **changes})
        return train(config, models=models, features=features, out=tmp_path / name, work=tmp_path / f"{name}-work")

    return trained


@pytest.fixture
def painter(models: Models, features: Path, make_train_config: Maker) -> Callable[..., Painter]:
    """With the adapter as it is before its first step, in a UNet of its own."""

    def made(*, merge: str = "weighted", **changes: Any) -> Painter:
        config = make_train_config(samples=drawing(**changes), merge=merge)
        unet = load_unet(models, precision="no")
        adapter = start_adapter(Path(models.ip_adapter), unet, config=config, models=models).install(unet)
        return Painter(
            config,
            config.samples,
            models=models,
            held_out=FeatureSet(features, split="val"),
            unet=unet,
            adapter=adapter,
        )

    return made


def cells(picture: Image.Image) -> np.ndarray[Any, Any]:
    """Lines, columns, height, width, colours."""
    pixels_HW3 = np.asarray(picture)[GAP:, GAP:]
    lines, columns = (side // (CELL + GAP) for side in pixels_HW3.shape[:2])
    grid = pixels_HW3.reshape(lines, CELL + GAP, columns, CELL + GAP, 3)
    return grid.transpose(0, 2, 1, 3, 4)[:, :, :CELL, :CELL]


def test_grids_come_when_they_are_due_and_after_the_last_step(run: Callable[..., Path]):
    out = run("out")
    assert [file.name for file in sorted((out / "samples").iterdir())] == [
        f"step-0000000{step}.png" for step in (2, 4, 5)
    ]
    drawn = [cells(Image.open(file))[:, -1] for file in sorted((out / "samples").iterdir())]
    # The weights have moved in between; what is not drawn has not.
    assert (drawn[0] != drawn[-1]).any()
    assert not (run("out", samples=None) / "samples").exists()


def test_drawing_leaves_no_trace_in_the_weights(run: Callable[..., Path]):
    with_pictures, without = run("with", ema=0.9), run("without", ema=0.9, samples=None)
    for file in ("adapter.safetensors", "adapter-raw.safetensors"):
        assert (with_pictures / file).read_bytes() == (without / file).read_bytes()
    rows = [read_rows(out / "curve.parquet", "curve") for out in (with_pictures, without)]
    assert rows[0] == rows[1]


def test_drawing_leaves_the_random_state(painter: Callable[..., Painter]):
    paint, state = painter(), torch.random.get_rng_state()
    paint.draw()
    assert (torch.random.get_rng_state() == state).all()


def test_an_interrupted_run_leaves_the_same_pictures_and_weights(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    expected = run("whole")
    real = loop._Run.after_step

    def killing(self: Any) -> None:
        if self.progress.step == 4:
            raise Killed
        real(self)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop._Run, "after_step", killing)
        run("killed")
    resumed = run("killed")
    for file in ("adapter.safetensors", *(f"samples/step-0000000{step}.png" for step in (2, 4, 5))):
        assert (expected / file).read_bytes() == (resumed / file).read_bytes()


def test_pictures_may_be_asked_for_in_between(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    real = loop._Run.after_step

    def killing(self: Any) -> None:
        if self.progress.step == 3:
            raise Killed
        real(self)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop._Run, "after_step", killing)
        run("out", samples=None)
    caplog.set_level("INFO", "mip")
    out = run("out", samples=drawing(every=100))
    assert "going on after step 2" in caplog.text
    assert [file.name for file in (out / "samples").iterdir()] == ["step-00000005.png"]


def test_a_row_is_objects_then_their_picture_then_the_drawing(painter: Callable[..., Painter]):
    paint = painter()
    grid = cells(paint.draw())
    counts = [len(paint.held_out.rows[place]["names"]) for place in paint.places]
    assert grid.shape[:2] == (2, max(counts) + 2)
    assert len({paint.held_out.rows[place]["sample_id"] for place in paint.places}) == 2
    for line, count in enumerate(counts):
        is_blank = [bool((cell == 255).all()) for cell in grid[line]]
        assert is_blank[: max(counts) - count] == [True] * (max(counts) - count)
        assert not any(is_blank[-2:])
        latents = paint.held_out.batch([paint.places[line]]).mean_BCHW
        assert (grid[line, -2] == np.asarray(paint._picture(latents))).all()


@pytest.mark.parametrize("changes", [{"scale": 0.0}, {"guidance": 6.0}, {"guidance": 1.0}, {"steps": 3}])
def test_every_setting_changes_what_is_drawn(painter: Callable[..., Painter], changes: dict[str, Any]):
    usual, other = cells(painter().draw()), cells(painter(**changes).draw())
    assert (usual[:, :-1] == other[:, :-1]).all()
    assert (usual[:, -1] != other[:, -1]).any()


def test_a_picture_does_not_depend_on_how_many_are_drawn(painter: Callable[..., Painter]):
    one, two = (cells(painter(count=count).draw()) for count in (1, 2))
    assert len(one) == 1 and len(two) == 2
    assert (one[0, -2:] == two[0, -2:]).all()


def test_the_drawing_is_that_of_the_pipeline(painter: Callable[..., Painter], monkeypatch: pytest.MonkeyPatch):
    paint = painter(merge="concat", guidance=3.0, scale=0.75)
    seen: list[dict[str, Any]] = []
    real = paint.pipe.unet.forward

    def noting(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(paint.pipe.unet, "forward", noting)
    paint.draw()
    references = seen[0]["cross_attention_kwargs"]["references"]
    assert (references.batch, references.negatives, references.merge) == (2, 1, "concat")
    assert (references.scale_BN == 0.75).all()
    absent = paint.adapter.image_tokens(paint.held_out.absence().features_F[None])
    assert (references.image_BNRE[0] == absent).all() and (references.image_BNRE[1] != absent).any()
    assert (seen[0]["encoder_hidden_states"][0] == paint.held_out.absence().prompt_TE).all()


def test_the_average_is_what_is_drawn(run: Callable[..., Path]):
    plain, averaged = run("plain"), run("averaged", ema=0.99)
    assert (plain / "samples/step-00000005.png").read_bytes() != (averaged / "samples/step-00000005.png").read_bytes()


def test_bfloat16_draws_too(run: Callable[..., Path]):
    assert cells(Image.open(run("out", precision="bf16") / "samples/step-00000005.png")).shape[0] == 2


def test_the_page_shows_the_last_grid_and_push_takes_it_along(run: Callable[..., Path], tmp_path: Path):
    out = run("out")
    page = (out / "README.md").read_text()
    assert "(samples/step-00000005.png)" in page and "at scale\n1.0 (guidance 3.0, 2 steps)" in page
    parameters = YAML(typ="safe").load(page.partition("```yaml\n")[2].partition("```")[0])
    assert parameters["samples"] == drawing()
    assert json.loads((out / "training.json").read_text())["parameters"]["samples"] == drawing()
    assert (prepare(out, tmp_path / "pushed") / "samples" / "step-00000005.png").is_file()
    assert "samples/" not in (run("without", samples=None) / "README.md").read_text()


def test_trackers_that_take_images_get_the_grid(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    given: list[tuple[int | None, Any]] = []

    class Album(tracking.GeneralTracker):
        name = "album"
        requires_logging_directory = False
        tracker = None

        def __init__(self, run_name: str, **_: Any) -> None:
            super().__init__()

        def log_images(self, values: dict[str, Any], step: int | None = None) -> None:
            given.append((step, values["samples"][0].size))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "album", Album)
    out = run("out", trackers=("album",))
    with Image.open(out / "samples/step-00000005.png") as kept:
        size = kept.size
    assert given == [(step, size) for step in (2, 4, 5)]


@pytest.mark.parametrize("profile", ["sdxl", "sdxl_plus"])
def test_a_profile_draws_as_it_will_generate(profile: str):
    _, whole = load_profile(ROOT / "params.yaml", profile)
    samples, generate = whole.train.samples, whole.generate
    assert isinstance(samples, Samples)
    assert samples.scale in generate.scales
    assert (samples.steps, samples.guidance) == (generate.steps, generate.guidance)
