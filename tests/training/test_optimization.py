"""The optimizer, the learning rate, the average of the weights, and activations that are computed twice."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mip.config import Models
from mip.errors import ConfigError
from mip.model.checkpoint import read_adapter
from mip.training import loop
from mip.training.dataset import FeatureSet
from mip.training.loop import train
from mip.training.objective import Dropout, NoiseSchedule, losses
from mip.training.optimization import Average, learning_rate, make_optimizer
from mip.training.start import load_unet, start_adapter

Maker = Callable[..., Any]


def test_average_follows_its_formula():
    module = nn.Linear(1, 1, bias=False)
    expected = 4.0
    nn.init.constant_(module.weight, expected)
    average = Average(module, decay=0.75)
    for value in (8.0, -2.0, 1.0):
        nn.init.constant_(module.weight, value)
        average.update()
        expected = 0.75 * expected + 0.25 * value
    assert expected == 2.6875
    assert float(average.weights["weight"]) == expected


def test_average_is_in_place_inside_only():
    module = nn.Linear(3, 2)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    average = Average(module, decay=0.5)
    nn.init.zeros_(module.weight)
    with average.in_place():
        assert torch.equal(module.weight, before["weight"])
    assert not module.weight.any()


def test_training_writes_the_average_and_keeps_the_raw_weights(
    models: Models, features: Path, make_train_config: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[dict[str, Tensor]] = []
    real = loop._Run.step

    def watched(self: Any, micro: Any) -> None:
        if not seen:
            seen.append({key: tensor.clone() for key, tensor in self.adapter.layers.state_dict().items()})
        real(self, micro)
        seen.append({key: tensor.clone() for key, tensor in self.adapter.layers.state_dict().items()})

    monkeypatch.setattr(loop._Run, "step", watched)
    train(make_train_config(ema=0.6), models=models, features=features, out=tmp_path / "out", work=tmp_path / "work")
    averaged, raw = (
        read_adapter(tmp_path / "out" / f"{name}.safetensors").layers for name in ("adapter", "adapter-raw")
    )
    assert len(seen) == 7
    for key, start in seen[0].items():
        expected = start
        for weights in seen[1:]:
            expected = 0.6 * expected + 0.4 * weights[key]
        torch.testing.assert_close(averaged[key], expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(raw[key], seen[-1][key])
    assert any(not torch.equal(averaged[key], raw[key]) for key in raw)


def test_averaging_leaves_the_raw_weights_as_they_are_without_it(
    models: Models, features: Path, make_train_config: Maker, tmp_path: Path
):
    for name, decay in (("plain", None), ("averaged", 0.9)):
        config = make_train_config(ema=decay)
        train(config, models=models, features=features, out=tmp_path / name, work=tmp_path / f"{name}-work")
    plain = read_adapter(tmp_path / "plain" / "adapter.safetensors").layers
    raw = read_adapter(tmp_path / "averaged" / "adapter-raw.safetensors").layers
    assert all(torch.equal(plain[key], raw[key]) for key in plain)
    assert not (tmp_path / "plain" / "adapter-raw.safetensors").exists()


def test_checkpointing_gives_the_same_gradients(models: Models, features: Path, make_train_config: Maker):
    def gradients(*, is_checkpointed: bool) -> tuple[list[Tensor], int]:
        config = make_train_config()
        unet = load_unet(models, precision="no")
        adapter = start_adapter(Path(models.ip_adapter), unet, config=config, models=models)
        adapter.install(unet)
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        unet.get_submodule("down_blocks.1.attentions.0.transformer_blocks.0").register_forward_pre_hook(count)
        if is_checkpointed:
            unet.enable_gradient_checkpointing()
        batch = FeatureSet(features, split="train").batch([0, 1, 2])
        schedule = NoiseSchedule.of(models, config)
        draws = schedule.draw(
            batch.mean_BCHW.shape[1:], keys=[0, 1, 2], seed=0, dropout=Dropout(image=0, text=0, both=0)
        )
        losses(unet, adapter, schedule, batch, draws, merge="weighted", is_gated=True).mean().backward()
        return [parameter.grad for parameter in adapter.trainable_parameters() if parameter.grad is not None], calls

    (kept, once), (again, twice) = gradients(is_checkpointed=False), gradients(is_checkpointed=True)
    assert (once, twice > once) == (1, True)
    assert len(kept) == len(again) > 0 and any(gradient.any() for gradient in kept)
    for one, other in zip(kept, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_training_checkpoints_where_it_is_asked_to(
    models: Models, features: Path, make_train_config: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    flags = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        flags.append(args[0].is_gradient_checkpointing)
        return losses(*args, **kwargs)

    monkeypatch.setattr(loop, "losses", watched)
    for name, is_on in (("kept", False), ("again", True)):
        flags.clear()
        config = make_train_config(gradient_checkpointing=is_on, steps=2)
        train(config, models=models, features=features, out=tmp_path / name, work=tmp_path / f"{name}-work")
        assert set(flags) == {is_on}
    kept, again = (read_adapter(tmp_path / name / "adapter.safetensors").layers for name in ("kept", "again"))
    for key, tensor in kept.items():
        assert float((tensor - again[key]).abs().mean()) < 1e-6


def test_fused_adamw_takes_the_same_steps(make_train_config: Maker):
    results = []
    for kind in ("adamw", "adamw_fused"):
        weight = nn.Parameter(torch.linspace(-1, 1, 7))
        optimizer = make_optimizer(make_train_config(optimizer=kind), [weight], device=torch.device("cpu"))
        for _ in range(5):
            optimizer.zero_grad()
            weight.pow(3).sum().backward()
            optimizer.step()
        results.append(weight.detach().clone())
    assert not torch.equal(results[0], torch.linspace(-1, 1, 7))
    torch.testing.assert_close(results[0], results[1])


def test_eight_bits_on_a_cpu_are_an_error(make_train_config: Maker):
    with pytest.raises(ConfigError, match="adamw_8bit on a CPU"):
        make_optimizer(make_train_config(optimizer="adamw_8bit"), [], device=torch.device("cpu"))


def test_eight_bits_without_bitsandbytes_say_what_to_install(make_train_config: Maker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        make_optimizer(make_train_config(optimizer="adamw_8bit"), [], device=torch.device("meta"))


def test_learning_rate_warms_up_then_falls_to_nothing(make_train_config: Maker):
    config = make_train_config(learning_rate=1.0, warm_up=4, steps=14, schedule="cosine")
    rates = [learning_rate(step, config=config) for step in range(14)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[9] == pytest.approx(0.5)
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.05
    constant = make_train_config(learning_rate=1.0, warm_up=0, schedule="constant")
    assert {learning_rate(step, config=constant) for step in range(9)} == {1.0}
