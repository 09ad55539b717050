from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mip.data import labels, samples
from mip.data.images import encode_mask
from mip.data.samples import Reason
from mip.errors import ConfigError, DataError
from mip.tables import read_rows

LEFT, RIGHT, MIDDLE = (4, 4, 24, 24), (34, 34, 58, 58), (26, 4, 46, 24)
Rows = list[dict[str, Any]]


def _label(identity: Any, name: str, logit: Any = 0.9) -> dict[str, Any]:
    return {"object_id": str(identity), "label": name, "logit": logit}


def _line(caption: str, *labels_: Any, image_id: str = "a") -> dict[str, Any]:
    return {"image_id": image_id, "caption": caption, "labels": list(labels_)}


def _run(
    kit, root: Path, boxes: Sequence[Sequence[int]], lines: Sequence[Any] | None, **changes: Any
) -> tuple[Rows, Rows]:
    """Construct one image `a` with these rectangles as objects 0, 1, ..."""
    text = kit.sa1b_json([kit.annotation(n, box) for n, box in enumerate(boxes)])
    index_part, masks_part = kit.masks(root, kit.pair("a", annotation=text))
    folder = kit.labels(root / "labels", lines) if lines is not None else None
    inputs = {"index_part": index_part, "masks_part": masks_part, "labels_folder": folder}
    samples.construct_shard(kit.construct(**changes), **inputs, out=root / "out")
    out = samples.finish(index=root / "index", out=root / "out")
    return read_rows(out, "samples"), read_rows(out / "rejected.parquet", "rejected")


def test_a_sample_has_its_caption_and_its_objects_the_surest_first(kit, tmp_path: Path):
    line = _line("a ball and a star", _label(0, "ball", 0.5), _label(1, "star", 0.8))
    (sample,), rejected = _run(kit, tmp_path, [LEFT, RIGHT], [line])
    assert (sample["sample_id"], sample["caption"]) == ("sa_0:a", "a ball and a star")
    assert [(o["label"], o["object_id"], o["logit"], o["margin"]) for o in sample["objects"]] == [
        ("star", "1", 0.8, None),
        ("ball", "0", 0.5, None),
    ]
    assert sample["objects"][1]["box"] == list(LEFT)
    assert rejected == []


@pytest.mark.parametrize(
    ("box", "label", "rules", "reason"),
    [
        ((0, 0, 8, 8), _label(2, "cup"), {}, Reason.BOX_TOO_SMALL),
        ((0, 0, 64, 60), _label(2, "cup"), {}, Reason.BOX_TOO_LARGE),
        ((0, 0, 60, 12), _label(2, "cup"), {}, Reason.ASPECT),
        (MIDDLE, _label(2, "cup", 0.3), {}, Reason.LOW_LOGIT),
        (MIDDLE, _label(2, "hat"), {}, Reason.NOT_IN_CAPTION),
        (MIDDLE, _label(2, "balls"), {}, Reason.SAME_NAME),
        ((6, 6, 24, 24), _label(2, "cup", 0.5), {}, Reason.CONTAINED),
        ((4, 10, 24, 40), _label(2, "cup", 0.5), {"max_masks_in_box": 1}, Reason.CROWDED_BOX),
        (MIDDLE, _label(9, "cup"), {}, labels.Reason.NO_LABEL),
    ],
)
def test_a_rule_rejects_an_object_with_its_reason(kit, tmp_path: Path, box, label, rules, reason):
    line = _line("a ball, a star and a cup", _label(0, "ball"), _label(1, "star"), label)
    _, rejected = _run(kit, tmp_path, [LEFT, RIGHT, box], [line], rules=rules, min_objects=1)
    assert reason in [row["reason"] for row in rejected if row["id"] == "sa_0:a:2"]


def test_a_box_that_is_hardly_filled_is_rejected(kit, tmp_path: Path):
    ring = np.zeros((64, 64), np.bool_)
    ring[10:50, 10:50] = True
    ring[11:49, 11:49] = False
    text = kit.sa1b_json([kit.annotation(0, segmentation={"size": [64, 64], "counts": encode_mask(ring)})])
    index_part, masks_part = kit.masks(tmp_path, kit.pair("a", annotation=text))
    folder = kit.labels(tmp_path / "labels", [_line("a ball", _label(0, "ball"))])
    samples.construct_shard(
        kit.construct(), index_part=index_part, masks_part=masks_part, labels_folder=folder, out=tmp_path / "out"
    )
    rejected = read_rows(tmp_path / "out" / "rejected-sa_0.parquet", "rejected")
    assert kit.reasons(rejected, "object") == [Reason.LOW_FILL]


def test_objects_beyond_the_most_are_surplus(kit, tmp_path: Path):
    line = _line("a ball, a star, a cup", _label(0, "ball"), _label(1, "star", 0.8), _label(2, "cup", 0.7))
    (sample,), rejected = _run(kit, tmp_path, [LEFT, RIGHT, MIDDLE], [line], max_objects=2)
    assert [o["label"] for o in sample["objects"]] == ["ball", "star"]
    assert kit.reasons(rejected) == [Reason.SURPLUS]


