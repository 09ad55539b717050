"""`mip data validate` names every problem: where it is, what was given, what to do. Clean data has none."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest

from mip.data import images, indexing, masks, problems
from mip.data.coco import Coco, CocoOptions
from mip.data.own import Own, OwnOptions
from mip.data.problems import Reason
from mip.data.subject_dataset import SubjectDataset, SubjectDatasetOptions
from mip.data.validate import ADVICE, Validation, recognise, validate
from mip.errors import DataError
from mip.tables import read_rows, write_table
from tests.data import worlds
from tests.data.broken import BROKEN, WORLDS


def _validate(path: Path, **options: Path | None) -> tuple[Validation, list[str]]:
    found = validate(path, **({"images": None, "captions": None, "names": None} | options))
    return found, list(found.lines())


def _source(kind: str, folder: Path) -> Any:
    if kind == "own":
        return Own(OwnOptions(folder=folder, shard_size=10))
    if kind == "coco":
        options = {"annotations": folder / "instances.json", "images": folder / "images", "captions": None}
        return Coco(CocoOptions(**options, shard_size=10))
    return SubjectDataset(SubjectDatasetOptions(path=folder, names=None, shard_size=10))


@pytest.mark.parametrize("kind", WORLDS)
def test_intact_data_has_no_problem(tmp_path: Path, kind: str):
    found, lines = _validate(WORLDS[kind][0](tmp_path / "d"))
    assert (found.kind, lines, found.images, found.objects) == (kind, [], 2, 4)


@pytest.mark.parametrize(("kind", "case"), BROKEN)
def test_a_problem_is_listed_with_its_place_what_was_given_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, case: str
):
    monkeypatch.chdir(tmp_path)
    make, cases = WORLDS[kind]
    damage, where, reason, given = cases[case]
    folder = make(tmp_path / "d")
    damage(folder)
    found, lines = _validate(folder)
    said = [line for line in lines if f": {reason}: " in line and given in line and ADVICE[reason] in line]
    assert said, lines
    assert any(line.startswith((where, f"{folder}: ")) or f"{where}: " in line for line in said), lines
    assert found.kind == kind
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("kind", "case"), BROKEN)
def test_what_is_listed_is_what_ingest_and_extract_reject(kit, tmp_path: Path, kind: str, case: str):
    make, cases = WORLDS[kind]
    folder = make(tmp_path / "d")
    cases[case][0](folder)
    found, lines = _validate(folder)
    source = _source(kind, folder)
    try:
        source.prepare(tmp_path / "made")
    except DataError as error:
        assert str(error) in lines or "no image of the source" in str(error)
        return
    (shard,) = source.shards(tmp_path / "made")
    indexed = source.index(shard, source=kind)
    index = tmp_path / "index"
    part = write_table(index / f"part-{shard.name}.parquet", "index", indexed.rows, {})
    config = kit.extract(max_annotations=100, max_pixels=100_000_000, min_area=1)
    kept = read_rows(masks.extract_shard(config, index_part=part, out=tmp_path / "masks"), "masks")
    lost = read_rows(tmp_path / "masks" / f"rejected-{shard.name}.parquet", "rejected")
    reasons = {str(row["reason"]) for row in [*indexed.rejected, *lost]}
    # Of several problems of one object the source keeps the first.
    assert reasons and reasons - {"no_objects"} <= set(found.reasons)
    assert len(kept) == found.objects
    assert {row["image_id"] for row in kept} <= {row["image_id"] for row in indexed.rows}


def test_all_problems_of_a_row_and_of_all_rows_are_listed_at_once(tmp_path: Path):
    rows = worlds.own_rows()
    rows[0].update(label="", score=-1, value=0, box="x", mask="none.png")
    rows[3].update(label=None, polygon="?")
    _, lines = _validate(worlds.write_own(tmp_path / "d", rows))
    reasons = sorted(line.split(": ")[2] for line in lines if ": row 1: " in line)
    assert reasons == ["bad_box", "bad_label", "bad_score", "bad_value", "missing_file"]
    assert sorted(line.split(": ")[2] for line in lines if ": row 4: " in line) == ["bad_label", "bad_polygon"]


def test_every_reason_has_advice():
    for reasons in (Reason, indexing.Reason, masks.Reason, images.ImageReason):
        assert {str(reason) for reason in reasons} <= set(ADVICE)
    assert set(Reason) == set(problems.ADVICE)


# SA-1B ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "where", "reason"),
    [
        ({"x.txt": b"x"}, "sa_0:x.txt", "unknown_file"),
        ({"b.jpg": b"x"}, "sa_0:b", "missing_annotation"),
        ({"b.json": b"{}"}, "sa_0:b", "missing_image"),
        ({"b.jpg": b"x", "b.json": b"{"}, "sa_0:b", "bad_json"),
        ({"b.jpg": b"x", "b.json": b'{"image": {"width": 8, "height": 8}}'}, "sa_0:b", "bad_json"),
        (
            {"b.jpg": b"x", "b.json": b'{"image": {"width": 8, "height": 8}, "annotations": [1]}'},
            "sa_0:b",
            "broken_image",
        ),
        (
            {"b.jpg": b"x", "b.json": b'{"image": {"width": 8, "height": 8}, "annotations": []}'},
            "sa_0:b",
            "no_annotations",
        ),
        ({"../b.jpg": b"x"}, "sa_0:../b.jpg", "unsafe_name"),
    ],
)
@pytest.mark.parametrize("place", ["tar", "folder of tars"])
def test_a_problem_of_a_tar_is_listed(kit, tmp_path: Path, place: str, files: dict, where: str, reason: str):
    path = kit.write_tar(tmp_path / "s" / "sa_0.tar", kit.pair("a") | files)
    found, lines = _validate(path if place == "tar" else path.parent)
    assert (found.kind, found.images, found.objects) == ("sa1b", 1, 2)
    assert len(lines) == 1 and lines[0].startswith(f"{where}: {reason}: ") and lines[0].endswith(ADVICE[reason])


def test_the_stages_own_checks_of_masks_are_listed(kit, tmp_path: Path):
    bad = [kit.annotation(1), kit.annotation(1), kit.annotation(3, segmentation=None), kit.annotation(None), 5]
    pair = kit.pair("a", annotation=kit.sa1b_json([*bad, kit.annotation(6, predicted_iou=10**400)]))
    found, lines = _validate(kit.write_tar(tmp_path / "sa_0.tar", pair))
    assert [line.split(": ")[1] for line in lines] == ["duplicate_id", "bad_rle", "bad_annotation", "bad_annotation"]
    assert found.objects == 2


def test_a_truncated_tar_is_listed(kit, tmp_path: Path):
    path = kit.write_tar(tmp_path / "sa_0.tar", kit.pair("a"))
    path.write_bytes(path.read_bytes()[:-9000])
    assert any(": truncated_shard: " in line for line in _validate(path)[1])


def test_a_name_that_is_no_text_is_listed_and_cannot_steer_a_terminal(kit, tmp_path: Path):
    pair = kit.pair("a", annotation=kit.sa1b_json([kit.annotation(1), kit.annotation("\ud800")]))
    path = kit.write_tar(tmp_path / "sa_0.tar", pair | {"x\udcff\x1b[2J.txt": b"x"})
    _, lines = _validate(path)
    assert [line.split(": ")[:2] for line in lines] == [
        ["sa_0:x??[2J.txt", "unknown_file"],
        ["sa_0:a:#1", "bad_annotation"],
    ]
    rejected = indexing.index_tar(indexing.Shard("sa_0", (path,)), source="sa1b").rejected
    assert len(read_rows(write_table(tmp_path / "r.parquet", "rejected", rejected, {}), "rejected")) == 1


def test_loose_pairs_are_looked_at_in_place(kit, tmp_path: Path):
    worlds.write_files(tmp_path / "d", kit.pair("a") | {"sub/b.jpg": b"x"})
    before = sorted(tmp_path.rglob("*"))
    found, lines = _validate(tmp_path / "d")
    assert (found.kind, found.images, len(lines)) == ("folder", 1, 1) and "missing_annotation" in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


# Zips ----------------------------------------------------------------------------------------------------------------


def _zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("within", ["", "subject_dataset_10k/"])
def test_a_zip_is_read_like_its_folder(tmp_path: Path, within: str):
    files = {f"{within}{name}": data for name, data in worlds.subject_files().items()}
    found, lines = _validate(_zip(tmp_path / "d.zip", files))
    assert (lines, found.images, found.objects) == ([], 2, 4)


def test_a_zip_cannot_reach_outside_its_folder(tmp_path: Path):
    path = _zip(tmp_path / "d.zip", worlds.subject_files() | {"../evil.png": b"x", "/abs.png": b"x"})
    _, lines = _validate(path)
    assert [line.split(": ")[:2] for line in lines] == [
        [name, "outside_folder"] for name in ("../evil.png", "/abs.png")
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["d.zip"]


def test_a_member_packed_absurdly_is_refused_unread(tmp_path: Path):
    path = _zip(tmp_path / "d.zip", worlds.subject_files() | {"images/a.png": bytes(10_000_000)})
    _, lines = _validate(path)
    assert [line.split(": ")[:2] for line in lines] == [["a", "too_large"]]


def test_a_damaged_member_and_a_repeated_one_are_listed(tmp_path: Path):
    path = _zip(tmp_path / "d.zip", worlds.subject_files())
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("images/a.png").header_offset + 60
    data = bytearray(path.read_bytes())
    data[place] ^= 255
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("jsons/b.json", b"{}")
    _, lines = _validate(path)
    assert [line.split(": ")[:2] for line in lines] == [["a", "broken_file"], ["b", "duplicate"]]


def test_what_is_no_zip_is_a_problem(tmp_path: Path):
    path = tmp_path / "d.zip"
    path.write_bytes(b"PK nothing")
    _, (line,) = _validate(path)
    assert ": broken_file: " in line and "no readable zip" in line


# Recognition ---------------------------------------------------------------------------------------------------------


def test_nothing_known_is_an_error_that_says_what_is_expected(tmp_path: Path):
    with pytest.raises(DataError, match=r"no known format; expected metadata\.parquet"):
        recognise(tmp_path)
    with pytest.raises(DataError, match="there is no"):
        recognise(tmp_path / "none")
    (tmp_path / "x.rar").write_bytes(b"x")
    with pytest.raises(DataError, match=r"got .*x\.rar; expected a folder"):
        recognise(tmp_path / "x.rar")


def test_an_option_of_another_format_is_an_error(tmp_path: Path):
    worlds.write_own(tmp_path / "d")
    with pytest.raises(DataError, match=r"got --images .* of format own; leave it out: it is for coco"):
        _validate(tmp_path / "d", images=tmp_path)


def test_a_coco_file_may_lie_apart_from_its_images_and_captions(tmp_path: Path):
    folder = worlds.write_coco(tmp_path / "d")
    (folder / "instances.json").rename(tmp_path / "i.json")
    captions = {"annotations": [{"image_id": 1, "caption": "a ball"}, {"image_id": 2, "caption": ""}]}
    (tmp_path / "c.json").write_text(json.dumps(captions))
    found, lines = _validate(tmp_path / "i.json", images=folder / "images", captions=tmp_path / "c.json")
    assert found.images == 1 and [line.split(": ")[:2] for line in lines] == [["images[1]", "bad_caption"]]


def test_names_may_lie_apart_from_a_subject_dataset(tmp_path: Path):
    folder = worlds.write_files(tmp_path / "d", worlds.subject_files())
    (tmp_path / "few.pkl").write_bytes(pickle.dumps(["b"], protocol=0))
    found, lines = _validate(folder, names=tmp_path / "few.pkl")
    assert (found.images, lines) == (1, [])
