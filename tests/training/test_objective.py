"""Noise, targets, dropped conditions and the loss."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from mip.config import Models
from mip.errors import ConfigError
from mip.training.dataset import FeatureSet
from mip.training.objective import Draws, Dropout, NoiseSchedule, losses, with_dropout
from mip.training.start import load_unet, start_adapter

Maker = Callable[..., Any]
KEEP_ALL = Dropout(image=0, text=0, both=0)


@pytest.fixture
def schedule_of(models: Models, make_train_config: Maker, tmp_path: Path) -> Maker:
    """A schedule of a base whose scheduler is changed."""

    def build(timesteps: tuple[float, float] = (0.0, 1.0), **changes: Any) -> NoiseSchedule:
        config = json.loads((Path(models.base) / "scheduler" / "scheduler_config.json").read_text())
        (tmp_path / "scheduler").mkdir(exist_ok=True)
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | changes))
        (tmp_path / "model_index.json").write_text("{}")
        changed = models.model_copy(update={"base": str(tmp_path)})
        return NoiseSchedule.of(changed, make_train_config(timesteps=timesteps))

    return build


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (0.0, (True, False)),
        (0.0499, (True, False)),
        (0.05, (False, True)),
        (0.0999, (False, True)),
        (0.1, (True, True)),
        (0.1499, (True, True)),
        (0.15, (False, False)),
        (0.999, (False, False)),
    ],
)
def test_one_draw_decides_what_a_sample_loses(draw: float, expected: tuple[bool, bool]):
    assert Dropout(image=0.05, text=0.05, both=0.05).drops(draw) == expected


def test_shares_of_dropped_conditions_are_those_asked_for(schedule_of: Maker):
    drawn = schedule_of().draw((1, 1, 1), keys=range(4000), seed=1, dropout=Dropout(image=0.1, text=0.2, both=0.3))
    image, text = drawn.drops_image_B, drawn.drops_text_B
    shares = [float(x.float().mean()) for x in (image & ~text, text & ~image, image & text)]
    assert shares == pytest.approx([0.1, 0.2, 0.3], abs=0.025)


def test_shares_above_one_are_an_error():
    with pytest.raises(ConfigError, match="at most 1"):
        Dropout(image=0.5, text=0.5, both=0.1)


def test_dropping_the_image_puts_no_image_in_every_slot_and_keeps_the_text(features: Path):
    data = FeatureSet(features, split="train")
    batch, absence = data.batch([0, 1]), data.absence()
    flags = torch.tensor([True, False])
    dropped = with_dropout(batch, _draws(batch.mean_BCHW, image=flags, text=~flags), absence)
    assert (dropped.features_BNF[0] == absence.features_F).all()
    assert (dropped.features_BNF[1] == batch.features_BNF[1]).all()
    assert (dropped.prompt_BTE[0] == batch.prompt_BTE[0]).all()
    assert (dropped.prompt_BTE[1] == absence.prompt_TE).all()
    assert (dropped.pooled_BD[1] == absence.pooled_D).all()
    assert dropped.phrase_BNTE is batch.phrase_BNTE and dropped.words_BNT is batch.words_BNT


def test_draws_of_a_sample_depend_on_its_key_alone(schedule_of: Maker):
    schedule = schedule_of()
    together = schedule.draw((4, 8, 8), keys=[(3, 0), (3, 1), (3, 2)], seed=5, dropout=KEEP_ALL)
    alone = schedule.draw((4, 8, 8), keys=[(3, 1)], seed=5, dropout=KEEP_ALL)
    for name, value in vars(alone).items():
        assert (value[0] == vars(together)[name][1]).all()
    assert not (together.noise_BCHW[0] == together.noise_BCHW[1]).any()


def test_timesteps_are_uniform_on_the_part_asked_for(schedule_of: Maker):
    drawn = schedule_of(timesteps=(0.35, 1.0)).draw((1, 1, 1), keys=range(4000), seed=1, dropout=KEEP_ALL).timestep_B
    assert drawn.min() >= 350 and drawn.max() == 999
    quarters = torch.histc(drawn.float(), 4, 350, 1000) / 4000
    torch.testing.assert_close(quarters, torch.full((4,), 0.25), atol=0.03, rtol=0)


def test_an_empty_part_of_the_schedule_is_an_error(schedule_of: Maker):
    with pytest.raises(ConfigError, match="timesteps"):
        schedule_of(timesteps=(0.5, 0.5))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_target_is_what_the_base_predicts(schedule_of: Maker, kind: str):
    schedule = schedule_of(prediction_type=kind)
    latents = torch.randn(1, 4, 8, 8)
    draws = schedule.draw((4, 8, 8), keys=[0], seed=0, dropout=KEEP_ALL)
    signal = schedule.scheduler.alphas_cumprod[draws.timestep_B].sqrt()
    noise_level = (1 - signal**2).sqrt()
    expected = {
        "epsilon": draws.noise_BCHW,
        "v_prediction": signal * draws.noise_BCHW - noise_level * latents,
        "sample": latents,
    }
    torch.testing.assert_close(schedule.target(latents, draws), expected[kind])


def test_an_unknown_prediction_type_is_an_error(schedule_of: Maker):
    with pytest.raises(ConfigError, match="flow"):
        schedule_of(prediction_type="flow")


def test_zero_terminal_signal_is_taken_over_from_the_base(schedule_of: Maker):
    schedule = schedule_of(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert isinstance(schedule.scheduler, DDPMScheduler)
    assert float(schedule.scheduler.alphas_cumprod[-1]) == 0


def test_validation_noise_levels_are_spread_over_the_trained_part(schedule_of: Maker):
    draws = schedule_of(timesteps=(0.2, 0.6)).spread((1, 1, 1), places=[0, 1, 2, 3], count=4, seed=0)
    assert draws.timestep_B.tolist() == [250, 350, 450, 550]


@pytest.mark.parametrize("merge", ["weighted", "concat"])
def test_gradients_of_micro_batches_add_up_to_that_of_the_whole_batch(
    models: Models, features: Path, make_train_config: Maker, merge: Any
):
    config = make_train_config(merge=merge, gated=merge == "weighted")
    unet = load_unet(models, precision="no")
    adapter = start_adapter(Path(models.ip_adapter), unet, config=config, models=models)
    adapter.install(unet)
    data, schedule = FeatureSet(features, split="train"), NoiseSchedule.of(models, config)

    def gradients(parts: list[list[int]]) -> list[torch.Tensor]:
        for parameter in adapter.trainable_parameters():
            parameter.grad = None
        for places in parts:
            batch = data.batch(places)
            draws = schedule.draw(batch.mean_BCHW.shape[1:], keys=places, seed=0, dropout=KEEP_ALL)
            loss_B = losses(unet, adapter, schedule, batch, draws, merge=merge, is_gated=config.gated)
            (loss_B.sum() / 4).backward()
        found = [parameter.grad for parameter in adapter.trainable_parameters()]
        return [gradient for gradient in found if gradient is not None]

    whole, parts = gradients([[0, 1, 2, 3]]), gradients([[0], [1, 2], [3]])
    assert len(whole) == len(adapter.trainable_parameters())
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_only_the_adapters_layers_get_gradients(models: Models, features: Path, make_train_config: Maker):
    config = make_train_config()
    unet = load_unet(models, precision="no")
    adapter = start_adapter(Path(models.ip_adapter), unet, config=config, models=models)
    adapter.install(unet)
    trained = {id(parameter) for parameter in adapter.trainable_parameters()}
    assert {id(p) for p in [*unet.parameters(), *adapter.parameters()] if p.requires_grad} == trained


def _draws(like: torch.Tensor, *, image: torch.Tensor, text: torch.Tensor) -> Draws:
    zeros = torch.zeros_like(like)
    return Draws(zeros, zeros, torch.zeros(len(like), dtype=torch.long), image, text)


def test_loss_is_one_number_a_sample(models: Models, features: Path, make_train_config: Maker):
    config = make_train_config()
    unet = load_unet(models, precision="no")
    adapter = start_adapter(Path(models.ip_adapter), unet, config=config, models=models)
    adapter.install(unet)
    data, schedule = FeatureSet(features, split="train"), NoiseSchedule.of(models, config)
    batch = data.batch([0, 1, 2])
    draws = schedule.draw(batch.mean_BCHW.shape[1:], keys=[0, 1, 2], seed=0, dropout=KEEP_ALL)
    loss_B = losses(unet, adapter, schedule, batch, draws, merge="weighted", is_gated=True)
    assert loss_B.shape == (3,) and all(math.isfinite(loss) for loss in loss_B.tolist())


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ("epsilon", lambda snr, gamma: min(snr, gamma) / snr),
        ("v_prediction", lambda snr, gamma: min(snr, gamma) / (snr + 1)),
        ("sample", min),
    ],
)
def test_min_snr_weights_follow_the_formula(schedule_of: Maker, kind: str, formula: Callable[[float, float], float]):
    schedule = schedule_of(prediction_type=kind)
    levels = torch.tensor([0, 3, 250, 500, 999])
    signal_B = schedule.scheduler.alphas_cumprod.double()[levels]
    expected = [formula(float(signal / (1 - signal)), 5.0) for signal in signal_B]
    assert min(expected) < 0.9 * max(expected)
    assert schedule.min_snr(levels, gamma=5.0).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("kind", "expected"), [("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)])
def test_min_snr_is_finite_where_there_is_no_signal(schedule_of: Maker, kind: str, expected: float):
    schedule = schedule_of(prediction_type=kind, rescale_betas_zero_snr=True)
    assert float(schedule.scheduler.alphas_cumprod[-1]) == 0
    weights = schedule.min_snr(torch.arange(1000), gamma=5.0)
    assert weights.isfinite().all()
    assert float(weights[-1]) == expected


def test_offset_shifts_each_channel_s_noise_and_nothing_else(schedule_of: Maker):
    plain, shifted = (
        schedule_of().draw((4, 8, 8), keys=range(200), seed=5, dropout=KEEP_ALL, offset=offset) for offset in (0.0, 0.5)
    )
    shift_BCHW = shifted.noise_BCHW - plain.noise_BCHW
    torch.testing.assert_close(shift_BCHW, shift_BCHW[..., :1, :1].expand_as(shift_BCHW), atol=1e-6, rtol=0)
    assert float(shift_BCHW[..., 0, 0].std()) == pytest.approx(0.5, rel=0.1)
    for name in ("latent_noise_BCHW", "timestep_B", "drops_image_B", "drops_text_B"):
        assert torch.equal(getattr(plain, name), getattr(shifted, name))
