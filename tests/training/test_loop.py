"""Training as a whole: it learns, it resumes, it stops in time."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mip.config import Models
from mip.errors import ConfigError, DataError, TrainingError
from mip.model.checkpoint import read_adapter
from mip.tables import Row, read_rows
from mip.training import loop
from mip.training.features import encode
from mip.training.loop import train
from mip.training.start import load_unet, start_adapter

Maker = Callable[..., Any]


class Killed(BaseException):
    """Stands for a signal."""


@pytest.fixture
def run(models: Models, features: Path, make_train_config: Maker, tmp_path: Path) -> Callable[..., Path]:
    """Train into a folder of this name; runs of one name share their work."""

    def trained(name: str, **changes: Any) -> Path:
        config = make_train_config(**changes)
        return train(config, models=models, features=features, out=tmp_path / name, work=tmp_path / f"{name}-work")

    return trained


def kill_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The process ends when this many steps are done, before they are saved."""
    real = loop._Run.after_step

    def killing(self: Any) -> None:
        if self.progress.step == step:
            raise Killed
        real(self)

    monkeypatch.setattr(loop._Run, "after_step", killing)


def test_training_lowers_the_loss_of_a_batch_seen_again_and_again(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    real = loop._Run.load
    monkeypatch.setattr(loop._Run, "load", lambda self, step: real(self, 0))
    out = run("out", steps=30, learning_rate=0.03, schedule="constant", drop_image=0, drop_text=0, drop_both=0)
    loss = [row["loss"] for row in read_rows(out / "curve.parquet", "curve")]
    assert loss[-1] < 0.97 * loss[0]


def test_results_say_what_was_trained_and_how(run: Callable[..., Path], models: Models):
    out = run("out")
    adapter = read_adapter(out / "adapter.safetensors", variant=models.variant)
    assert adapter.has_gate
    assert adapter.metadata["variant"] == models.variant
    assert adapter.metadata["steps"] == "6"
    assert {"manifest", "features", "start", "base", "base_model", "image_encoder"} <= set(adapter.metadata)
    summary = json.loads((out / "training.json").read_text())
    assert summary["samples"] == 24 and summary["skipped_steps"] == []
    assert summary["samples_per_s"] > 0 and 0 <= summary["data_wait_share"] <= 1
    curve = read_rows(out / "curve.parquet", "curve")
    assert [row["step"] for row in curve] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in curve if row["validation_loss"] is not None] == [3, 6]


def test_the_same_run_gives_the_same_bytes(run: Callable[..., Path]):
    first, again = run("first"), run("again")
    for name in ("adapter.safetensors", "curve.parquet"):
        assert (first / name).read_bytes() == (again / name).read_bytes()


@pytest.mark.parametrize(
    ("step", "changes"),
    [*((step, {}) for step in random.Random(0).sample(range(1, 7), 3)), (3, {"ema": 0.9, "optimizer": "adamw_fused"})],
)
def test_an_interrupted_run_ends_with_the_same_bytes(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, step: int, changes: dict[str, Any]
):
    expected = run("whole", **changes)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, step)
        run("killed", **changes)
    resumed = run("killed", **changes)
    names = ["adapter.safetensors", "curve.parquet", *(["adapter-raw.safetensors"] if "ema" in changes else [])]
    for name in names:
        assert (expected / name).read_bytes() == (resumed / name).read_bytes()


