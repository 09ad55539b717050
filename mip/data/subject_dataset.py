"""The released subject_dataset_10k as a source: images, jsons and masks by name, and a pickled list of the names.

The pickle is read opcode by opcode: nothing in it is ever imported or called.
"""

import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from mip.config import Section
from mip.data import checks
from mip.data.files import Files, FolderFiles, ZipFiles
from mip.data.images import is_safe_name
from mip.data.pictures import Converted, Picture, Thing
from mip.data.problems import DATASET, Problem, Problems, Reason, Refused

BACKGROUND = {"value": 0, "label": "background"}

_LARGEST = 1 << 24  # bytes of the list: a million names
_MARK = object()  # a pickle's own mark, on its stack


class SubjectDatasetOptions(Section):
    """`ingest.options` of a subject dataset."""

    path: Path  # folder or zip
    names: Path | None  # pickled list of names; null takes the only *.pkl beside the three folders
    shard_size: PositiveInt  # images


class SubjectDataset(Converted):
    """The released layout."""

    Options: ClassVar[type[Section]] = SubjectDatasetOptions

    def read(self) -> Iterator[Picture | Problem]:
        return read_subject_dataset(self.options.path, names=self.options.names)


def read_subject_dataset(path: Path, *, names: Path | None) -> Iterator[Picture | Problem]:
    """Each listed sample in the list's order. Without a readable list, which is a problem, all that have a JSON."""
    problems = Problems(DATASET, str(path))
    files = problems.take(_files, path)
    if files is None:
        yield from problems.found
        return
    listed = problems.take(_listed, files, names)
    yield from problems.found
    if isinstance(files, ZipFiles):
        yield from (Problem("file", name[:300], Reason.OUTSIDE, "a member of the zip") for name in files.unsafe)
    if listed is None:
        found = (name for name in files.names() if name.startswith("jsons/") and name.endswith(".json"))
        listed = [name.removeprefix("jsons/").removesuffix(".json") for name in found]
    seen: set[str] = set()
    for position, name in enumerate(listed):
        if name in seen or not is_safe_name(name):
            reason = Reason.DUPLICATE if name in seen else Reason.UNSAFE_NAME
            yield Problem("image", f"names[{position}]", reason, f"got {name!r:.200}")
            continue
        seen.add(name)
        yield from _sample(files, name)


def _files(path: Path) -> Files:
    if not path.exists():
        raise Refused(Reason.MISSING_FILE, f"there is no folder or zip {path}")
    return FolderFiles(path) if path.is_dir() else ZipFiles(path)


def _listed(files: Files, names: Path | None) -> list[str]:
    if names is not None:
        return read_names(FolderFiles(names.parent).read(names.name))
    found = [name for name in files.names() if name.endswith(".pkl") and "/" not in name]
    if len(found) != 1:
        raise Refused(Reason.BAD_NAMES, f"got {', '.join(found) or 'no *.pkl'}")
    return read_names(files.read(found[0]))


def _sample(files: Files, name: str) -> Iterator[Picture | Problem]:
    problems = Problems("image", name)
    image = problems.take(files.read, f"images/{name}.png")
    size = problems.take(checks.image_size, image, name=f"images/{name}.png") if image is not None else None
    mask = problems.take(files.read, f"masks/{name}.png")
    levels = problems.take(checks.mask_levels, mask, size=size, name=f"masks/{name}.png") if mask is not None else None
    content = problems.take(_content, files, name)
    caption = problems.take(checks.caption_of, content.get("text")) if content is not None else None
    things, seen = [], set()
    for position, entry in enumerate(content["final_masks"] if content is not None else []):
        if entry == BACKGROUND:
            continue
        of_object = Problems("object", f"jsons/{name}.json: final_masks[{position}]")
        thing = _thing(of_object, entry, levels=levels, seen=seen, name=f"masks/{name}.png")
        things += [thing] if thing is not None else []
        yield from of_object.found
    yield from problems.found
    if not problems.found and image is not None and size is not None:
        yield Picture(name, image, ".png", size, tuple(things), caption, f"images/{name}.png")


def _content(files: Files, name: str) -> dict[str, Any]:
    content = checks.json_of(files.read(f"jsons/{name}.json"))
    if not isinstance(content, dict) or not isinstance(content.get("final_masks"), list):
        raise Refused(Reason.BAD_JSON, f"got jsons/{name}.json without a list final_masks")
    return content


def _thing(
    problems: Problems, entry: Any, *, levels: NDArray[np.integer] | None, seen: set[int], name: str
) -> Thing | None:
    """The object of an entry, None where something is wrong with it. Its mask is the pixels of its own value."""
    if not isinstance(entry, dict):
        problems.refuse(Reason.BAD_ENTRY, f"got {entry!r:.80}")
        return None
    value = problems.take(_value, entry.get("value"), seen)
    label = problems.take(checks.label_of, entry.get("label"))
    score = problems.take(checks.score_of, entry.get("logit"), unit=False)
    box = problems.take(checks.box_of, entry.get("box"))
    segmentation = None
    if levels is not None and value is not None:
        segmentation = problems.take(checks.level_mask, levels, value=value, box=box, name=name)
    if problems.found or segmentation is None or score is None:
        return None
    return Thing(str(value), segmentation, label, score, problems.where)


def _value(value: Any, seen: set[int]) -> int:
    level = checks.value_of(value)
    if level in seen:
        raise Refused(Reason.DUPLICATE, f"got value {level}, which another object of the image has")
    seen.add(level)
    return level


def read_names(data: bytes) -> list[str]:
    """A pickled list of str. Raises Refused for anything else, before any of it is run."""
    if len(data) > _LARGEST:
        raise Refused(Reason.BAD_NAMES, f"got a pickle of {len(data)} bytes, at most {_LARGEST}")
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                break
            _step(opcode.name, argument, stack, memo)
    except Refused:
        raise
    except Exception as error:  # of a damaged or hostile stream: a wrong length, an empty stack, an unknown key
        raise Refused(Reason.BAD_NAMES, f"got a pickle that is damaged: {type(error).__name__}") from None
    if len(stack) != 1 or not isinstance(stack[0], list) or not all(isinstance(name, str) for name in stack[0]):
        raise Refused(Reason.BAD_NAMES, "got a pickle of something else")
    return stack[0]


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """One opcode of those that a list of str is made of."""
    match name:
        case "PROTO" | "FRAME":
            pass
        case "MARK":
            stack.append(_MARK)
        case "EMPTY_LIST":
            stack.append([])
        case "UNICODE" | "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8":
            stack.append(argument)
        case "LIST" | "APPENDS":
            place = next(place for place in reversed(range(len(stack))) if stack[place] is _MARK)
            items = stack[place + 1 :]
            del stack[place:]
            (stack.append(items) if name == "LIST" else stack[-1].extend(items))
        case "APPEND":
            item = stack.pop()
            stack[-1].append(item)
        case "PUT" | "BINPUT" | "LONG_BINPUT":
            memo[argument] = stack[-1]
        case "MEMOIZE":
            memo[len(memo)] = stack[-1]
        case "GET" | "BINGET" | "LONG_BINGET":
            stack.append(memo[argument])
        case _:
            raise Refused(Reason.BAD_NAMES, f"got a pickle with {name}, which a list of str does not need")
