"""Cached features: what they hold, and that they depend on nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mip.config import Models
from mip.tables import Row, file_hash, read_rows
from mip.training import encodings
from mip.training.dataset import FeatureSet
from mip.training.encodings import EncodingCache
from mip.training.features import encode
from mip.training.networks import Encoders

Maker = Callable[..., Any]


@pytest.fixture
def run(models: Models, make_features_config: Maker, make_manifest: Maker, tmp_path: Path) -> Callable[..., Path]:
    """Encode rows; `work` of the same name is shared."""
    count = iter(range(99))

    def encoded(train: list[Row], val: list[Row], work: str = "work", **changes: Any) -> Path:
        folder = tmp_path / f"run{next(count)}"
        manifest = make_manifest(folder / "manifest", train, val)
        config = make_features_config(**changes)
        return encode(config, models=models, manifest=manifest, out=folder / "out", work=tmp_path / work)

    return encoded


def contents(folder: Path) -> dict[tuple[str, int], list[bytes]]:
    """Every tensor of each (sample, augmentation)."""
    found = {}
    for split in ("train", "val"):
        data = FeatureSet(folder, split=split)
        for place, row in enumerate(data.rows):
            values = [value for value in vars(data.batch([place])).values() if isinstance(value, torch.Tensor)]
            found[row["sample_id"], row["augmentation"]] = [value.numpy().tobytes() for value in values]
    return found


def test_every_augmentation_of_every_sample_is_there(features: Path):
    index = read_rows(features / "index.parquet", "features")
    assert {(row["split"], row["sample_id"], row["augmentation"]) for row in index} == {
        ("train" if number < 5 else "val", f"s{number}", augmentation) for number in range(7) for augmentation in (0, 1)
    }


def test_the_same_manifest_gives_the_same_bytes_whatever_was_cached(run: Callable[..., Path], rows: list[Row]):
    fresh = run(rows[:5], rows[5:], work="one")
    again = run(rows[:5], rows[5:], work="one")
    run(rows[3:], rows[:1], work="other")
    partly_cached = run(rows[:5], rows[5:], work="other")
    assert file_hash(fresh) == file_hash(again) == file_hash(partly_cached)


def test_a_samples_features_depend_neither_on_order_nor_on_batch_nor_on_the_other_samples(
    run: Callable[..., Path], rows: list[Row]
):
    whole = contents(run(rows[:5], rows[5:], work="one"))
    other = contents(run(rows[4:1:-1], rows[:1], work="two", batch=1, shard=2))
    assert other == {key: whole[key] for key in other}


def test_a_smaller_manifest_encodes_nothing_again(
    run: Callable[..., Path], rows: list[Row], monkeypatch: pytest.MonkeyPatch
):
    run(rows[:5], rows[5:])
    monkeypatch.setattr(Encoders, "load", lambda models: pytest.fail("the networks were loaded"))
    run(rows[1:4], rows[6:])


def test_a_killed_run_goes_on_where_it_was(
    run: Callable[..., Path], rows: list[Row], monkeypatch: pytest.MonkeyPatch, models: Models
):
    expected = run(rows[:5], rows[5:], work="whole")
    encoded = []
    real = encodings.Prepared.encode

    def counted(self: encodings.Prepared, encoders: Encoders) -> encodings.Tensors:
        encoded.append(self)
        if len(encoded) == 4:
            raise KeyboardInterrupt
        return real(self, encoders)

    monkeypatch.setattr(encodings.Prepared, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        run(rows[:5], rows[5:], work="killed")
    assert file_hash(run(rows[:5], rows[5:], work="killed")) == file_hash(expected)
    assert len(encoded) == 4 + 4


def test_a_damaged_cache_file_is_encoded_again(run: Callable[..., Path], rows: list[Row], tmp_path: Path):
    expected = file_hash(run(rows[:2], []))
    for path in (tmp_path / "work").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert file_hash(run(rows[:2], [])) == expected


def test_a_new_image_under_an_old_name_is_encoded_anew(run: Callable[..., Path], make_row: Maker, tmp_path: Path):
    before = contents(run([make_row(tmp_path, 0)], []))
    row = make_row(tmp_path, 1)
    (tmp_path / "1.png").rename(tmp_path / "0.png")
    after = contents(run([{**row, "sample_id": "s0", "image_path": str(tmp_path / "0.png")}], []))
    assert before["s0", 0][0] != after["s0", 0][0]


def test_an_object_that_the_crop_cut_away_is_left_out_and_counted(
    run: Callable[..., Path], make_row: Maker, tmp_path: Path
):
    # The hull is 100 wide and the crop 20: centred, it shows the object in the middle alone.
    row = make_row(tmp_path, 0, width=100, height=20, boxes=[[0, 0, 8, 8], [46, 4, 54, 12], [92, 0, 100, 8]])
    out = run([row], [])
    index = read_rows(out / "index.parquet", "features")
    assert [len(entry["names"]) for entry in index] == [1, 1]
    dropped = read_rows(out / "rejected.parquet", "rejected")
    assert {(entry["id"], entry["reason"]) for entry in dropped} == {
        (f"s0/{augmentation}/{place}", "outside_crop") for augmentation in (0, 1) for place in (0, 2)
    }


def test_an_augmentation_without_any_object_is_rejected(run: Callable[..., Path], make_row: Maker, tmp_path: Path):
    row = make_row(tmp_path, 0, width=100, height=20, boxes=[[0, 0, 8, 8], [92, 0, 100, 8]])
    out = run([row], [])
    assert not read_rows(out / "index.parquet", "features")
    dropped = read_rows(out / "rejected.parquet", "rejected")
    assert {entry["id"] for entry in dropped if entry["reason"] == "no_object"} == {"s0/0", "s0/1"}


def test_an_unreadable_image_is_rejected_and_nothing_else(
    run: Callable[..., Path], make_row: Maker, rows: list[Row], tmp_path: Path
):
    row = make_row(tmp_path, 9)
    (tmp_path / "9.png").write_bytes(bytes(row["image_size"]))
    out = run([rows[0], row], [])
    index = read_rows(out / "index.parquet", "features")
    assert {entry["sample_id"] for entry in index} == {"s0"}
    dropped = read_rows(out / "rejected.parquet", "rejected")
    assert {entry["id"] for entry in dropped if entry["unit"] == "augmentation"} == {"s9/0", "s9/1"}
    assert {entry["reason"] for entry in dropped} == {"unreadable_image"}


def test_an_object_whose_name_has_too_many_tokens_is_left_out(
    run: Callable[..., Path], make_row: Maker, tmp_path: Path
):
    row = make_row(tmp_path, 0)
    row["objects"][1]["label"] = "x" * 80
    out = run([row], [])
    assert [len(entry["names"]) for entry in read_rows(out / "index.parquet", "features")] == [1, 1]
    dropped = read_rows(out / "rejected.parquet", "rejected")
    assert {entry["reason"] for entry in dropped} == {"unusable_name"}


def test_each_text_is_stored_once(run: Callable[..., Path], rows: list[Row]):
    out = run([rows[0], {**rows[0], "sample_id": "copy"}], [])
    stored = [load_file(path)["pooled"] for path in sorted(out.glob("texts-*.safetensors"))]
    assert sum(map(len, stored)) == len({"", rows[0]["caption"], *(thing["label"] for thing in rows[0]["objects"])})


def test_features_are_those_of_the_pipeline(features: Path, models: Models, rows: list[Row]):
    data, encoders = FeatureSet(features, split="train"), Encoders.load(models)
    row = data.rows[0]
    batch = data.batch([0])
    name = next(thing["label"] for thing in rows[0]["objects"])
    torch.testing.assert_close(batch.phrase_BNTE[0, 0], encoders.text(name).embedding_TE, rtol=0, atol=0)
    torch.testing.assert_close(batch.pooled_BD[0], encoders.text(rows[0]["caption"]).pooled_D, rtol=0, atol=0)
    assert batch.words_BNT[0, 0].sum() == (1 if name == "cat" else 3)
    assert batch.time_ids_B6[0].tolist() == row["time_ids"] == [20, 30, 0, row["time_ids"][3], 16, 16]


def test_no_image_is_a_zero_embedding_or_the_encoded_zero_image(features: Path, models: Models):
    absent = FeatureSet(features, split="train").absence().features_F
    if models.variant == "sdxl":
        assert not absent.any()
    else:
        encoders = Encoders.load(models)
        pixels = torch.zeros(1, 3, 32, 32)
        with torch.no_grad():
            expected = encoders.image_encoder(pixels, output_hidden_states=True).hidden_states[-2][0]
        torch.testing.assert_close(absent, expected)


def test_latents_are_scaled_for_the_unet(models: Models):
    encoders = Encoders.load(models)
    image = Image.effect_noise((16, 16), 60)
    mean, std = encoders.latents([image])
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).view(16, 16, 3)
    with torch.no_grad():
        drawn: Any = encoders.vae.encode(pixels.permute(2, 0, 1)[None].float() / 127.5 - 1)
    scale = encoders.vae.config["scaling_factor"]
    torch.testing.assert_close(mean, drawn.latent_dist.mean * scale)
    torch.testing.assert_close(std, drawn.latent_dist.std * scale)


def test_key_follows_the_networks_files(models: Models, make_features_config: Maker, tmp_path: Path):
    before = EncodingCache(make_features_config(), models=models, folder=tmp_path).key
    assert before == EncodingCache(make_features_config(batch=7), models=models, folder=tmp_path).key
    config = Path(models.image_encoder) / "config.json"
    text = config.read_text()
    try:
        config.write_text(text + " ")
        assert before != EncodingCache(make_features_config(), models=models, folder=tmp_path).key
    finally:
        config.write_text(text)
