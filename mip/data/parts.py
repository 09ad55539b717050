"""A stage works shard by shard: each shard gives one part and one table of what was rejected from it.

`finish` makes one `rejected.parquet` of the shards' tables and checks the stage's conservation law over all of them.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from mip.errors import DataError
from mip.tables import SCHEMAS, VERSION, Row, atomic, check_kind, read_table

REJECTED = "rejected.parquet"
_GROUP = 4096  # rows


def shard_name(part: Path) -> str:
    """The shard of a file part-<shard>.parquet."""
    return part.stem.removeprefix("part-")


def part_path(folder: Path, shard: str) -> Path:
    """Where a shard's rows lie."""
    return folder / f"part-{shard}.parquet"


def parts(folder: Path) -> list[Path]:
    """A stage's parts in the order of their names. Raises DataError where there is none."""
    found = sorted(folder.glob("part-*.parquet"))
    if not found:
        raise DataError(f"there is no part-*.parquet in {folder}; run the stage that writes it")
    return found


class TableWriter:
    """`with TableWriter(...) as table:` a Parquet file that grows by groups of rows, whole or not at all."""

    def __init__(self, path: Path, kind: str, *, made_from: Mapping[str, str]) -> None:
        self.path, self.schema = path, described(kind, made_from)
        self._waiting: list[Row] = []
        self._files = ExitStack()

    def __enter__(self) -> Self:
        temporary = self._files.enter_context(atomic(self.path))
        self._writer = self._files.enter_context(pq.ParquetWriter(temporary, self.schema, compression="zstd"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._waiting:
            self._write(self._waiting)
        self._files.__exit__(kind, error, trace)

    def add(self, rows: Sequence[Row]) -> None:
        """Add rows of the table's kind."""
        self._waiting.extend(rows)
        while len(self._waiting) >= _GROUP:
            self._write(self._waiting[:_GROUP])
            del self._waiting[:_GROUP]

    def _write(self, rows: Sequence[Row]) -> None:
        self._writer.write_table(pa.Table.from_pylist(list(rows), schema=self.schema))


class PartWriter:
    """`with PartWriter(...) as part:` write a shard's rows and rejected rows as they come, whole or not at all.

    The part is renamed last: where it stands, both files are whole.
    """

    def __init__(self, out: Path, *, shard: str, kind: str, made_from: Mapping[str, str]) -> None:
        self._kept = TableWriter(part_path(out, shard), kind, made_from=made_from)
        self._rejected = TableWriter(out / f"rejected-{shard}.parquet", "rejected", made_from=made_from)
        self._units: Counter[str] = Counter()
        self._files = ExitStack()

    def __enter__(self) -> Self:
        self._files.enter_context(self._kept)
        self._files.enter_context(self._rejected)  # entered last, hence finished first
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, trace)

    def keep(self, rows: Sequence[Row]) -> None:
        """Add rows of the part's kind."""
        self._kept.add(rows)

    def reject(self, rows: Sequence[Row]) -> None:
        """Add rows of kind rejected."""
        self._rejected.add(rows)
        self._units.update(row["unit"] for row in rows)

    def check(self, unit: str, *, came: int, kept: int) -> None:
        """The conservation law of this shard. A violation is our own error."""
        lost = self._units[unit]
        assert came == kept + lost, f"{came} {unit}s came in, {kept} went out and {lost} were rejected"


def described(kind: str, made_from: Mapping[str, str]) -> pa.Schema:
    """The schema of a kind with the metadata that `mip.tables` checks."""
    return SCHEMAS[kind].with_metadata(
        {"mip.kind": kind, "mip.version": str(VERSION), "mip.made_from": json.dumps(dict(made_from), sort_keys=True)}
    )


def stream_rows(path: Path, kind: str) -> Iterator[Row]:
    """The rows of one file, in order, a group at a time."""
    check_kind(path, kind)
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_GROUP):
            yield from batch.to_pylist()


def finish(out: Path, *, shards: Sequence[str]) -> Path:
    """Join the shards' rejected tables, in this order, into out/rejected.parquet and delete them.

    Raises DataError for a shard without its table. Streams: one shard is in memory at a time.
    """
    tables = [out / f"rejected-{shard}.parquet" for shard in shards]
    missing = [table.name for table in tables if not table.exists()]
    if missing:
        raise DataError(f"{out} lacks {', '.join(missing[:3])} ({len(missing)} in all); run the stage again")
    schema = SCHEMAS["rejected"].with_metadata(
        {"mip.kind": "rejected", "mip.version": str(VERSION), "mip.made_from": "{}"}
    )
    with atomic(out / REJECTED) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for table in tables:
            check_kind(table, "rejected")
            writer.write_table(pq.read_table(table).replace_schema_metadata(schema.metadata))
    for table in tables:
        table.unlink()
    return out / REJECTED


def count_rows(path: Path) -> int:
    """Rows of a table, or of all parts in a folder, from their footers alone."""
    return sum(pq.read_metadata(part).num_rows for part in (parts(path) if path.is_dir() else [path]))


def count_rejected(path: Path) -> Counter[tuple[str, str]]:
    """How many rows of a rejected table have each (unit, reason). Streams."""
    check_kind(path, "rejected")
    counts: Counter[tuple[str, str]] = Counter()
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=["unit", "reason"]):
            grouped = pa.Table.from_batches([batch]).group_by(["unit", "reason"]).aggregate([([], "count_all")])
            for row in grouped.to_pylist():
                counts[row["unit"], row["reason"]] += row["count_all"]
    return counts


def check_stage(unit: str, *, came: int, kept: int, out: Path) -> None:
    """The stage's conservation law over all shards. A violation is our own error."""
    lost = sum(number for (counted, _), number in count_rejected(out / REJECTED).items() if counted == unit)
    assert came == kept + lost, f"{came} {unit}s came in, {kept} went out and {lost} were rejected"


def read_columns(path: Path, kind: str, columns: Sequence[str]) -> pa.Table:
    """Columns of one file; unlike `read_table` it takes fields of lists too: objects.list.element.label."""
    check_kind(path, kind)
    with pq.ParquetFile(path) as file:
        return file.read(columns=list(columns)).replace_schema_metadata()


def count_distinct(folder: Path, kind: str, column: str) -> int:
    """Distinct values of a column, summed over a stage's parts (no value spans two of them)."""
    return sum(len(read_table(part, kind, [column])[column].unique()) for part in parts(folder))
