import json
from pathlib import Path
from typing import Any

import pytest

from mip.data import masks, parts
from mip.data.masks import Reason
from mip.errors import DataError
from mip.tables import read_rows


def _run(kit, root: Path, files: dict[str, bytes], **changes: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    kit.masks(root, files, **changes)
    out = masks.finish(index=root / "index", out=root / "masks")
    return read_rows(out, "masks"), read_rows(out / "rejected.parquet", "rejected")


def test_masks_keep_their_run_lengths_and_get_their_own_geometry(kit, tmp_path: Path):
    rows, rejected = _run(kit, tmp_path, kit.pair("a"))
    assert [(row["object_id"], row["box"], row["area"]) for row in rows] == [
        ("1", [4, 4, 24, 24], 400),
        ("2", [34, 34, 58, 58], 576),
    ]
    assert rows[0]["rle"] == kit.rle((4, 4, 24, 24))
    assert rejected == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image": b"no image"}, Reason.BROKEN_IMAGE),
        ({"image": "cut"}, Reason.BROKEN_IMAGE),
        ({"image": "other size"}, Reason.WRONG_SIZE),
        ({"annotation": b'{"image": {"width": 64, "height": 64}, "annotations": [}'}, Reason.BAD_JSON),
        ({"annotation": b'{"image": {"width": 64, "height": 64}, "annotations": 3}'}, Reason.BAD_JSON),
        ({"annotation": b'{"image": {"width": 64, "height": 64}, "annotations": []}'}, Reason.NO_ANNOTATIONS),
        ({"annotation": "many"}, Reason.TOO_MANY_ANNOTATIONS),
        ({"annotation": "hopeless"}, Reason.NO_OBJECTS),
    ],
)
def test_a_bad_image_is_rejected_with_its_reason_and_the_rest_is_kept(kit, tmp_path: Path, changes, reason: Reason):
    made = {
        "cut": kit.jpeg()[:700],
        "other size": kit.jpeg(size=(32, 64)),
        "many": kit.sa1b_json([kit.annotation(n) for n in range(21)]),
        "hopeless": kit.sa1b_json([{"id": 1}]),
    }
    changes = {key: made.get(value, value) for key, value in changes.items()}
    rows, rejected = _run(kit, tmp_path, kit.pair("a", **changes) | kit.pair("b"))
    assert kit.reasons(rejected, "image") == [reason]
    assert {row["image_id"] for row in rows} == {"b"}


def test_an_image_over_the_limit_is_rejected(kit, tmp_path: Path):
    _, rejected = _run(kit, tmp_path, kit.pair("a"), max_pixels=64 * 64 - 1)
    assert kit.reasons(rejected) == [Reason.TOO_LARGE]


def test_a_file_that_went_away_is_rejected(kit, tmp_path: Path):
    index_part = kit.index(tmp_path, kit.pair("a"))
    (tmp_path / "sa_0.tar").write_bytes(b"")
    masks.extract_shard(kit.extract(), index_part=index_part, out=tmp_path / "masks")
    out = masks.finish(index=tmp_path / "index", out=tmp_path / "masks")
    assert kit.reasons(read_rows(out / "rejected.parquet", "rejected")) == [Reason.UNREADABLE]


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        ("text", Reason.BAD_ANNOTATION),
        ({"id": None}, Reason.BAD_ANNOTATION),
        ({"id": True}, Reason.BAD_ANNOTATION),
        ({"id": 1}, Reason.DUPLICATE_ID),
        ({"segmentation": None}, Reason.BAD_RLE),
        ({"segmentation": [[0, 0, 5, 5, 0, 5]]}, Reason.BAD_RLE),
        ({"segmentation": {"size": [64, 64], "counts": "zzzz"}}, Reason.BAD_RLE),
        ({"segmentation": {"size": [64, 64], "counts": [1, 2]}}, Reason.BAD_RLE),
        ({"segmentation": {"size": [64, 64], "counts": 7}}, Reason.BAD_RLE),
        ({"segmentation": {"size": [30000, 30000], "counts": "T3"}}, Reason.WRONG_SIZE),
        ({"segmentation": {"size": [64, 64], "counts": [4096]}}, Reason.EMPTY_MASK),
        ({"segmentation": {"size": [64, 64], "counts": [10, 3, 4083]}}, Reason.TOO_SMALL),
    ],
)
def test_a_bad_object_is_rejected_with_its_reason_and_the_rest_is_kept(kit, tmp_path: Path, annotation, reason: Reason):
    bad = kit.annotation(7) | annotation if isinstance(annotation, dict) else annotation
    rows, rejected = _run(kit, tmp_path, kit.pair("a", annotation=kit.sa1b_json([kit.annotation(1), bad])))
    assert kit.reasons(rejected, "object") == [reason]
    assert [row["object_id"] for row in rows] == ["1"]


