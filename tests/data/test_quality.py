import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mip.config import OpenClip
from mip.data import openclip, quality, samples
from mip.data.quality import Reason, terms
from mip.errors import CheckpointError, ConfigError
from mip.tables import read_rows


def _samples(kit, root: Path, names: str = "abcd") -> Path:
    files = {}
    for seed, stem in enumerate(names):
        files |= kit.pair(stem, seed=seed)
    index_part, masks_part = kit.masks(root, files)
    labels = [{"object_id": "1", "label": "ball", "logit": 0.9}, {"object_id": "2", "label": "star", "logit": 0.8}]
    lines = [{"image_id": stem, "caption": "a ball and a star", "labels": labels} for stem in names]
    folder = kit.labels(root / "labels", lines)
    return samples.construct_shard(
        kit.construct(), index_part=index_part, masks_part=masks_part, labels_folder=folder, out=root / "samples"
    )


def _model(folder: Path, **changes: Any) -> OpenClip:
    return OpenClip.model_validate(
        {"name": f"local-dir:{folder}", "pretrained": None, "batch": 2, "device": "cpu"} | changes
    )


def test_the_score_is_the_mean_match_less_the_strongest_likeness():
    texts = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    images = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    text_image, image_image, score = terms(texts, images, weight=0.5)
    assert text_image == pytest.approx([1, 0, 0.8])
    assert image_image == pytest.approx([0, 0.6, 0.8])  # (0, 1), (0, 2), (1, 2)
    assert score == pytest.approx(1.8 / 3 - 0.5 * 0.8)


def test_a_lone_object_has_no_likeness():
    one = np.array([[1, 0]], np.float32)
    assert terms(one, one, weight=1.0) == ([1.0], [], 1.0)


def test_every_sample_is_scored_in_order_and_its_terms_are_kept(kit, tmp_path: Path, clip_folder: Path):
    part = _samples(kit, tmp_path)
    quality.score_shard(kit.score(clip_folder), samples_part=part, out=tmp_path / "scores")
    rows = read_rows(quality.finish(samples=part.parent, out=tmp_path / "scores"), "scores")
    assert [row["sample_id"] for row in rows] == [f"sa_0:{stem}" for stem in "abcd"]
    for row in rows:
        assert (len(row["text_image"]), len(row["image_image"])) == (2, 1)
        assert row["score"] == pytest.approx(np.mean(row["text_image"]) - row["image_image"][0])


def test_score_twice_gives_the_same_bytes(kit, tmp_path: Path, clip_folder: Path):
    part = _samples(kit, tmp_path)
    outs = [quality.score_shard(kit.score(clip_folder), samples_part=part, out=tmp_path / name) for name in "ab"]
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_the_batch_changes_no_score(kit, tmp_path: Path, clip_folder: Path):
    part = _samples(kit, tmp_path)
    scores = []
    for batch in (1, 7):
        config = kit.score(clip_folder, model=_model(clip_folder, batch=batch).model_dump())
        out = quality.score_shard(config, samples_part=part, out=tmp_path / str(batch))
        scores.append([row["score"] for row in read_rows(out, "scores")])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_a_sample_whose_image_went_away_is_rejected(kit, tmp_path: Path, clip_folder: Path):
    part = _samples(kit, tmp_path)
    (tmp_path / "sa_0.tar").write_bytes((tmp_path / "sa_0.tar").read_bytes()[:2000])
    quality.score_shard(kit.score(clip_folder), samples_part=part, out=tmp_path / "scores")
    quality.finish(samples=part.parent, out=tmp_path / "scores")
    rejected = read_rows(tmp_path / "scores" / "rejected.parquet", "rejected")
    assert set(kit.reasons(rejected, "sample")) == {Reason.UNREADABLE}


def test_a_score_that_is_no_number_is_rejected(kit, tmp_path: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch):
    part = _samples(kit, tmp_path)
    monkeypatch.setattr(quality, "terms", lambda *_, **__: ([0.0], [0.0], float("nan")))
    quality.score_shard(kit.score(clip_folder), samples_part=part, out=tmp_path / "scores")
    rejected = read_rows(tmp_path / "scores" / "rejected-sa_0.parquet", "rejected")
    assert kit.reasons(rejected) == [Reason.NOT_FINITE] * 4


def test_a_template_without_a_place_for_the_name_is_an_error(kit, tmp_path: Path, clip_folder: Path):
    with pytest.raises(ConfigError, match=r"score\.template"):
        quality.score_shard(kit.score(clip_folder, template="a photo"), samples_part=tmp_path, out=tmp_path)


def test_features_are_float32_of_length_one(clip_folder: Path):
    encoder = openclip.load(_model(clip_folder))
    images = encoder.encode_images(Image.new("RGB", (20, 20), (60 * n, 0, 0)) for n in range(5))
    texts = encoder.encode_texts(["a ball", "a star and a cup of a dog and a cat"])
    assert (images.shape, texts.shape, images.dtype) == ((5, 16), (2, 16), np.float32)
    assert np.linalg.norm(np.concatenate([images, texts]), axis=1) == pytest.approx(np.ones(7), abs=1e-5)


def test_texts_are_told_apart_by_the_folders_own_tokenizer(clip_folder: Path):
    texts = openclip.load(_model(clip_folder)).encode_texts(["ball", "star", "ball"])
    assert np.allclose(texts[0], texts[2])
    assert not np.allclose(texts[0], texts[1], atol=1e-3)


def test_a_model_is_loaded_once(clip_folder: Path):
    assert openclip.load(_model(clip_folder)) is openclip.load(_model(clip_folder))


@pytest.mark.parametrize(
    "changes", [{"name": "local-dir:nowhere"}, {"name": "ViT-B-33"}, {"name": "ViT-B-32", "pretrained": "nobody"}]
)
def test_a_model_that_open_clip_does_not_know_is_one_error(clip_folder: Path, changes: dict[str, Any]):
    with pytest.raises(CheckpointError, match="open_clip"):
        openclip.load(_model(clip_folder, **changes))


def test_light_stages_do_not_import_torch():
    modules = ", ".join(f"mip.data.{name}" for name in ("sources", "masks", "samples", "labels", "manifest"))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
