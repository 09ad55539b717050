"""Pictures of any format become SA-1B tars: what the sources of foreign formats share.

A reader yields a Picture for each image that can be used and a Problem for whatever cannot. `Converted` writes
pictures as tars and labels, and problems as rejected rows; `mip data validate` lists the problems of the same reader.
"""

import io
import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from mip.data.indexing import Indexed, Shard, index_tar, tar_shards
from mip.data.parts import TableWriter
from mip.data.problems import ADVICE, DATASET, Problem
from mip.errors import DataError
from mip.tables import atomic, read_rows, write_text

_REJECTED = "rejected.parquet"


@dataclass(frozen=True)
class Thing:
    """An object of a picture."""

    object_id: str
    segmentation: Any  # size and counts; `extract` checks counts that came from a file
    label: str | None  # None: a region without a name
    score: float  # confidence of the label
    where: str  # row or entry of the file that it comes from


@dataclass(frozen=True)
class Picture:
    """An image with its objects. `name` is a plain file name, and no other picture has it."""

    name: str
    image: bytes
    suffix: str  # .jpg, .jpeg or .png
    size: tuple[int, int]  # width, height of the upright image
    things: tuple[Thing, ...]
    caption: str | None  # None: composed of the chosen objects' labels
    where: str  # its file or entry


class Converted(ABC):
    """A source of another format. Subclasses read it; what they read is written when the source prepares."""

    def __init__(self, options: Any) -> None:
        self.options = options

    @abstractmethod
    def read(self) -> Iterator[Picture | Problem]:
        """What can be used, and what cannot."""

    def prepare(self, folder: Path) -> None:
        write(self.read(), folder, size=self.options.shard_size)

    def shards(self, folder: Path) -> list[Shard]:
        tars = tar_shards(folder / "shards")
        return [Shard(tars[0].name, (*tars[0].files, folder / _REJECTED)), *tars[1:]]

    def index(self, shard: Shard, *, source: str) -> Indexed:
        tar, *tables = shard.files
        indexed = index_tar(Shard(shard.name, (tar,)), source=source)
        before = [row for table in tables for row in read_rows(table, "rejected")]
        return Indexed(indexed.rows, [*before, *indexed.rejected])


def write(items: Iterable[Picture | Problem], folder: Path, *, size: int) -> None:
    """Write shards/<shard>.tar of `size` pictures, labels/<shard>.labels.jsonl and rejected.parquet.

    Of several problems of one thing the first is its reason. Raises DataError where nothing can be used.
    """
    with TableWriter(folder / _REJECTED, "rejected", made_from={"stage": "ingest"}) as dropped:
        pictures = _pictures(items, dropped)
        number, first = 0, next(pictures, None)
        if first is None:
            raise DataError("no image of the source can be used; `mip data validate` lists what is wrong")
        while first is not None:
            _write_shard(folder, f"{number:06d}", chain([first], pictures), size=size)
            number, first = number + 1, next(pictures, None)


def _pictures(items: Iterable[Picture | Problem], dropped: TableWriter) -> Iterator[Picture]:
    last = ("", "")
    for item in items:
        if isinstance(item, Picture):
            yield item
            continue
        if item.unit == DATASET:
            raise DataError(f"{item.where}: {item.reason}: {item.given}; {ADVICE[item.reason]}")
        if (item.unit, item.where) != last:
            dropped.add([item.row()])
        last = (item.unit, item.where)


def _write_shard(folder: Path, name: str, pictures: Iterable[Picture], *, size: int) -> None:
    lines = []
    with atomic(folder / "shards" / f"{name}.tar") as temporary, tarfile.open(temporary, "w") as tar:
        for picture in pictures:
            width, height = picture.size
            file = f"{picture.name}{picture.suffix}"
            header = {"image_id": picture.name, "width": width, "height": height, "file_name": file}
            masks = [{"id": thing.object_id, "segmentation": thing.segmentation} for thing in picture.things]
            _add(tar, file, picture.image)
            _add(tar, f"{picture.name}.json", json.dumps({"image": header, "annotations": masks}).encode())
            labels = [
                {"object_id": thing.object_id, "label": thing.label, "logit": thing.score}
                for thing in picture.things
                if thing.label is not None
            ]
            lines.append(json.dumps({"image_id": picture.name, "caption": picture.caption, "labels": labels}))
            if len(lines) == size:
                break
    write_text(folder / "labels" / f"{name}.labels.jsonl", "\n".join(lines) + "\n")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # owner and time stay zero: same data, same bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
