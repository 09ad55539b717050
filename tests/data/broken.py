"""Every way in which the formats of `worlds` are broken in tests: what is done, and where, why and what is said."""

import json
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mip.data.problems import Reason
from tests.data import worlds

Break = Callable[[Path], object]
Case = tuple[Break, str, Reason | str, str]  # damage; place, reason and part of what was given


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


OWN: dict[str, Case] = {
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
    "mask cut short": (
        lambda f: (f / "masks/a.png").write_bytes((f / "masks/a.png").read_bytes()[:70]),
        "row 1",
        Reason.BAD_MASK,
        "got masks/a.png",
    ),
    "label of half a character": (
        _own(lambda r: r[0].update(label="cat \ud83d")),
        "row 1",
        Reason.BAD_LABEL,
        "got label 'cat \\ud83d'",
    ),
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
COCO: dict[str, Case] = {
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
SUBJECT: dict[str, Case] = {
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
WORLDS: dict[str, tuple[Callable[[Path], Path], dict[str, Case]]] = {
    "own": (worlds.write_own, OWN),
    "coco": (worlds.write_coco, COCO),
    "subject10k": (lambda folder: worlds.write_files(folder, worlds.subject_files()), SUBJECT),
}
BROKEN = [(kind, case) for kind, (_, cases) in WORLDS.items() for case in cases]