def test_a_third_object_takes_the_place_of_a_repeated_name(kit, tmp_path: Path):
    line = _line("two balls and a star", _label(0, "ball", 0.9), _label(1, "ball", 0.8), _label(2, "star", 0.7))
    (sample,), rejected = _run(kit, tmp_path, [LEFT, RIGHT, MIDDLE], [line], max_objects=2)
    assert [o["object_id"] for o in sample["objects"]] == ["0", "2"]
    assert kit.reasons(rejected) == [Reason.SAME_NAME]


def test_repeated_names_may_be_allowed(kit, tmp_path: Path):
    line = _line("two balls", _label(0, "ball"), _label(1, "ball"))
    (sample,), _ = _run(kit, tmp_path, [LEFT, RIGHT], [line], distinct_names=False)
    assert len(sample["objects"]) == 2


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([_line("a ball", _label(0, "ball"))], Reason.TOO_FEW_OBJECTS),
        ([_line("a sunny day", _label(0, "ball"), _label(1, "star"))], Reason.CAPTION_WITHOUT_OBJECTS),
        ([_line("  ", _label(0, "ball"), _label(1, "star"))], Reason.EMPTY_CAPTION),
        ([_line("a ball", image_id="other")], labels.Reason.NO_LABELS),
    ],
)
def test_an_image_is_rejected_with_its_reason_and_no_object_is_lost(kit, tmp_path: Path, lines, reason):
    rows, rejected = _run(kit, tmp_path, [LEFT, RIGHT], lines)
    assert rows == []
    assert kit.reasons(rejected, "image") == [reason]
    assert len(kit.reasons(rejected, "object")) == 2


def test_the_objects_of_a_rejected_image_say_so(kit, tmp_path: Path):
    _, rejected = _run(kit, tmp_path, [LEFT, RIGHT], [_line("a ball", _label(0, "ball"))])
    assert set(kit.reasons(rejected, "object")) == {Reason.IMAGE_REJECTED, labels.Reason.NO_LABEL}


@pytest.mark.parametrize(
    ("line", "unit", "reason"),
    [
        ("{no json", "line", labels.Reason.BAD_LINE),
        ("[]", "line", labels.Reason.BAD_LINE),
        ({"image_id": "b"}, "line", labels.Reason.BAD_LINE),
        ({"image_id": "b", "caption": 5}, "line", labels.Reason.BAD_LINE),
        ({"image_id": "b", "caption": "x" * 2000}, "line", labels.Reason.BAD_LINE),
        ({"image_id": "b", "caption": "x", "labels": {}}, "line", labels.Reason.BAD_LINE),
        (_line("again"), "line", labels.Reason.DUPLICATE_LINE),
    ],
)
def test_a_bad_line_is_rejected_and_the_rest_is_kept(kit, tmp_path: Path, line, unit: str, reason):
    good = _line("a ball and a star", _label(0, "ball"), _label(1, "star"))
    rows, rejected = _run(kit, tmp_path, [LEFT, RIGHT], [good, line])
    assert len(rows) == 1
    assert kit.reasons(rejected, unit) == [reason]


def test_a_null_caption_is_composed_of_the_chosen_objects_labels(kit, tmp_path: Path):
    line = _line("", _label(0, "ball", 0.5), _label(1, "star"), _label(2, "cup", 0.1)) | {"caption": None}
    (sample,), _ = _run(kit, tmp_path, [LEFT, RIGHT, MIDDLE], [line])
    assert sample["caption"] == "a star and a ball"


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("ball", labels.Reason.BAD_LABEL),
        (_label(1, ""), labels.Reason.BAD_LABEL),
        (_label(1, "ball", "high"), labels.Reason.BAD_LABEL),
        (_label(1, "ball", float("nan")), labels.Reason.BAD_LABEL),
        (_label(1, "ball", 10**400), labels.Reason.BAD_LABEL),
        (_label(0, "cup"), labels.Reason.DUPLICATE_LABEL),
        (_label(77, "cup"), labels.Reason.UNKNOWN_OBJECT),
    ],
)
def test_a_bad_label_is_rejected_and_the_rest_is_kept(kit, tmp_path: Path, label, reason):
    line = _line("a ball and a star", _label(0, "ball"), label, _label(1, "star"))
    rows, rejected = _run(kit, tmp_path, [LEFT, RIGHT], [line])
    assert len(rows) == 1
    assert kit.reasons(rejected, "label") == [reason]


def test_construct_twice_gives_the_same_bytes(kit, tmp_path: Path):
    line = _line("a ball and a star", _label(0, "ball"), _label(1, "star"), "bad")
    contents = []
    for _ in range(2):
        _run(kit, tmp_path, [LEFT, RIGHT], [line])
        contents.append([p.read_bytes() for p in sorted((tmp_path / "out").iterdir())])
    assert contents[0] == contents[1]


