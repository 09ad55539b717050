"""What can be wrong with a user's data: a closed list of reasons, each with what is expected and what to do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ParamSpec, TypeVar

from mip.data.indexing import plain
from mip.errors import DataError
from mip.tables import Row, rejected

P = ParamSpec("P")
T = TypeVar("T")

DATASET = "dataset"  # unit of a problem without whose cure nothing can be read


class Reason(StrEnum):
    """Why a reader of own data, COCO or a subject dataset rejects something."""

    AMBIGUOUS_MASK = "ambiguous_mask"
    BAD_BOX = "bad_box"
    BAD_CAPTION = "bad_caption"
    BAD_ENTRY = "bad_entry"
    BAD_JSON = "bad_json"
    BAD_LABEL = "bad_label"
    BAD_MASK = "bad_mask"
    BAD_METADATA = "bad_metadata"
    BAD_NAMES = "bad_names"
    BAD_POLYGON = "bad_polygon"
    BAD_SCORE = "bad_score"
    BAD_SIZE = "bad_size"
    BAD_VALUE = "bad_value"
    BROKEN_FILE = "broken_file"
    BROKEN_IMAGE = "broken_image"
    DUPLICATE = "duplicate"
    EMPTY_MASK = "empty_mask"
    MASK_OUTSIDE_BOX = "mask_outside_box"
    MISSING_FILE = "missing_file"
    NO_MASK = "no_mask"
    OUTSIDE = "outside_folder"
    TOO_LARGE = "too_large"
    UNKNOWN_CATEGORY = "unknown_category"
    UNKNOWN_COLUMN = "unknown_column"
    UNKNOWN_IMAGE = "unknown_image"
    UNSAFE_NAME = "unsafe_name"
    UNUSED_FILE = "unused_file"
    WRONG_SIZE = "wrong_size"


ADVICE: Mapping[Reason, str] = {
    Reason.AMBIGUOUS_MASK: "expected one level besides 0; say which in `value`, or save the mask without soft edges",
    Reason.BAD_BOX: "expected four numbers x1, y1, x2, y2 in pixels, x1 < x2 and y1 < y2; correct it, or leave it out",
    Reason.BAD_CAPTION: "expected one text of 1 to 1000 characters an image; correct it",
    Reason.BAD_ENTRY: "expected an object with the keys of its format; correct or delete it",
    Reason.BAD_JSON: "expected JSON of the stated form; write the file again",
    Reason.BAD_LABEL: "expected a text of 1 to 1000 characters that names the object; correct it",
    Reason.BAD_MASK: "expected a PNG of one channel, gray or palette; save the mask so (a JPEG changes its values)",
    Reason.BAD_METADATA: "expected one metadata.parquet, .csv or .jsonl with `image` and `label`; write it so",
    Reason.BAD_NAMES: "expected one *.pkl with a pickled list of str and nothing else; write it again",
    Reason.BAD_POLYGON: "expected lists of x1, y1, x2, y2, x3, y3, ... inside the image; clip or draw it again",
    Reason.BAD_SCORE: "expected a number (own data and COCO: from 0 to 1); correct it, or leave it out",
    Reason.BAD_SIZE: "expected positive integers for width and height; correct them",
    Reason.BAD_VALUE: "expected the object's gray level, an integer from 1 on (0 is the background); correct it",
    Reason.BROKEN_FILE: "expected a file that can be read to its end; copy or write it again",
    Reason.BROKEN_IMAGE: "expected a .jpg or .png that can be decoded; save it again",
    Reason.DUPLICATE: "the first one is kept; delete or rename the others",
    Reason.EMPTY_MASK: "expected at least one pixel; correct `value` or the mask, or delete the object",
    Reason.MASK_OUTSIDE_BOX: "expected a mask that reaches into its box; correct `value` or the box",
    Reason.MISSING_FILE: "put the file there, or correct the name; names are relative and case counts",
    Reason.NO_MASK: "expected exactly one of a mask file, `rle` and `polygon`; add one, or keep one",
    Reason.OUTSIDE: "expected a file inside the folder; copy it there",
    Reason.TOO_LARGE: "such sizes are refused as decompression bombs; make it smaller",
    Reason.UNKNOWN_CATEGORY: "expected the id of an entry of `categories`; correct it, or add the category",
    Reason.UNKNOWN_COLUMN: "expected image, label, mask, value, rle, polygon, caption, box, score; rename or drop it",
    Reason.UNKNOWN_IMAGE: "expected the id of an entry of `images`; correct it, or add the image",
    Reason.UNSAFE_NAME: "expected letters, digits and '_.-' only, at most 128, no leading dot or dash; rename it",
    Reason.UNUSED_FILE: "expected a row that names the file; add one, or move the file away",
    Reason.WRONG_SIZE: "expected the image's own size; save both in one size",
}


class Refused(DataError):
    """Something in the data that cannot be used, with its reason and what was given."""

    def __init__(self, reason: Reason, given: str) -> None:
        super().__init__(f"{reason}: {given}; {ADVICE[reason]}")
        self.reason, self.given = reason, " ".join(given.split())[:300]


@dataclass(frozen=True)
class Problem:
    """What is wrong where."""

    unit: str  # dataset, image, object, file or column
    where: str  # file, row or entry
    reason: Reason
    given: str

    def row(self) -> Row:
        """As a rejected row."""
        return rejected(self.unit, plain(self.where)[:300], self.reason, plain(self.given))


@dataclass
class Problems:
    """All that is wrong with one thing: a check that fails does not keep the others from being made."""

    unit: str
    where: str
    found: list[Problem] = field(default_factory=list)

    def take(self, check: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What the check gives; None where it refuses, which is noted."""
        try:
            return check(*args, **kwargs)
        except Refused as refused:
            self.refuse(refused.reason, refused.given)
            return None

    def refuse(self, reason: Reason, given: str) -> None:
        """Note what is wrong."""
        self.found.append(Problem(self.unit, self.where, reason, given))
