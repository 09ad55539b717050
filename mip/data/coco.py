"""COCO instances as a source: one JSON of images, annotations and categories, beside a folder of images."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from pydantic import PositiveInt

from mip.config import Section
from mip.data import checks
from mip.data.files import FolderFiles
from mip.data.images import SUFFIXES, is_safe_name
from mip.data.pictures import Converted, Picture, Thing
from mip.data.problems import DATASET, Problem, Problems, Reason, Refused

_LARGEST = 1 << 32  # bytes of JSON; COCO's own are half a gigabyte
_MAX_SIDE = 1 << 20  # pixels


class CocoOptions(Section):
    """`ingest.options` of COCO."""

    annotations: Path  # instances_*.json
    images: Path  # folder that file_name is relative to
    captions: Path | None  # captions_*.json; null composes captions of labels
    shard_size: PositiveInt  # images


class Coco(Converted):
    """COCO instances."""

    Options: ClassVar[type[Section]] = CocoOptions

    def read(self) -> Iterator[Picture | Problem]:
        chosen = self.options
        return read_coco(chosen.annotations, images=chosen.images, captions=chosen.captions)


def read_coco(annotations: Path, *, images: Path, captions: Path | None) -> Iterator[Picture | Problem]:
    """Each image with its objects, in the file's order. The JSON is held in memory, images are not.

    Crowd regions are regions without a name. Of several captions the first is taken.
    """
    problems = Problems(DATASET, annotations.name)
    content = problems.take(_lists, annotations, "images", "annotations", "categories")
    texts = problems.take(_lists, captions, "annotations") if captions is not None else {"annotations": []}
    if content is None or texts is None:
        yield from problems.found
        return
    names = {
        entry.get("id"): entry.get("name")
        for entry in content["categories"]
        if isinstance(entry, dict) and isinstance(entry.get("id"), int | str)
    }
    said: dict[Any, Any] = {}
    for entry in texts["annotations"]:
        if isinstance(entry, dict) and isinstance(entry.get("image_id"), int | str):
            said.setdefault(entry["image_id"], entry.get("caption"))
    known = {
        entry["id"] for entry in content["images"] if isinstance(entry, dict) and isinstance(entry.get("id"), int | str)
    }
    by_image: dict[Any, list[tuple[str, dict[str, Any]]]] = {}
    seen: set[str] = set()
    for position, entry in enumerate(content["annotations"]):
        where = f"annotations[{position}]"
        of_entry = Problems("object", where)
        of_entry.take(_check_annotation, entry, known, seen)
        yield from of_entry.found
        if not of_entry.found:
            by_image.setdefault(entry["image_id"], []).append((where, entry))
    files, taken = FolderFiles(images), set()
    for position, entry in enumerate(content["images"]):
        yield from _picture(
            files, entry, by_image, where=f"images[{position}]", names=names, captions=said, taken=taken
        )


def _lists(file: Path, *wanted: str) -> dict[str, list[Any]]:
    if not file.is_file() or file.stat().st_size > _LARGEST:
        raise Refused(Reason.MISSING_FILE, f"there is no file {file} of at most {_LARGEST} bytes")
    content = checks.json_of(file.read_bytes())
    lacking = [key for key in wanted if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if lacking:
        raise Refused(Reason.BAD_JSON, f"got {file.name} without a list {' and '.join(lacking)}")
    return content


def _check_annotation(entry: Any, known: set[Any], seen: set[str]) -> None:
    if not isinstance(entry, dict) or isinstance(entry.get("id"), bool) or not isinstance(entry.get("id"), int | str):
        raise Refused(Reason.BAD_ENTRY, f"got {str(entry)[:80]}, expected an object with an id")
    image = entry.get("image_id")
    if not isinstance(image, int | str) or image not in known:
        raise Refused(Reason.UNKNOWN_IMAGE, f"got image_id {image!r:.80}")
    if str(entry["id"]) in seen:
        raise Refused(Reason.DUPLICATE, f"got a second annotation with id {entry['id']!r:.80}")
    seen.add(str(entry["id"]))


def _picture(
    files: FolderFiles,
    entry: Any,
    by_image: dict[Any, list[tuple[str, dict[str, Any]]]],
    *,
    where: str,
    names: dict[Any, Any],
    captions: dict[Any, Any],
    taken: set[str],
) -> Iterator[Picture | Problem]:
    problems = Problems("image", where)
    named = problems.take(_named, entry, taken)
    if named is None:
        yield from problems.found
        return
    name, file, suffix = named
    size = problems.take(_size, entry)
    data = problems.take(files.read, file)
    identity = entry["id"]
    caption = problems.take(checks.caption_of, captions[identity]) if identity in captions else None
    things = []
    for of_annotation, annotation in by_image.pop(identity, []):
        of_object = Problems("object", of_annotation)
        thing = _thing(of_object, annotation, size=size, names=names)
        things += [thing] if thing is not None else []
        yield from of_object.found
    yield from problems.found
    if not problems.found and data is not None and size is not None:
        yield Picture(name, data, suffix, size, tuple(things), caption, f"{where} {file}")


def _named(entry: Any, taken: set[str]) -> tuple[str, str, str]:
    """The picture's name (its id), file and suffix. Raises Refused."""
    identity, file = (entry.get("id"), entry.get("file_name")) if isinstance(entry, dict) else (None, None)
    if isinstance(identity, bool) or not isinstance(identity, int | str) or not isinstance(file, str):
        raise Refused(Reason.BAD_ENTRY, f"got {str(entry)[:80]}, expected an object with id and file_name")
    suffix = PurePosixPath(file).suffix.lower()
    if not is_safe_name(str(identity)) or suffix not in SUFFIXES:
        raise Refused(Reason.UNSAFE_NAME, f"got id {identity!r:.80} and file_name {file[:80]!r}")
    if str(identity) in taken:
        raise Refused(Reason.DUPLICATE, f"got a second image with id {identity!r}")
    taken.add(str(identity))
    return str(identity), file, suffix


def _size(entry: dict[str, Any]) -> tuple[int, int]:
    size = entry.get("width"), entry.get("height")
    if not all(type(side) is int and 0 < side <= _MAX_SIDE for side in size):
        raise Refused(Reason.BAD_SIZE, f"got width and height {size!r:.80}")
    if size[0] * size[1] > checks.MAX_PIXELS:  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]
        raise Refused(Reason.TOO_LARGE, f"got {size[0]} x {size[1]} pixels, at most {checks.MAX_PIXELS}")
    return size  # pyright: ignore[reportReturnType]


def _thing(
    problems: Problems, annotation: dict[str, Any], *, size: tuple[int, int] | None, names: dict[Any, Any]
) -> Thing | None:
    """The object of an annotation, None where something is wrong with it."""
    label = None if annotation.get("iscrowd") else problems.take(_label, annotation.get("category_id"), names)
    score = problems.take(checks.score_of, annotation["score"]) if "score" in annotation else 1.0
    segmentation = annotation.get("segmentation")
    if not isinstance(segmentation, dict | list) or not segmentation:
        problems.refuse(Reason.NO_MASK, "got no segmentation")
    elif isinstance(segmentation, list) and size is not None:
        segmentation = problems.take(checks.polygon_mask, segmentation, width=size[0], height=size[1])
    if problems.found or size is None or score is None:
        return None
    return Thing(str(annotation["id"]), segmentation, label, score, problems.where)


def _label(category: Any, names: dict[Any, Any]) -> str:
    if not isinstance(category, int | str) or category not in names:
        raise Refused(Reason.UNKNOWN_CATEGORY, f"got category_id {category!r:.80}")
    return checks.label_of(names[category])
