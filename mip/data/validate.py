"""What `ingest` and `extract` would reject of a folder or file, found without writing anything beside it."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from mip.config import Extract
from mip.data import masks, problems
from mip.data.coco import read_coco
from mip.data.images import ImageError, decode, is_safe_name
from mip.data.indexing import Shard, index_tar, tar_shards
from mip.data.own import TABLES, read_own
from mip.data.parts import count_rows, part_path
from mip.data.pictures import Picture
from mip.data.problems import Problem
from mip.data.sources import Folder, FolderOptions
from mip.data.subject_dataset import read_subject_dataset
from mip.errors import DataError
from mip.tables import Row, read_rows, rejected, write_table

_EXTRACT = Extract(max_annotations=10_000, max_pixels=100_000_000, min_area=1)
_SHARD = 1000  # loose images that are looked at together

ADVICE: Mapping[str, str] = {  # of the reasons that ingest and extract have beside the readers' own
    **problems.ADVICE,
    "bad_annotation": "expected an object with an `id`; correct it",
    "bad_header": 'expected {"image": {"width", "height", ...}, ...} with positive integers; correct it',
    "bad_rle": "expected COCO run lengths of the image's size; encode the mask again",
    "bad_shard": "expected an uncompressed tar; unpack it, or download it again",
    "cut_off": "expected a file that is whole; download it again",
    "duplicate_id": "the first one is kept; delete or rename the others",
    "empty_file": "expected some bytes; download or write it again",
    "empty_shard": "expected a tar of images and JSON files; download it again",
    "missing_annotation": "expected NAME.json for every image; add it, or delete the image",
    "missing_image": "expected NAME.jpg or NAME.png for every JSON file; add it, or delete the JSON",
    "no_annotations": "expected at least one object; annotate the image, or leave it out",
    "no_objects": "expected at least one object that can be used; see its other problems",
    "not_a_file": "expected a plain file; copy what the link points to",
    "too_many_annotations": "such numbers are refused; leave some out",
    "too_small": "expected a larger mask; leave the object out",
    "truncated_shard": "expected a tar that is whole; download it again",
    "unknown_file": "expected .jpg, .png and .json only; convert it, or move it away",
    "unreadable": "expected a file that can be read; copy or write it again",
}


@dataclass
class Validation:
    """What was recognised. `rejected` may be gone through once; the counts are complete after that."""

    kind: str
    rejected: Iterator[Row] = field(init=False)
    images: int = 0  # that can be used
    objects: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def lines(self) -> Iterator[str]:
        """One line a problem: where, reason, what was given, what is expected and what to do."""
        for row in self.rejected:
            self.reasons[row["reason"]] += 1
            given = f"{row['detail']}; " if row["detail"] else ""
            line = f"{row['id']}: {row['reason']}: {given}{ADVICE[row['reason']]}"
            yield "".join(c if c.isprintable() else "?" for c in line)  # a name may hold what a terminal obeys


def validate(path: Path, *, images: Path | None, captions: Path | None, names: Path | None) -> Validation:
    """Recognise what lies at `path`. Raises DataError where nothing is recognised.

    `images` and `captions` are of COCO, `names` is of a subject dataset: see their sources.
    """
    kind = recognise(path)
    for option, given, of in (
        ("images", images, "coco"),
        ("captions", captions, "coco"),
        ("names", names, "subject10k"),
    ):
        if given is not None and kind != of:
            raise DataError(f"got --{option} for {path}, which is of format {kind}; leave it out: it is for {of}")
    found = Validation(kind)
    if kind == "own":
        found.rejected = _checked(read_own(path), found)
    elif kind == "subject10k":
        found.rejected = _checked(read_subject_dataset(path, names=names), found)
    elif kind == "coco":
        (file,) = [path] if path.is_file() else path.glob("*.json")
        read = read_coco(file, images=images or file.parent / "images", captions=captions)
        found.rejected = _checked(read, found)
    else:
        found.rejected = _sa1b(path, kind, found)
    return found


def recognise(path: Path) -> str:
    """The name of the source that reads what lies at `path`: own, coco, subject10k, sa1b or folder."""
    if not path.exists():
        raise DataError(f"there is no {path}; give a folder, a .tar, a .zip or a .json")
    if path.is_file():
        kind = {".tar": "sa1b", ".zip": "subject10k", ".json": "coco"}.get(path.suffix.lower())
        if kind is None or (kind == "sa1b" and not is_safe_name(path.stem)):
            raise DataError(
                f"got {path}; expected a folder, a plainly named .tar (SA-1B), a .zip (subject dataset), a .json (COCO)"
            )
        return kind
    has = {folder for folder in ("images", "masks", "jsons") if (path / folder).is_dir()}
    if any((path / table).exists() for table in TABLES):
        return "own"
    if "jsons" in has and ("masks" in has or any(path.glob("*.pkl"))):
        return "subject10k"
    if has == {"images", "masks"}:
        return "own"
    if any(path.glob("*.tar")):
        return "sa1b"
    if "images" in has and len(list(path.glob("*.json"))) == 1:
        return "coco"
    if any(path.rglob("*.json")):
        return "folder"
    raise DataError(
        f"got {path}, which is of no known format; expected {', '.join(TABLES)} (own data), "
        "jsons/ and masks/ (subject dataset), images/ and one .json (COCO), .tar shards or jpg/json pairs (SA-1B); "
        "see docs/own-data.md"
    )


def _checked(items: Iterator[Picture | Problem], found: Validation) -> Iterator[Row]:
    """Rejected rows of what a reader gives, and of what `extract` would reject of it."""
    for item in items:
        if isinstance(item, Problem):
            yield item.row()
            continue
        width, height = item.size
        row = {"image_id": item.name, "width": width, "height": height}
        try:
            decode(item.image, max_pixels=_EXTRACT.max_pixels, reduced=1, size=item.size)
        except ImageError as error:
            yield rejected("image", item.where, error.reason, error.detail)
            continue
        if not item.things:
            yield rejected("image", item.where, masks.Reason.NO_ANNOTATIONS, "got no object that can be used")
            continue
        dropped: list[Row] = []
        for thing in item.things:
            annotation = {"id": thing.object_id, "segmentation": thing.segmentation}
            _, lost = masks.read_masks([annotation], row=row, identity=item.name, min_area=_EXTRACT.min_area)
            dropped += [{**one, "id": thing.where} for one in lost]
        yield from dropped
        found.images += 1
        found.objects += len(item.things) - len(dropped)


def _sa1b(path: Path, kind: str, found: Validation) -> Iterator[Row]:
    """Rejected rows of the stages themselves, shard by shard."""
    loose = Folder(FolderOptions(folder=path, shard_size=_SHARD))
    shards = (
        loose.shards(path) if kind == "folder" else tar_shards(path) if path.is_dir() else [Shard(path.stem, (path,))]
    )
    for shard in shards:
        indexed = loose.index(shard, source=kind) if kind == "folder" else index_tar(shard, source=kind)
        yield from indexed.rejected
        with TemporaryDirectory() as scratch:
            out = Path(scratch)
            index = write_table(out / f"part-{shard.name}.parquet", "index", indexed.rows, {})
            part = masks.extract_shard(_EXTRACT, index_part=index, out=out / "masks")
            lost = read_rows(out / "masks" / f"rejected-{shard.name}.parquet", "rejected")
            assert part == part_path(out / "masks", shard.name)
            found.objects += count_rows(part)
        yield from lost
        found.images += len(indexed.rows) - sum(row["unit"] == "image" for row in lost)