def test_plain_lists_of_runs_are_compressed(kit, tmp_path: Path):
    plain = kit.annotation(1, segmentation={"size": [64, 64], "counts": [0, 640, 3456]})
    rows, _ = _run(kit, tmp_path, kit.pair("a", annotation=kit.sa1b_json([plain])))
    assert (rows[0]["box"], rows[0]["area"]) == ([0, 0, 10, 64], 640)


def test_scores_that_are_no_numbers_become_null(kit, tmp_path: Path):
    odd = kit.annotation(1, predicted_iou="high", stability_score=float("nan"))
    rows, _ = _run(kit, tmp_path, kit.pair("a", annotation=kit.sa1b_json([odd])))
    assert (rows[0]["predicted_iou"], rows[0]["stability_score"]) == (None, None)


def test_extract_twice_gives_the_same_bytes(kit, tmp_path: Path):
    index_part, part = kit.masks(tmp_path, kit.pair("a") | kit.pair("b", image=b"x"))
    first = part.read_bytes(), (tmp_path / "masks" / "rejected-sa_0.parquet").read_bytes()
    masks.extract_shard(kit.extract(), index_part=index_part, out=tmp_path / "masks")
    assert first == (part.read_bytes(), (tmp_path / "masks" / "rejected-sa_0.parquet").read_bytes())


def test_finish_joins_the_shards_and_notices_a_missing_one(kit, tmp_path: Path):
    for shard in ("sa_0", "sa_1"):
        part = kit.index(tmp_path, kit.pair("a", image=b"x") | kit.pair("b"), shard=shard)
        masks.extract_shard(kit.extract(), index_part=part, out=tmp_path / "masks")
    masks.finish(index=tmp_path / "index", out=tmp_path / "masks")
    rejected = read_rows(tmp_path / "masks" / "rejected.parquet", "rejected")
    assert [row["id"] for row in rejected] == ["sa_0:a", "sa_1:a"]
    kit.index(tmp_path, kit.pair("a"), shard="sa_2")
    with pytest.raises(DataError, match="rejected-sa_"):
        masks.finish(index=tmp_path / "index", out=tmp_path / "masks")


def test_a_lost_image_breaks_the_conservation_law(kit, tmp_path: Path):
    kit.masks(tmp_path, kit.pair("a"))
    kit.index(tmp_path, kit.pair("a") | kit.pair("b"))
    with pytest.raises(AssertionError, match="2 images came in, 1 went out and 0 were rejected"):
        masks.finish(index=tmp_path / "index", out=tmp_path / "masks")


def test_a_part_that_fails_leaves_nothing_behind(tmp_path: Path):
    with pytest.raises(KeyError), parts.PartWriter(tmp_path, shard="s", kind="index", made_from={}) as part:
        part.keep([{"image_id": "a"}])
        raise KeyError("killed")
    assert list(tmp_path.iterdir()) == []


def test_parts_larger_than_a_group_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parts, "_GROUP", 3)
    with parts.PartWriter(tmp_path, shard="s", kind="masks", made_from={}) as part:
        part.keep([{"object_id": str(n)} for n in range(10)])
    rows = parts.stream_rows(tmp_path / "part-s.parquet", "masks")
    assert [row["object_id"] for row in rows] == [str(n) for n in range(10)]


def test_boxes_and_areas_of_the_file_are_not_trusted(kit, tmp_path: Path):
    lying = kit.annotation(1, bbox=[0, 0, 9999, 9999], area=10**9)
    rows, _ = _run(
        kit,
        tmp_path,
        kit.pair("a", annotation=json.dumps({"image": {"width": 64, "height": 64}, "annotations": [lying]}).encode()),
    )
    assert rows[0]["area"] == 400
