"""The page beside the weights: complete, and the same bytes for the same run."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ruamel.yaml import YAML

from mip.config import Models
from mip.tables import Row, file_hash
from mip.training.card import draw_curve, write_card
from mip.training.loop import train
from mip.training.progress import Progress

Maker = Callable[..., Any]
HASHES = {name: f"hash-of-{name}" for name in ("manifest", "features", "start", "base", "image_encoder")}


def curve(*losses: float) -> list[Row]:
    return [
        {
            "step": i,
            "loss": loss,
            "validation_loss": 0.25 if i == len(losses) else None,
            "learning_rate": 1.0,
            "samples": i,
        }
        for i, loss in enumerate(losses, start=1)
    ]


@pytest.fixture
def page(models: Models, make_train_config: Maker, tmp_path: Path) -> Callable[..., str]:
    def written(progress: Progress, **changes: Any) -> str:
        config = make_train_config(**changes)
        write_card(tmp_path, config=config, models=models, progress=progress, trained=1234, hashes=HASHES)
        return (tmp_path / "README.md").read_text()

    return written


def test_page_names_what_was_trained_from_what_and_how(
    page: Callable[..., str], models: Models, make_train_config: Maker
):
    text = page(Progress(step=3, curve=curve(1.0, 0.75, 0.5), validation_before=2.0), learning_rate=3e-4)
    for said in (*HASHES.values(), models.base, models.image_encoder, models.ip_adapter, "1,234", "0.50000", "0.25000"):
        assert str(said) in text
    parameters = YAML(typ="safe").load(text.partition("```yaml\n")[2].partition("```")[0])
    assert parameters == make_train_config(learning_rate=3e-4).model_dump(mode="json")
    assert "![loss over optimizer steps](curve.png)" in text and "Apache License 2.0" in text
    assert "exponential average" not in text


def test_page_says_what_was_skipped_and_averaged(page: Callable[..., str]):
    progress = Progress(step=3, curve=curve(1.0, math.nan, math.inf), skipped=["2: s1", "3: s4, s5"])
    text = page(progress, ema=0.5)
    assert "| skipped steps | 2 without a finite loss: 2, 3 |" in text
    assert "| training loss | none" in text
    assert "decay 0.5" in text


def test_curve_is_a_small_picture_and_shows_the_losses(tmp_path: Path):
    files = [draw_curve(tmp_path / f"{n}.png", rows) for n, rows in enumerate((curve(3.0, 2.0), curve(3.0, math.nan)))]
    for file in files:
        with Image.open(file) as picture:
            assert picture.size == (640, 360)
    assert files[0].read_bytes() != files[1].read_bytes()
    assert all(file.stat().st_size < 60_000 for file in files)


def test_training_writes_the_same_page_every_time(
    models: Models, features: Path, make_train_config: Maker, tmp_path: Path
):
    for name in ("first", "again"):
        train(
            make_train_config(), models=models, features=features, out=tmp_path / name, work=tmp_path / f"{name}-work"
        )
    for file in ("README.md", "curve.png"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    text = (tmp_path / "first" / "README.md").read_text()
    assert file_hash(Path(models.image_encoder)) in text and file_hash(Path(models.base) / "unet") in text
