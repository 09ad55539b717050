"""The formats that a user may bring, read: the same two pictures come out of each, and nothing in a file is run."""

import json
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mip.data import checks, masks
from mip.data.coco import read_coco
from mip.data.own import read_own
from mip.data.pictures import Picture
from mip.data.problems import Problem, Reason, Refused
from mip.data.subject_dataset import read_names, read_subject_dataset
from tests.data import worlds
from tests.data.worlds import LABELS, SIZE

GOLDEN = Path(os.environ.get("MIP_GOLDEN") or Path(__file__).parents[3] / "shared" / "golden") / "subject_samples"


def _objects(items: Iterable[Picture | Problem]) -> dict[str, dict[str, str]]:
    """Picture -> label -> checked run lengths."""
    found: dict[str, dict[str, str]] = {}
    for number, item in enumerate(items):
        assert isinstance(item, Picture), item
        row = {"image_id": item.name, "width": item.size[0], "height": item.size[1]}
        listed = [{"id": thing.object_id, "segmentation": thing.segmentation} for thing in item.things]
        kept, lost = masks.read_masks(listed, row=row, identity="", min_area=1)
        assert lost == []
        found["ab"[number]] = {str(t.label): mask["rle"] for t, mask in zip(item.things, kept, strict=True)}
    return found


TRUE = {name: {label: worlds.rle(name, place) for place, label in enumerate(LABELS[name])} for name in "ab"}


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_own_data_gives_its_masks_whatever_the_table(tmp_path: Path, table: str):
    folder = worlds.write_own(tmp_path / "d", table=table)
    assert _objects(read_own(folder)) == TRUE
    a, b = read_own(folder)
    assert isinstance(a, Picture) and isinstance(b, Picture)
    assert (a.caption, b.name, a.size) == ("a ball and a cup", "b", SIZE)
    assert [(t.object_id, t.score) for t in (*a.things, *b.things)] == [("1", 0.9), ("2", 0.8), ("3", 1.0), ("4", 0.7)]


def test_rows_of_one_image_need_not_stand_together(tmp_path: Path):
    rows = worlds.own_rows()
    folder = worlds.write_own(tmp_path / "d", [rows[0], rows[2], rows[1], rows[3]])
    assert _objects(read_own(folder)) == TRUE


def test_an_own_mask_of_one_level_needs_no_value_and_a_palette_is_no_colour(tmp_path: Path):
    rows = worlds.own_rows()[:2]
    for number, row in enumerate(rows):
        row |= {"mask": f"{number}.png", "value": None}
        row.pop("box", None)
    folder = worlds.write_own(tmp_path / "d", rows)
    (folder / "masks" / "a.png").unlink()
    (folder / "images" / "b.png").unlink()
    for number in range(2):
        image = Image.fromarray(np.where(worlds.mask("a") == number + 1, 200, 0).astype(np.uint8))
        (image.convert("P") if number else image).save(folder / "masks" / f"{number}.png")
    assert _objects(read_own(folder)) == {"a": TRUE["a"]}


def test_a_photo_lying_on_its_side_has_the_size_of_the_upright_one(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    worlds.picture("a").save(tmp_path / "a.jpg", exif=exif)
    assert checks.image_size((tmp_path / "a.jpg").read_bytes(), name="a") == SIZE[::-1]


def test_coco_gives_its_masks_whatever_their_form(tmp_path: Path):
    folder = worlds.write_coco(tmp_path / "d")
    read = list(read_coco(folder / "instances.json", images=folder / "images", captions=None))
    assert _objects(read) == TRUE
    assert [item.caption for item in read if isinstance(item, Picture)] == [None, None]


def test_a_crowd_is_a_region_without_a_name(tmp_path: Path):
    folder = worlds.write_coco(tmp_path / "d", lambda content: content["annotations"][0].update(iscrowd=1))
    first = next(iter(read_coco(folder / "instances.json", images=folder / "images", captions=None)))
    assert isinstance(first, Picture) and [thing.label for thing in first.things] == [None, "cup"]


def test_a_subject_dataset_gives_the_mask_of_each_value(tmp_path: Path):
    folder = worlds.write_files(tmp_path / "d", worlds.subject_files())
    assert _objects(read_subject_dataset(folder, names=None)) == TRUE


def test_an_object_has_the_pixels_of_its_own_value_in_any_order(tmp_path: Path):
    files = worlds.subject_files()
    levels = np.choose(worlds.mask("a"), [0, 200, 3]).astype(np.uint8)  # the first object is not the lowest level
    files["masks/a.png"] = worlds.png(Image.fromarray(levels))
    content = worlds.subject_json("a")
    content["final_masks"][1]["value"], content["final_masks"][2]["value"] = 200, 3
    files["jsons/a.json"] = json.dumps(content).encode()
    assert _objects(read_subject_dataset(worlds.write_files(tmp_path / "d", files), names=None)) == TRUE


@pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"there are no golden samples in {GOLDEN}; set MIP_GOLDEN to their parent"
)
def test_the_golden_samples_are_read():
    items = list(read_subject_dataset(GOLDEN, names=None))
    problems = [(item.where, item.reason) for item in items if isinstance(item, Problem)]
    assert len(items) - len(problems) == 23
    assert problems == [
        ("jsons/s15_centre_crop.json: final_masks[3]", Reason.EMPTY_MASK),
        ("jsons/s15_centre_crop.json: final_masks[4]", Reason.EMPTY_MASK),
        ("jsons/s16_no_background.json: final_masks[1]", Reason.EMPTY_MASK),
        ("s17_no_final_masks", Reason.BAD_JSON),
        ("s19_missing_mask", Reason.MISSING_FILE),
        ("jsons/s22_thin_after_crop.json: final_masks[4]", Reason.EMPTY_MASK),
        ("jsons/s22_thin_after_crop.json: final_masks[5]", Reason.EMPTY_MASK),
    ]


# The list of names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("names", [[], ["a"], ["sa_1", "sä 2", "sa_1"], [f"sa_{n}" for n in range(2500)]])
def test_a_pickled_list_of_names_is_read_in_every_protocol(protocol: int, names: list[str]):
    assert read_names(pickle.dumps(names, protocol=protocol)) == names


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize("content", [_Evil(), ["a", _Evil()], {"a": 1}, "a", ("a",), [b"a"], [1], [["a"]], None, LOOP])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_anything_else_that_is_pickled_is_refused_and_not_run(
    protocol: int, content: Any, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(Refused, match=r"bad_names: got a pickle .*; expected one \*\.pkl with a pickled list of str"):
        read_names(pickle.dumps(content, protocol=protocol))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no pickle",
        pickle.dumps(["a", "b"])[:-3],
        b"\x80\x04]r\xff\xff\xff\x7f.",  # a memo of two thousand million places: an unpickler would make room for it
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a string longer than all memory
        b"\x80\x04]e.",
        b"\x80\x04a.",
        b"\x80\x04h\x07.",
        b"\x80\x04(.",
        b"\x80\x04](\x8c\x01a.",
    ],
)
def test_a_damaged_pickle_is_refused(data: bytes):
    try:
        assert read_names(data) == []
    except Refused as refused:
        assert refused.reason is Reason.BAD_NAMES
    else:
        assert b"r\xff" in data
