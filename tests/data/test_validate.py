"""`mip data validate` names every problem: where it is, what was given, what to do. Clean data has none."""

import json
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mip.data import images, indexing, masks, problems
from mip.data.coco import Coco, CocoOptions
from mip.data.own import Own, OwnOptions
from mip.data.problems import Reason
from mip.data.subject_dataset import SubjectDataset, SubjectDatasetOptions
from mip.data.validate import ADVICE, Validation, recognise, validate
from mip.errors import DataError
from mip.tables import read_rows, write_table
from tests.data import worlds

Break = Callable[[Path], object]


def _validate(path: Path, **options: Path | None) -> tuple[Validation, list[str]]:
    found = validate(path, **({"images": None, "captions": None, "names": None} | options))
    return found, list(found.lines())


def _own(change: Callable[[list[dict[str, Any]]], object]) -> Break:
    def broken(folder: Path) -> None:
        rows = worlds.own_rows()
        change(rows)
        worlds.write_rows(folder, rows)

    return broken


def _coco(change: Callable[[dict[str, Any]], object]) -> Break:
    def broken(folder: Path) -> None:
        content = worlds.coco()
        change(content)
        (folder / "instances.json").write_text(json.dumps(content))

    return broken


def _json(change: Callable[[dict[str, Any]], object]) -> Break:
    def broken(folder: Path) -> None:
        content = worlds.subject_json("a")
        change(content)
        (folder / "jsons" / "a.json").write_text(json.dumps(content))

    return broken


