"""Reading features, and the order in which they come."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from mip.errors import DataError, SchemaError
from mip.training.dataset import FeatureSet, Sampler


def test_samples_with_different_numbers_of_objects_share_a_batch(features: Path):
    data = FeatureSet(features, split="train")
    batch = data.batch(list(range(len(data))))
    assert batch.present_BN.sum(dim=1).tolist() == [len(row["names"]) for row in data.rows]
    assert {2, 3} == set(batch.present_BN.sum(dim=1).tolist())
    assert not batch.features_BNF[~batch.present_BN].any()
    assert not batch.words_BNT[~batch.present_BN].any()
    assert batch.words_BNT[batch.present_BN].any(dim=1).all()


def test_a_samples_place_in_the_batch_does_not_change_it(features: Path):
    data = FeatureSet(features, split="train")
    alone, together = data.batch([3]), data.batch([0, 3])
    count = alone.present_BN.shape[1]
    assert (together.features_BNF[1, :count] == alone.features_BNF[0]).all()
    assert (together.mean_BCHW[1] == alone.mean_BCHW[0]).all()
    assert together.sample_ids[1] == alone.sample_ids[0]


def test_masks_lie_on_the_latents(features: Path):
    data = FeatureSet(features, split="train")
    batch = data.batch([0, 1])
    assert batch.masks_BNHW.shape[2:] == batch.mean_BCHW.shape[2:]
    assert (batch.masks_BNHW.flatten(2).amax(dim=2)[batch.present_BN] > 0.5).all()


def test_every_epoch_has_every_sample_once():
    sampler = Sampler(np.ones(10), batch=5, seed=1)
    epochs = [sampler.places(2 * epoch) + sampler.places(2 * epoch + 1) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_batch_may_reach_into_the_next_epoch():
    sampler, whole = Sampler(np.ones(5), batch=3, seed=1), Sampler(np.ones(5), batch=15, seed=1)
    assert [place for step in range(5) for place in sampler.places(step)] == whole.places(0)


def test_order_follows_the_seed_alone():
    first, again, other = (Sampler(np.ones(50), batch=50, seed=seed) for seed in (1, 1, 2))
    assert again.places(7) == first.places(7) != other.places(7)


def test_a_sample_of_double_weight_comes_twice_as_often():
    weights = np.asarray([2.0, 1.0, 1.0, 0.0])
    sampler = Sampler(weights, batch=400, seed=3)
    assert np.bincount(sampler.places(0), minlength=4).tolist() == [200, 100, 100, 0]


def test_features_that_are_not_there_are_an_error(tmp_path: Path):
    with pytest.raises((DataError, SchemaError)):
        FeatureSet(tmp_path, split="train")


@pytest.fixture
def copy(features: Path, tmp_path: Path) -> Path:
    """Features that may be spoilt."""
    return shutil.copytree(features, tmp_path / "copy")


@pytest.mark.parametrize("name", ["train-00000.safetensors", "texts-00001.safetensors", "absent.safetensors"])
def test_a_missing_file_is_named(copy: Path, name: str):
    (copy / name).unlink()
    with pytest.raises(DataError, match=f"there is no .*{name}"):
        FeatureSet(copy, split="train")


@pytest.mark.parametrize("name", ["train-00001.safetensors", "texts-00000.safetensors", "absent.safetensors"])
def test_one_flipped_bit_is_an_error_that_names_the_file(copy: Path, name: str):
    content = bytearray((copy / name).read_bytes())
    content[-1] ^= 1  # the last byte of a tensor: the file can still be read
    (copy / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} is damaged"):
        FeatureSet(copy, split="train")


def test_damage_in_another_split_is_its_own_affair(copy: Path):
    (copy / "val-00000.safetensors").write_bytes(b"")
    assert len(FeatureSet(copy, split="train")) == 10
    with pytest.raises(DataError, match=r"val-00000\.safetensors is damaged"):
        FeatureSet(copy, split="val")


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_without_readable_checksums_there_are_no_features(copy: Path, content: str | None):
    (copy / "checksums.json").unlink()
    if content is not None:
        (copy / "checksums.json").write_text(content)
    with pytest.raises(DataError, match=r"checksums\.json"):
        FeatureSet(copy, split="train")
