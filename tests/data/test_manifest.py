import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mip.data import manifest, parts, samples
from mip.data.hashes import NearHashes, perceptual_hash
from mip.data.selection import Reason
from mip.errors import DataError
from mip.tables import read_rows, rejected


def _world(kit, root: Path, images: Mapping[str, bytes], scores: Mapping[str, float], **labels: Sequence[str]) -> None:
    """All stages before the manifest, with these scores; `labels` are the two names of an image."""
    files: dict[str, bytes] = {}
    for stem, image in images.items():
        files |= kit.pair(stem, image=image)
    index_part, masks_part = kit.masks(root, files)
    (root / "index" / "rejected-sa_0.parquet").rename(root / "index" / "rejected.parquet")
    lines = []
    for stem in images:
        names = labels.get(stem, ("ball", "star"))
        things = [{"object_id": str(n), "label": name, "logit": 0.9} for n, name in enumerate(names, start=1)]
        lines.append({"image_id": stem, "caption": " ".join(names), "labels": things})
    folder = kit.labels(root / "labels", lines)
    samples.construct_shard(
        kit.construct(), index_part=index_part, masks_part=masks_part, labels_folder=folder, out=root / "samples"
    )
    for stage in ("masks", "samples"):
        parts.finish(root / stage, shards=["sa_0"])
    with parts.PartWriter(root / "scores", shard="sa_0", kind="scores", made_from={"model": "m"}) as part:
        for stem, score in scores.items():
            part.keep([{"sample_id": f"sa_0:{stem}", "text_image": [1.0, 1.0], "image_image": [0.0], "score": score}])
        unscored = [row["sample_id"] for row in read_rows(root / "samples", "samples") if row["image_id"] not in scores]
        part.reject([rejected("sample", name, "unreadable") for name in unscored])
    parts.finish(root / "scores", shards=["sa_0"])
    if not (root / "index" / "tasks.parquet").exists():
        kit.tasks(root / "index")