def test_images_that_extract_rejected_are_no_concern_of_construct(kit, tmp_path: Path):
    index_part, masks_part = kit.masks(tmp_path, kit.pair("a", image=b"x") | kit.pair("b"))
    line = _line("a ball and a star", _label(1, "ball"), _label(2, "star"), image_id="b")
    folder = kit.labels(tmp_path / "labels", [line])
    out = samples.construct_shard(
        kit.construct(), index_part=index_part, masks_part=masks_part, labels_folder=folder, out=tmp_path / "out"
    )
    assert [row["image_id"] for row in read_rows(out, "samples")] == ["b"]


def test_labels_have_to_be_somewhere(kit, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"construct\.labels\.path"):
        labels.labeller(kit.construct(), shard="sa_0", labels_folder=None)
    with pytest.raises(DataError, match=r"sa_0\.labels\.jsonl"):
        labels.labeller(kit.construct(), shard="sa_0", labels_folder=tmp_path)


def test_the_configured_folder_of_labels_wins(kit, tmp_path: Path):
    mine = kit.labels(tmp_path / "mine", [_line("mine")])
    config = kit.construct(labels={"kind": "given", "path": str(mine)})
    labeller = labels.labeller(config, shard="sa_0", labels_folder=tmp_path / "theirs")
    assert labeller.label([({"image_id": "a", "shard": "sa_0"}, [])])[0].caption == "mine"


# Labels by open_clip -----------------------------------------------------------------------------------------------


def _open_clip(folder: Path, **changes: Any) -> dict[str, Any]:
    model = {"name": f"local-dir:{folder}", "pretrained": None, "batch": 3, "device": "cpu"}
    section = {"kind": "open_clip", "vocabulary": ["ball", "star", "cat", "dog", "cup"], "template": "a photo of a {}"}
    return section | {"model": model, "min_margin": 0.0} | changes


def test_open_clip_names_objects_and_composes_the_caption(kit, tmp_path: Path, clip_folder: Path):
    rows, _ = _run(
        kit,
        tmp_path,
        [LEFT, RIGHT],
        None,
        labels=_open_clip(clip_folder),
        rules={"min_logit": 0.0},
        distinct_names=False,
    )
    things = rows[0]["objects"]
    assert all(o["label"] in {"ball", "star", "cat", "dog", "cup"} and o["margin"] >= 0 for o in things)
    assert all(0.2 <= o["logit"] <= 1 for o in things)
    assert rows[0]["caption"] == f"a {things[0]['label']} and a {things[1]['label']}"


def test_a_small_margin_is_rejected(kit, tmp_path: Path, clip_folder: Path):
    _, rejected = _run(kit, tmp_path, [LEFT, RIGHT], None, labels=_open_clip(clip_folder, min_margin=2.0))
    assert kit.reasons(rejected, "object") == [labels.Reason.LOW_MARGIN] * 2


def test_open_clip_takes_captions_from_a_file_where_there_is_one(kit, tmp_path: Path, clip_folder: Path):
    _, rejected = _run(
        kit,
        tmp_path,
        [LEFT, RIGHT],
        [{"image_id": "a", "caption": "nothing here"}],
        labels=_open_clip(clip_folder),
        rules={"min_logit": 0.0},
    )
    assert kit.reasons(rejected, "image") == [Reason.CAPTION_WITHOUT_OBJECTS]


def test_open_clip_is_not_asked_about_what_geometry_rules_out(kit, tmp_path: Path, clip_folder: Path):
    _, rejected = _run(kit, tmp_path, [(0, 0, 6, 6), (0, 0, 64, 62)], None, labels=_open_clip(clip_folder))
    assert kit.reasons(rejected, "object") == [Reason.BOX_TOO_SMALL, Reason.BOX_TOO_LARGE]


def test_an_image_that_went_away_is_rejected_by_open_clip(kit, tmp_path: Path, clip_folder: Path):
    index_part, masks_part = kit.masks(tmp_path, kit.pair("a"))
    (tmp_path / "sa_0.tar").write_bytes(b"")
    config = kit.construct(labels=_open_clip(clip_folder))
    samples.construct_shard(
        config, index_part=index_part, masks_part=masks_part, labels_folder=None, out=tmp_path / "out"
    )
    rejected = read_rows(tmp_path / "out" / "rejected-sa_0.parquet", "rejected")
    assert kit.reasons(rejected, "image") == [labels.Reason.UNREADABLE]


def test_a_vocabulary_of_one_name_is_an_error(kit, tmp_path: Path, clip_folder: Path):
    with pytest.raises(ConfigError, match="two names"):
        _run(kit, tmp_path, [LEFT], None, labels=_open_clip(clip_folder, vocabulary=["ball"]))