def test_a_torn_state_falls_back_to_the_one_before(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    expected = run("whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 5)
        run("killed")
    states = sorted((tmp_path / "killed-work").rglob("step-*.pt"))
    assert len(states) == 2
    states[-1].write_bytes(states[-1].read_bytes()[:-100])
    resumed = run("killed")
    assert "is damaged" in caplog.text
    assert (expected / "adapter.safetensors").read_bytes() == (resumed / "adapter.safetensors").read_bytes()


def test_a_run_with_other_parameters_does_not_take_up_the_states(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    expected = run("whole", seed=1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 5)
        run("killed", seed=2)
    other = run("killed", seed=1)
    assert (expected / "adapter.safetensors").read_bytes() == (other / "adapter.safetensors").read_bytes()


def test_a_state_is_taken_up_when_only_the_saving_or_the_patience_change(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 5)
        run("killed")
    caplog.set_level("INFO", "mip")
    run("killed", checkpoint_every=3, keep_checkpoints=1, checkpoint_minutes=9.0, patience=7, on_bad_loss="skip")
    assert "going on after step 4" in caplog.text


@pytest.mark.parametrize(("minutes", "saved"), [(0.5, [5, 6]), (None, [6]), (60.0, [6])])
def test_a_state_is_saved_when_the_last_one_is_old(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, minutes: float | None, saved: list[int]
):
    steps: list[int] = []
    real, after = loop.save_state, loop._Run.after_step

    def saving(*args: Any, step: int, **kwargs: Any) -> Path:
        steps.append(step)
        return real(*args, step=step, **kwargs)

    def aged(self: Any) -> None:
        self.saved_at -= 31 if self.progress.step == 5 else 0  # seconds
        after(self)

    monkeypatch.setattr(loop, "save_state", saving)
    monkeypatch.setattr(loop._Run, "after_step", aged)
    run("out", checkpoint_every=100, checkpoint_minutes=minutes)
    assert steps == saved


def test_states_are_gone_when_the_run_is_complete(run: Callable[..., Path], tmp_path: Path):
    run("out")
    assert not list((tmp_path / "out-work").rglob("*.pt"))


def test_micro_batches_lead_to_the_same_adapter(run: Callable[..., Path]):
    # Plain descent would differ by rounding only; Adam's first steps magnify that where a gradient is near zero.
    whole, parts = (
        read_adapter(run(name, micro_batch=size, steps=2) / "adapter.safetensors").layers
        for name, size in (("whole", 4), ("parts", 3))
    )
    for key, tensor in whole.items():
        assert float((tensor - parts[key]).abs().mean()) < 1e-5


def test_without_a_gate_the_trained_adapter_is_a_plain_one(run: Callable[..., Path]):
    adapter = read_adapter(run("out", merge="concat", gated=False) / "adapter.safetensors")
    assert not adapter.has_gate
    assert adapter.metadata["merge"] == "concat"


def test_the_gate_starts_neutral(models: Models, make_train_config: Maker):
    unet = load_unet(models, precision="no")
    adapter = start_adapter(Path(models.ip_adapter), unet, config=make_train_config(), models=models)
    for processor in adapter.processors.values():
        assert processor.text_to_weight is not None
        assert not processor.text_to_weight.weight.any()


def test_a_fresh_adapter_starts_from_the_layers_own_keys_and_values(models: Models, make_train_config: Maker):
    unet = load_unet(models, precision="no")
    adapter = start_adapter(Path(models.ip_adapter), unet, config=make_train_config(start="fresh"), models=models)
    for processor in adapter.processors.values():
        attention: Any = unet.get_submodule(processor.name.removesuffix(".processor"))
        assert (processor.to_k_ip.weight == attention.to_k.weight).all()
        assert (processor.to_v_ip.weight == attention.to_v.weight).all()


def test_bfloat16_trains_in_float32(run: Callable[..., Path]):
    out = run("out", precision="bf16")
    assert all(tensor.dtype == torch.float32 for tensor in read_adapter(out / "adapter.safetensors").layers.values())
    assert all(math.isfinite(row["loss"]) for row in read_rows(out / "curve.parquet", "curve"))


def test_one_bad_step_leaves_the_weights_and_is_named(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    spoil(monkeypatch, calls={2})
    out = run("out", validation_every=100, validation_batches=1)
    summary = json.loads((out / "training.json").read_text())
    assert len(summary["skipped_steps"]) == 1
    assert "s" in summary["skipped_steps"][0]
    curve = read_rows(out / "curve.parquet", "curve")
    assert [row["step"] for row in curve if not math.isfinite(row["loss"])] == [2]
    assert all(tensor.isfinite().all() for tensor in read_adapter(out / "adapter.safetensors").layers.values())


def test_three_bad_steps_in_a_row_end_training_and_name_the_samples(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    spoil(monkeypatch, calls=set(range(2, 99)))
    with pytest.raises(TrainingError, match=r"3 steps in a row, up to step 4, .*samples s\d"):
        run("out", validation_every=100)


def test_patience_is_the_number_of_bad_steps_in_a_row(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    spoil(monkeypatch, calls={1, 3, 4})
    with pytest.raises(TrainingError, match=r"2 steps in a row, up to step 4"):
        run("out", patience=2)


def test_skipping_goes_on_through_any_number_of_bad_steps(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    spoil(monkeypatch, calls={2, 3, 4, 5})
    out = run("out", patience=1, on_bad_loss="skip", ema=0.5)
    assert len(json.loads((out / "training.json").read_text())["skipped_steps"]) == 4
    for name in ("adapter", "adapter-raw"):
        assert all(tensor.isfinite().all() for tensor in read_adapter(out / f"{name}.safetensors").layers.values())


def test_the_weighting_and_the_offset_reach_the_loss(run: Callable[..., Path]):
    def first(name: str, **changes: Any) -> Row:
        return read_rows(run(name, steps=1, validation_every=1, **changes) / "curve.parquet", "curve")[0]

    plain, weighted, shifted = first("plain"), first("weighted", snr_gamma=0.1), first("shifted", noise_offset=0.5)
    assert weighted["loss"] < 0.9 * plain["loss"]
    assert shifted["loss"] != plain["loss"]
    # Validation stays comparable: the plain error on plain noise.
    assert weighted["validation_loss"] == pytest.approx(plain["validation_loss"], rel=0.02)


def spoil(monkeypatch: pytest.MonkeyPatch, *, calls: set[int]) -> None:
    """Make the loss of these training steps NaN."""
    real, count = loop.losses, iter(range(1, 999))

    def spoilt(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss_B = real(*args, **kwargs)
        return loss_B * math.nan if loss_B.requires_grad and next(count) in calls else loss_B

    monkeypatch.setattr(loop, "losses", spoilt)


def test_half_precision_on_a_cpu_is_an_error(run: Callable[..., Path]):
    with pytest.raises(ConfigError, match="fp16 on a CPU"):
        run("out", precision="fp16")


def test_a_split_without_samples_is_an_error_only_for_training(
    models: Models,
    rows: list[Row],
    make_manifest: Maker,
    make_features_config: Maker,
    make_train_config: Maker,
    tmp_path: Path,
):
    def attempt(train_rows: list[Row], val_rows: list[Row]) -> Path:
        folder = tmp_path / f"{len(train_rows)}"
        manifest = make_manifest(folder / "manifest", train_rows, val_rows)
        features = encode(
            make_features_config(), models=models, manifest=manifest, out=folder / "features", work=folder / "work"
        )
        config = make_train_config(steps=2)
        return train(config, models=models, features=features, out=folder / "out", work=folder / "work")

    with pytest.raises(DataError, match="no training sample"):
        attempt([], rows[:1])
    summary = json.loads((attempt(rows[:1], []) / "training.json").read_text())
    assert summary["validation_loss"] is None