def _build(kit, root: Path, **changes: Any) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Ranks by image id, and the rejected rows."""
    folders = {name: root / name for name in ("index", "masks", "samples", "scores")}
    out = manifest.build(kit.manifest(**changes), **folders, out=root / "manifest")
    rows = read_rows(out / "train.parquet", "manifest") + read_rows(out / "val.parquet", "manifest")
    return {row["image_id"]: row["rank"] for row in rows}, read_rows(out / "rejected.parquet", "rejected")


def _four(kit, root: Path, **labels: Sequence[str]) -> None:
    images = {stem: kit.jpeg(seed) for seed, stem in enumerate("abcd")}
    _world(kit, root, images, {"a": 0.1, "b": 0.4, "c": 0.4, "d": 0.2}, **labels)


def test_samples_are_ranked_by_score_and_ties_by_id(kit, tmp_path: Path):
    _four(kit, tmp_path)
    assert _build(kit, tmp_path) == ({"a": 4, "b": 1, "c": 2, "d": 3}, [])


def test_rows_keep_the_samples_order_and_carry_scores_and_lineage(kit, tmp_path: Path):
    _four(kit, tmp_path)
    _build(kit, tmp_path)
    rows = read_rows(tmp_path / "manifest" / "train.parquet", "manifest")
    assert [row["image_id"] for row in rows] == list("abcd")
    assert [row["score"] for row in rows] == [0.1, 0.4, 0.4, 0.2]
    assert {row["weight"] for row in rows} == {1.0}
    assert json.loads(rows[0]["models"])["score"] == "m"
    assert json.loads(rows[0]["models"])["labels"].startswith("given:")


@pytest.mark.parametrize(
    ("changes", "kept", "reason"),
    [
        ({"threshold": 0.2}, {"b": 1, "c": 2, "d": 3}, Reason.BELOW_THRESHOLD),
        ({"top_k": 3}, {"b": 1, "c": 2, "d": 3}, Reason.BELOW_TOP_K),
        ({"max_per_class_pair": 3}, {"b": 1, "c": 2, "d": 3}, Reason.CLASS_PAIR_FULL),
    ],
)
def test_a_limit_rejects_the_worst_with_its_reason(kit, tmp_path: Path, changes, kept, reason: Reason):
    _four(kit, tmp_path)
    ranks, lost = _build(kit, tmp_path, **changes)
    assert (ranks, kit.reasons(lost, "sample")) == (kept, [reason])


def test_a_random_order_takes_as_many_whatever_their_score_and_the_same_ones_again(kit, tmp_path: Path):
    images = {name: kit.jpeg(number) for number, name in enumerate("abcdefgh")}
    _world(kit, tmp_path, images, {name: number / 10 for number, name in enumerate("abcdefgh")})
    (first, _), (again, _), (other, _) = (
        _build(kit, tmp_path, order="random", top_k=4, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again and len(first) == len(other) == 4
    assert first != other and set(first) != set("efgh")


def test_a_class_pair_is_counted_by_its_names_in_any_order(kit, tmp_path: Path):
    _four(kit, tmp_path, a=("star", "ball"), b=("ball", "star"), c=("cup", "star"), d=("cup", "ball"))
    ranks, _ = _build(kit, tmp_path, max_per_class_pair=1)
    assert set(ranks) == {"b", "c", "d"}


def test_the_place_of_a_rejected_sample_goes_to_the_next_one(kit, tmp_path: Path):
    _world(kit, tmp_path, {"a": kit.jpeg(0), "b": kit.jpeg(0), "c": kit.jpeg(1)}, {"a": 0.9, "b": 0.8, "c": 0.7})
    ranks, lost = _build(kit, tmp_path, top_k=2)
    assert (ranks, kit.reasons(lost)) == ({"a": 1, "c": 2}, [Reason.DUPLICATE])


def test_the_better_one_of_two_equal_images_stays(kit, tmp_path: Path):
    _world(kit, tmp_path, {"a": kit.jpeg(0), "b": kit.jpeg(0)}, {"a": 0.1, "b": 0.8})
    ranks, lost = _build(kit, tmp_path)
    assert ranks == {"b": 1}
    assert (lost[0]["reason"], lost[0]["detail"]) == (Reason.DUPLICATE, "sa_0:b")


def _again(data: bytes, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def test_a_recompressed_image_is_a_near_duplicate(kit, tmp_path: Path):
    _world(kit, tmp_path, {"a": kit.jpeg(3), "b": _again(kit.jpeg(3), 60)}, {"a": 0.9, "b": 0.8})
    ranks, lost = _build(kit, tmp_path, duplicate_distance=4)
    assert (ranks, kit.reasons(lost)) == ({"a": 1}, [Reason.NEAR_DUPLICATE])


def test_an_image_of_the_benchmark_is_a_leak(kit, tmp_path: Path):
    (tmp_path / "cat.jpg").write_bytes(_again(kit.jpeg(1), 70))
    kit.tasks(tmp_path / "index", [tmp_path / "cat.jpg"])
    _four(kit, tmp_path)
    ranks, lost = _build(kit, tmp_path, leak_distance=4)
    assert (set(ranks), kit.reasons(lost)) == ({"a", "c", "d"}, [Reason.BENCHMARK_LEAK])


def test_an_image_that_went_away_is_rejected(kit, tmp_path: Path):
    _four(kit, tmp_path)
    (tmp_path / "sa_0.tar").write_bytes(b"")
    ranks, lost = _build(kit, tmp_path)
    assert (ranks, kit.reasons(lost)) == ({}, [Reason.UNREADABLE] * 4)


def test_the_split_depends_on_the_image_and_not_on_the_selection(kit, tmp_path: Path):
    images = {f"i{n}": kit.jpeg(n) for n in range(30)}
    _world(kit, tmp_path, images, {stem: n / 30 for n, stem in enumerate(images)})
    splits = []
    for changes in ({}, {"threshold": 0.5}):
        _build(kit, tmp_path, validation_share=0.4, **changes)
        splits.append({row["image_id"] for row in read_rows(tmp_path / "manifest" / "val.parquet", "manifest")})
    assert 0 < len(splits[1]) < len(splits[0]) < 30
    assert splits[1] == {stem for stem in splits[0] if int(stem[1:]) >= 15}


def test_manifest_twice_gives_the_same_bytes(kit, tmp_path: Path):
    _four(kit, tmp_path)
    contents = []
    for _ in range(2):
        _build(kit, tmp_path, top_k=2, validation_share=0.5)
        contents.append({p.name: p.read_bytes() for p in sorted((tmp_path / "manifest").iterdir())})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {
        "train.parquet",
        "val.parquet",
        "rejected.parquet",
        "funnel.json",
        "accepted.png",
        "rejected.png",
    }


def test_the_funnel_counts_every_stage(kit, tmp_path: Path):
    images = {"a": kit.jpeg(0), "b": kit.jpeg(1), "c": b"broken", "d": kit.jpeg(2)}
    _world(kit, tmp_path, images, {"a": 0.9, "b": 0.1})
    _build(kit, tmp_path, threshold=0.5)
    funnel = json.loads((tmp_path / "manifest" / "funnel.json").read_text())
    counted = {(s["stage"], s["unit"]): (s["came"], s["kept"], s["rejected"]) for s in funnel["stages"]}
    assert counted == {
        ("ingest", "image"): (4, 4, {}),
        ("extract", "image"): (4, 3, {"broken_image": 1}),
        ("extract", "object"): (6, 6, {}),
        ("construct", "image"): (3, 3, {}),
        ("construct", "object"): (6, 6, {}),
        ("score", "sample"): (3, 2, {"unreadable": 1}),
        ("manifest", "sample"): (2, 1, {"below_threshold": 1}),
    }
    assert (funnel["train"], funnel["validation"]) == (1, 0)


def test_a_lost_sample_breaks_the_conservation_law(kit, tmp_path: Path):
    _four(kit, tmp_path)
    with parts.PartWriter(tmp_path / "scores", shard="sa_0", kind="scores", made_from={}) as part:
        part.keep([{"sample_id": "sa_0:a", "text_image": [1.0], "image_image": [], "score": 1.0}])
    with pytest.raises(AssertionError, match="score: 4 samples came in, 1 went out"):
        _build(kit, tmp_path)


def test_scores_of_other_samples_are_an_error(kit, tmp_path: Path):
    _four(kit, tmp_path)
    with parts.PartWriter(tmp_path / "scores", shard="sa_0", kind="scores", made_from={}) as part:
        part.keep([{"sample_id": "sa_0:x", "text_image": [1.0], "image_image": [], "score": 1.0}])
    with pytest.raises(DataError, match="run the stage score again"):
        _build(kit, tmp_path)


def test_no_samples_at_all_make_an_empty_manifest(kit, tmp_path: Path):
    _world(kit, tmp_path, {"a": b"broken"}, {})
    assert _build(kit, tmp_path) == ({}, [])


# Hashes ------------------------------------------------------------------------------------------------------------


def test_hashes_of_different_pictures_are_far_apart_and_of_one_picture_near(kit):
    hashes = [perceptual_hash(Image.open(io.BytesIO(kit.jpeg(n)))) for n in range(8)]
    again = [perceptual_hash(Image.open(io.BytesIO(_again(kit.jpeg(n), 60)))) for n in range(8)]
    near = [(a ^ b).bit_count() for a, b in zip(hashes, again, strict=True)]
    far = [(hashes[i] ^ hashes[j]).bit_count() for i in range(8) for j in range(i)]
    assert max(near) <= 4 < 12 <= min(far)


@pytest.mark.parametrize("distance", [0, 1, 3, 9])
def test_the_search_finds_what_a_search_over_all_finds(distance: int):
    rng = np.random.default_rng(distance)
    known = [int(value) for value in rng.integers(0, 2**63, 200)]
    index = NearHashes(distance)
    for number, value in enumerate(known):
        index.add(value, str(number))
    for _ in range(300):
        value = known[int(rng.integers(200))]
        for bit in rng.integers(0, 64, int(rng.integers(0, 13))):
            value ^= 1 << int(bit)
        nearest = min((value ^ other).bit_count() for other in known)
        found = index.find(value)
        assert (found[1] if found else None) == (nearest if nearest <= distance else None)
