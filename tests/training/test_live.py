"""A loss from cached features is that of samples encoded on the spot; so is that of a cache which leaves kinds out."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from mip.config import Models
from mip.data import images
from mip.errors import DataError
from mip.tables import Row, read_rows
from mip.training.dataset import Batch, FeatureSet
from mip.training.encodings import prepare
from mip.training.features import encode
from mip.training.live import Live
from mip.training.loop import train
from mip.training.networks import Encoders
from mip.training.objective import Dropout, NoiseSchedule, losses, with_dropout
from mip.training.start import load_unet, start_adapter

Maker = Callable[..., Any]


@pytest.fixture
def loss(models: Models, features: Path, make_train_config: Maker) -> Callable[[Batch], Tensor]:
    """Of each sample, with noise that is always the same; the last sample loses its image, the one before its text."""
    config = make_train_config()
    unet = load_unet(models, precision="no")
    adapter = start_adapter(Path(models.ip_adapter), unet, config=config, models=models)
    adapter.install(unet)
    schedule, absence = NoiseSchedule.of(models, config), FeatureSet(features, split="train").absence()

    def of(batch: Batch) -> Tensor:
        keys, shape = range(len(batch.sample_ids)), batch.mean_BCHW.shape[1:]
        draws = schedule.draw(shape, keys=keys, seed=1, dropout=Dropout(image=0, text=0, both=0))
        draws.drops_image_B[-1] = draws.drops_text_B[-2] = True
        batch = with_dropout(batch, draws, absence)
        with torch.no_grad():
            return losses(unet, adapter, schedule, batch, draws, merge="weighted", is_gated=True)

    return of


def encoded_now(rows: Sequence[Row], augmentation: int, *, models: Models, make_features_config: Maker) -> Batch:
    """One augmentation of samples, from their images and texts, without a cache."""
    encoders = Encoders.load(models)
    width = max(len(row["objects"]) for row in rows)
    parts: dict[str, list[Tensor]] = {name: [] for name in Batch.__dataclass_fields__ if name != "sample_ids"}
    for row in rows:
        prepared = prepare(row, images.load(row), config=make_features_config(), resolution=models.resolution)
        latents = encoders.latents([prepared.pictures[augmentation]])
        seen = [prepared.views[view] for view in prepared.view_AN[augmentation]]
        names = [encoders.text(thing["label"]) for thing in row["objects"]]
        caption = encoders.text(row["caption"])
        values = {
            "mean_BCHW": latents[0][0],
            "std_BCHW": latents[1][0],
            "prompt_BTE": caption.embedding_TE,
            "pooled_BD": caption.pooled_D,
            "time_ids_B6": torch.tensor(prepared.time_ids[augmentation]).float(),
            "masks_BNHW": torch.zeros(width, 1, 1),  # not in the loss
            "present_BN": torch.arange(width) < len(names),
        }
        objects = {
            "features_BNF": torch.cat([encoders.features([view]) for view in seen]),
            "phrase_BNTE": torch.stack([name.embedding_TE for name in names]),
            "words_BNT": torch.stack([name.words_T for name in names]),
        }
        for name, tensor in objects.items():
            values[name] = torch.cat([tensor, tensor.new_zeros(width - len(names), *tensor.shape[1:])])
        for name, tensor in values.items():
            parts[name].append(tensor)
    stacked: dict[str, Any] = {name: torch.stack(tensors) for name, tensors in parts.items()}
    return Batch(sample_ids=tuple(row["sample_id"] for row in rows), **stacked)


@pytest.mark.parametrize("augmentation", [0, 1])
def test_the_loss_from_the_cache_is_that_of_the_samples_encoded_now(
    loss: Callable[[Batch], Tensor],
    models: Models,
    features: Path,
    rows: list[Row],
    make_features_config: Maker,
    augmentation: int,
):
    data = FeatureSet(features, split="train")
    places = [place for place, row in enumerate(data.rows) if row["augmentation"] == augmentation]
    now = encoded_now(rows[:5], augmentation, models=models, make_features_config=make_features_config)
    assert tuple(data.rows[place]["sample_id"] for place in places) == now.sample_ids
    torch.testing.assert_close(loss(data.batch(places)), loss(now), rtol=1e-5, atol=0)
    other = data.batch([place + 1 - 2 * augmentation for place in places])
    assert not torch.allclose(loss(other), loss(now), rtol=1e-4, atol=0)


@pytest.fixture
def without(
    models: Models, rows: list[Row], make_features_config: Maker, make_manifest: Maker, tmp_path: Path
) -> Callable[..., Path]:
    """The features of the fixture `features`, with only these kinds in the cache."""

    def made(*cache: str, of: list[Row] = rows) -> Path:
        folder = tmp_path / "-".join(("cache", *cache))
        manifest = make_manifest(folder / "manifest", of[:5], of[5:])
        config = make_features_config(cache=cache)
        return encode(config, models=models, manifest=manifest, out=folder / "out", work=tmp_path / "work")

    return made


@pytest.mark.parametrize("cache", [(), ("latents", "texts"), ("images",)])
def test_the_loss_does_not_depend_on_what_is_cached(
    loss: Callable[[Batch], Tensor],
    models: Models,
    features: Path,
    without: Callable[..., Path],
    cache: tuple[str, ...],
):
    whole, folder = FeatureSet(features, split="train"), without(*cache)
    part = FeatureSet(folder, split="train", live=Live.of(folder, models=models))
    assert part.rows == whole.rows
    places = [0, 1, 3, 8]
    assert part.read(places).latent_shape == whole.read(places).latent_shape
    cached, live = whole.batch(places), part.batch(places)
    torch.testing.assert_close(loss(live), loss(cached), rtol=1e-5, atol=0)
    for name, tensor in vars(cached).items():
        if isinstance(tensor, Tensor):
            torch.testing.assert_close(getattr(live, name), tensor, rtol=1e-4, atol=1e-5)
    for name, tensor in vars(whole.absence()).items():
        torch.testing.assert_close(getattr(part.absence(), name), tensor, rtol=0, atol=0)


def test_a_kind_that_is_not_cached_takes_no_place_and_no_network_runs_for_it(
    without: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    real = Encoders.load

    def load(models: Models) -> Encoders:
        encoders = real(models)
        encoders.vae.forward = encoders.vae.encode = lambda *_: pytest.fail("the VAE ran")  # pyright: ignore
        for network in encoders.text_encoders:
            network.register_forward_pre_hook(lambda *_: pytest.fail("a text encoder ran"))
        return encoders

    monkeypatch.setattr(Encoders, "load", load)
    folder = without("images")
    with safe_open(folder / "train-00000.safetensors", framework="pt") as file:
        assert file.get_tensor("mean").numel() == file.get_tensor("std").numel() == 0
        assert file.get_tensor("views").numel() > 0 < file.get_tensor("masks").numel()
    with safe_open(folder / "texts-00000.safetensors", framework="pt") as file:
        assert file.get_tensor("embedding").numel() == file.get_tensor("pooled").numel() == 0


def test_training_live_is_training_from_the_cache(
    models: Models, features: Path, without: Callable[..., Path], make_train_config: Maker, tmp_path: Path
):
    def curve(folder: Path, name: str) -> list[float]:
        # Small steps: Adam magnifies a rounding where a gradient is near zero.
        config = make_train_config(learning_rate=1e-6, steps=3)
        out = train(config, models=models, features=folder, out=tmp_path / name, work=tmp_path / f"{name}-work")
        rows = read_rows(out / "curve.parquet", "curve")
        return [row["loss"] for row in rows] + [rows[-1]["validation_loss"]]

    assert curve(without(), "live") == pytest.approx(curve(features, "cached"), rel=1e-5)


def test_only_the_networks_that_are_needed_stay_in_memory(models: Models, features: Path, without: Callable[..., Path]):
    live = Live.of(without("latents", "texts"), models=models)
    assert live is not None and live.kinds == {"images"}
    held = live._encoders
    devices = [network.device.type for network in (held.vae, *held.text_encoders, held.image_encoder)]
    assert devices == ["meta", "meta", "meta", "cpu"]
    assert Live.of(features, models=models) is None


def test_a_cache_with_gaps_is_no_use_without_the_networks(without: Callable[..., Path]):
    with pytest.raises(DataError, match=r"holds only \[images texts\]"):
        FeatureSet(without("images", "texts"), split="train")


def test_other_weights_than_those_of_the_cache_are_an_error(without: Callable[..., Path], models: Models):
    folder = without("texts")
    with pytest.raises(DataError, match="other networks"):
        Live.of(folder, models=models.model_copy(update={"resolution": 32}))


def test_an_image_that_has_changed_is_an_error(
    without: Callable[..., Path], rows: list[Row], models: Models, tmp_path: Path
):
    path = Path(shutil.copy(rows[0]["image_path"], tmp_path))
    folder = without("texts", of=[{**rows[0], "image_path": str(path)}])
    data = FeatureSet(folder, split="train", live=Live.of(folder, models=models))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path.name} has changed"):
        data.read([0])


@pytest.mark.parametrize("cache", [("pixels",), ("texts", "texts")])
def test_an_unknown_kind_or_one_given_twice_is_an_error(make_features_config: Maker, cache: tuple[str, ...]):
    with pytest.raises(ValidationError, match="cache"):
        make_features_config(cache=cache)