def _write(name: str, data: bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(data)


def _mask(name: str, levels: np.ndarray) -> Break:
    return lambda folder: worlds.save_mask(levels, folder / name)


def _jpeg(name: str) -> Break:
    return lambda folder: Image.fromarray(worlds.mask("a")).save(folder / name, format="JPEG")


def _link(name: str, target: str) -> Break:
    def broken(folder: Path) -> None:
        (folder / name).unlink()
        os.symlink(target, folder / name)

    return broken


def _huge_png(side: int) -> bytes:
    """The header of a PNG of side x side pixels: a few bytes."""
    data = bytearray(worlds.png(Image.new("L", (1, 1))))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


OWN: dict[str, tuple[Break, str, Reason | str, str]] = {
    "label empty": (_own(lambda r: r[1].update(label=" ")), "metadata.jsonl: row 2", Reason.BAD_LABEL, "got label ' '"),
    "label no text": (_own(lambda r: r[1].update(label=7)), "metadata.jsonl: row 2", Reason.BAD_LABEL, "got label 7"),
    "score in words": (_own(lambda r: r[0].update(score="high")), "row 1", Reason.BAD_SCORE, "got score 'high'"),
    "score above 1": (_own(lambda r: r[0].update(score=87)), "row 1", Reason.BAD_SCORE, "got score 87"),
    "score without end": (_own(lambda r: r[0].update(score=10**400)), "row 1", Reason.BAD_SCORE, "got score 1000"),
    "box turned round": (_own(lambda r: r[0].update(box=[9, 9, 1, 1])), "row 1", Reason.BAD_BOX, "[9, 9, 1, 1]"),
    "box of three": (_own(lambda r: r[0].update(box=[1, 2, 3])), "row 1", Reason.BAD_BOX, "[1, 2, 3]"),
    "value of background": (_own(lambda r: r[0].update(value=0)), "row 1", Reason.BAD_VALUE, "got value 0"),
    "value not in mask": (_own(lambda r: r[0].update(value=9)), "row 1", Reason.EMPTY_MASK, "holds 0, 1, 2"),
    "value of another": (_own(lambda r: r[0].update(value=2)), "row 1", Reason.MASK_OUTSIDE_BOX, "got value 2"),
    "no value": (_own(lambda r: r[1].pop("value")), "row 2", Reason.AMBIGUOUS_MASK, "masks/a.png holds 0, 1, 2"),
    "no mask": (_own(lambda r: r[2].pop("rle")), "row 3", Reason.NO_MASK, "got none of the three"),
    "two masks": (_own(lambda r: r[0].update(rle="x")), "row 1", Reason.NO_MASK, "got mask and rle"),
    "mask missing": (_own(lambda r: r[0].update(mask="c.png")), "row 1", Reason.MISSING_FILE, "masks/c.png"),
    "mask outside": (_own(lambda r: r[0].update(mask="../../x.png")), "row 1", Reason.OUTSIDE, "../../x.png"),
    "mask no name": (_own(lambda r: r[0].update(mask=[1])), "row 1", Reason.BAD_ENTRY, "got mask [1]"),
    "mask of colours": (_mask("masks/a.png", np.zeros((48, 64, 3), np.uint8)), "row 1", Reason.BAD_MASK, "mode RGB"),
    "mask a jpeg": (_jpeg("masks/a.png"), "row 1", Reason.BAD_MASK, "masks/a.png, which is no PNG"),
    "mask of another size": (_mask("masks/a.png", np.ones((9, 9), np.uint8)), "row 1", Reason.WRONG_SIZE, "9 x 9"),
    "mask a bomb": (_write("masks/a.png", _huge_png(60_000)), "row 1", Reason.TOO_LARGE, "masks/a.png"),
    "rle of another size": (_own(lambda r: r[2].update(rle="04")), "row 3", "bad_rle", "the runs cover 4 pixels"),
    "rle no text": (_own(lambda r: r[2].update(rle=5)), "row 3", "bad_rle", "got counts int"),
    "polygon of two": (_own(lambda r: r[3].update(polygon=[1, 2, 3, 4])), "row 4", Reason.BAD_POLYGON, "[1, 2, 3, 4]"),
    "polygon outside": (_own(lambda r: r[3].update(polygon=[0, 0, 900, 0, 9, 9])), "row 4", Reason.BAD_POLYGON, "900"),
    "polygon of folds": (
        _own(lambda r: r[3].update(polygon=[0, 0, 64, 48] * 200)),
        "row 4",
        Reason.BAD_POLYGON,
        "got an outline of 25600 pixels",
    ),
    "polygon of no area": (
        _own(lambda r: r[3].update(polygon=[5, 5, 5, 5, 5, 5])),
        "row 4",
        Reason.EMPTY_MASK,
        "covers no pixel",
    ),
    "two captions": (_own(lambda r: r[1].update(caption="x")), "images/a.png", Reason.BAD_CAPTION, "got different"),
    "caption no text": (
        _own(lambda r: [row.update(caption=[]) for row in r[:2]]),
        "images/a.png",
        Reason.BAD_CAPTION,
        "got caption []",
    ),
    "unknown column": (_own(lambda r: r[0].update(scroe=1)), "metadata.jsonl", Reason.UNKNOWN_COLUMN, "'scroe'"),
    "no label column": (
        _own(lambda r: [row.pop("label") for row in r]),
        "metadata.jsonl",
        Reason.BAD_METADATA,
        "no column 'label'",
    ),
    "row without image": (_own(lambda r: r[0].pop("image")), "metadata.jsonl: row 1", Reason.BAD_ENTRY, "image None"),
    "image missing": (
        _own(lambda r: [row.update(image="c.png") for row in r[2:]]),
        "images/c.png",
        Reason.MISSING_FILE,
        "images/c.png",
    ),
    "image unnamed": (_write("images/c.png", b"x"), "images/c.png", Reason.UNUSED_FILE, "no row names it"),
    "image no image": (_write("images/b.png", b"x"), "images/b.png", Reason.BROKEN_IMAGE, "no JPEG or PNG"),
    "image cut short": (
        lambda f: (f / "images/b.png").write_bytes((f / "images/b.png").read_bytes()[:150]),
        "images/b.png",
        "broken_image",
        "",
    ),
    "image a bomb": (_write("images/b.png", _huge_png(20_000)), "images/b.png", Reason.TOO_LARGE, "images/b.png"),
    "image a link": (_link("images/b.png", "/etc/hostname"), "images/b.png", Reason.OUTSIDE, "leads out of"),
    "image of a blank": (
        _own(lambda r: [row.update(image="my b.png") for row in r[2:]]),
        "images/my b.png",
        Reason.UNSAFE_NAME,
        "got 'my b.png'",
    ),
    "table not JSON": (_write("metadata.jsonl", b'{"image": '), "", Reason.BAD_METADATA, "cannot be read"),
    "table of lists": (_write("metadata.jsonl", b"[1]\n"), "", Reason.BAD_METADATA, "line 1 is no JSON object"),
    "table empty": (_write("metadata.jsonl", b""), "", Reason.BAD_METADATA, "without a row"),
    "two tables": (_write("metadata.csv", b"x"), "", Reason.BAD_METADATA, "metadata.csv and metadata.jsonl"),
    "no table": (lambda f: (f / "metadata.jsonl").unlink(), "", Reason.BAD_METADATA, "got none of them"),
}
COCO: dict[str, tuple[Break, str, Reason | str, str]] = {
    "not JSON": (_write("instances.json", b"{"), "instances.json", Reason.BAD_JSON, "JSONDecodeError"),
    "nested without end": (
        _write("instances.json", b"[" * 200_000),
        "instances.json",
        Reason.BAD_JSON,
        "RecursionError",
    ),
    "no categories": (_coco(lambda c: c.pop("categories")), "instances.json", Reason.BAD_JSON, "a list categories"),
    "unknown image": (
        _coco(lambda c: c["annotations"][0].update(image_id=99)),
        "annotations[0]",
        Reason.UNKNOWN_IMAGE,
        "got image_id 99",
    ),
    "unknown category": (
        _coco(lambda c: c["annotations"][1].update(category_id=[])),
        "annotations[1]",
        Reason.UNKNOWN_CATEGORY,
        "got category_id []",
    ),
    "annotation twice": (
        _coco(lambda c: c["annotations"][1].update(id=10)),
        "annotations[1]",
        Reason.DUPLICATE,
        "second annotation with id 10",
    ),
    "annotation no object": (_coco(lambda c: c["annotations"].append(3)), "annotations[4]", Reason.BAD_ENTRY, "got 3"),
    "no segmentation": (
        _coco(lambda c: c["annotations"][0].update(segmentation=[])),
        "annotations[0]",
        Reason.NO_MASK,
        "got no segmentation",
    ),
    "size of another image": (
        _coco(lambda c: c["annotations"][1]["segmentation"].update(size=[9, 9])),
        "annotations[1]",
        "wrong_size",
        "mask [9, 9], image [48, 64]",
    ),
    "counts of another size": (
        _coco(lambda c: c["annotations"][2]["segmentation"].update(counts=[5, 5])),
        "annotations[2]",
        "bad_rle",
        "got counts list",
    ),
    "image twice": (_coco(lambda c: c["images"][1].update(id=1)), "images[1]", Reason.DUPLICATE, "image with id 1"),
    "image without file_name": (
        _coco(lambda c: c["images"][1].pop("file_name")),
        "images[1]",
        Reason.BAD_ENTRY,
        "expected an object with id and file_name",
    ),
    "image missing": (
        _coco(lambda c: c["images"][1].update(file_name="c.png")),
        "images[1]",
        Reason.MISSING_FILE,
        "images/c.png",
    ),
    "image outside": (
        _coco(lambda c: c["images"][1].update(file_name="/etc/c.png")),
        "images[1]",
        Reason.OUTSIDE,
        "/etc/c.png",
    ),
    "no width": (_coco(lambda c: c["images"][1].pop("width")), "images[1]", Reason.BAD_SIZE, "(None, 48)"),
    "absurd width": (
        _coco(lambda c: c["images"][1].update(width=10**6, height=10**6)),
        "images[1]",
        Reason.TOO_LARGE,
        "1000000 x 1000000",
    ),
    "another width": (_coco(lambda c: c["images"][1].update(width=80)), "images[1] b.png", "wrong_size", "64 x 48"),
    "image without objects": (
        _coco(lambda c: c["annotations"].__delitem__(slice(2, 4))),
        "images[1] b.png",
        "no_annotations",
        "",
    ),
}
SUBJECT: dict[str, tuple[Break, str, Reason | str, str]] = {
    "no list": (lambda f: (f / "selected_indexes.pkl").unlink(), "", Reason.BAD_NAMES, "got no *.pkl"),
    "two lists": (_write("other.pkl", b"x"), "", Reason.BAD_NAMES, "other.pkl, selected_indexes.pkl"),
    "list that runs": (_write("selected_indexes.pkl", pickle.dumps([_Runs()])), "", Reason.BAD_NAMES, "a pickle with"),
    "list of numbers": (_write("selected_indexes.pkl", pickle.dumps([1])), "", Reason.BAD_NAMES, "a pickle with"),
    "list cut short": (_write("selected_indexes.pkl", pickle.dumps(["a"])[:-4]), "", Reason.BAD_NAMES, "damaged"),
    "name twice": (
        _write("selected_indexes.pkl", pickle.dumps(["a", "b", "a"])),
        "names[2]",
        Reason.DUPLICATE,
        "got 'a'",
    ),
    "name outside": (
        _write("selected_indexes.pkl", pickle.dumps(["a", "../b"])),
        "names[1]",
        Reason.UNSAFE_NAME,
        "got '../b'",
    ),
    "image missing": (lambda f: (f / "images/a.png").unlink(), "a", Reason.MISSING_FILE, "images/a.png"),
    "mask missing": (lambda f: (f / "masks/a.png").unlink(), "a", Reason.MISSING_FILE, "masks/a.png"),
    "JSON missing": (lambda f: (f / "jsons/a.json").unlink(), "a", Reason.MISSING_FILE, "jsons/a.json"),
    "not JSON": (_write("jsons/a.json", b"x"), "a", Reason.BAD_JSON, "JSONDecodeError"),
    "no final_masks": (_json(lambda c: c.pop("final_masks")), "a", Reason.BAD_JSON, "without a list final_masks"),
    "no text": (_json(lambda c: c.pop("text")), "a", Reason.BAD_CAPTION, "got caption None"),
    "entry no object": (_json(lambda c: c["final_masks"].append(1)), "final_masks[3]", Reason.BAD_ENTRY, "got 1"),
    "entry without a box": (_json(lambda c: c["final_masks"][1].pop("box")), "final_masks[1]", Reason.BAD_BOX, "None"),
    "entry without a logit": (
        _json(lambda c: c["final_masks"][1].update(logit=float("nan"))),
        "jsons/a.json: final_masks[1]",
        Reason.BAD_SCORE,
        "got score nan",
    ),
    "value not in mask": (
        _json(lambda c: c["final_masks"][1].update(value=7)),
        "final_masks[1]",
        Reason.EMPTY_MASK,
        "masks/a.png holds 0, 1, 2",
    ),
    "value twice": (
        _json(lambda c: c["final_masks"][2].update(value=1)),
        "final_masks[2]",
        Reason.DUPLICATE,
        "got value 1, which another object",
    ),
    "value of another": (
        _json(lambda c: [c["final_masks"][n].update(value=3 - n) for n in (1, 2)]),
        "final_masks[1]",
        Reason.MASK_OUTSIDE_BOX,
        "got value 2",
    ),
    "label on the background": (
        _json(lambda c: c["final_masks"][0].update(label="cat")),
        "final_masks[0]",
        Reason.BAD_VALUE,
        "got value 0",
    ),
    "mask of another size": (_mask("masks/a.png", np.ones((9, 9), np.uint8)), "a", Reason.WRONG_SIZE, "9 x 9"),
}
WORLDS: dict[str, tuple[Callable[[Path], Path], dict[str, tuple[Break, str, Reason | str, str]]]] = {
    "own": (worlds.write_own, OWN),
    "coco": (worlds.write_coco, COCO),
    "subject10k": (lambda folder: worlds.write_files(folder, worlds.subject_files()), SUBJECT),
}
BROKEN = [(kind, case) for kind, (_, cases) in WORLDS.items() for case in cases]


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
