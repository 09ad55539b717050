"""Where images come from: a registry of sources, and the two that read local files.

A source turns what a user has into shards, and each shard into index rows: which bytes of which file are an image and
its annotation. Annotations are SA-1B-shaped JSON; a source of another format writes such JSON when it prepares. New
sources register under the entry point group `mip.sources`.
"""

import shutil
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pydantic import PositiveInt, ValidationError

from mip.config import BenchmarkKind, Ingest, Section
from mip.data.images import is_safe_name
from mip.data.indexing import Indexed, Shard, index_loose, index_tar, tar_shards
from mip.errors import ConfigError, DataError
from mip.evaluation.kinds import Kind, read_benchmark
from mip.tables import Row, fingerprint, write_table

__all__ = ["Folder", "Indexed", "Sa1b", "Shard", "Source", "create", "index_tar", "ingest", "tar_shards"]

GROUP = "mip.sources"


class Source(Protocol):
    """Anything that yields images with masks.

    What a source brings beside them lies at fixed names under the folder of `prepare`, all optional:
    labels/<shard>.labels.jsonl, benchmark/, validation/, calibration/.
    """

    Options: ClassVar[type[Section]]

    def __init__(self, options: Any) -> None:
        """`options` is an instance of Options."""
        ...

    def prepare(self, folder: Path) -> None:
        """Write what has to be made into an empty folder. The folder is moved afterwards: keep no path into it."""
        ...

    def shards(self, folder: Path) -> list[Shard]:
        """All shards, in a stable order; `folder` holds what `prepare` wrote."""
        ...

    def index(self, shard: Shard, *, source: str) -> Indexed:
        """Find a shard's images. `source` is this source's name in the registry. Bad input is rejected, not raised."""
        ...


def create(name: str, options: Mapping[str, Any]) -> Source:
    """The source of this name with its options checked. Raises ConfigError."""
    known = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in known:
        raise ConfigError(
            f"got source {name!r}; expected one of {', '.join(sorted(known)) or 'none: install the package first'}"
        )
    kind: type[Source] = known[name].load()
    try:
        return kind(kind.Options.model_validate(dict(options)))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"ingest.options of source {name!r}: {problems}") from None


def ingest(config: Ingest, *, out: Path, work: Path) -> Path:
    """Prepare the source, index its shards and its benchmark. Returns `out`.

    Writes part-<shard>.parquet (kind index), tasks.parquet, validation_tasks.parquet, rejected.parquet and, if the
    source makes files, source/.
    """
    source = create(config.source, config.options)
    folder = _prepared(source, out=out, work=work)
    shards = source.shards(folder)
    if not shards:
        raise DataError(f"source {config.source!r} has no shards; check ingest.options: {dict(config.options)}")
    if len({shard.name for shard in shards}) < len(shards) or not all(is_safe_name(shard.name) for shard in shards):
        raise DataError(
            f"source {config.source!r} gives shards of one name or unsafe ones; each must be a file name of its own"
        )
    made_from = {"stage": "ingest", "params": fingerprint(config=config)}
    named = {"benchmark": config.benchmark_name, "variant": config.variant, "seed": str(config.seed)}
    dropped: list[Row] = []
    for shard in shards:
        indexed = source.index(shard, source=config.source)
        write_table(out / f"part-{shard.name}.parquet", "index", indexed.rows, made_from)
        dropped += indexed.rejected
    for name, (rows, lost) in _tasks(config, folder).items():
        write_table(out / f"{name}.parquet", "tasks", rows, {**made_from, **named})
        dropped += lost
    write_table(out / "rejected.parquet", "rejected", dropped, made_from)
    return out


def _prepared(source: Source, *, out: Path, work: Path) -> Path:
    """out/source, whole or not at all: a run that was killed leaves its files in `work`, and they are made anew."""
    made, final = work / "source", out / "source"
    for old in (made, out):
        if old.exists():
            shutil.rmtree(old)
    made.mkdir(parents=True)
    out.mkdir(parents=True)
    source.prepare(made)
    if any(made.iterdir()):
        shutil.move(made, final)
    else:
        made.rmdir()
    return final


def _tasks(config: Ingest, folder: Path) -> dict[str, tuple[list[Row], list[Row]]]:
    benchmark, kind = _place("benchmark", config.benchmark, config.benchmark_kind, brought=folder / "benchmark")
    validation, of_validation = _place(
        "validation", config.validation, config.validation_kind, brought=folder / "validation"
    )
    if not benchmark.exists():
        raise ConfigError(f"there is no benchmark folder {benchmark}; set ingest.benchmark to one, or to a file")
    tasks = {
        "tasks": read_benchmark(
            kind,
            benchmark,
            variant=config.variant,
            prompts_per_combination=config.prompts_per_combination,
            combinations=config.combinations,
            seed=config.seed,
        ),
        "validation_tasks": ([], []),
    }
    if validation.exists():
        tasks["validation_tasks"] = read_benchmark(
            of_validation,
            validation,
            # The variant is the benchmark's; validation tasks of another kind have none.
            variant=config.variant if of_validation is Kind.CONCEPT101 else "official",
            prompts_per_combination=config.validation_prompts_per_combination,
            combinations=config.validation_combinations,
            seed=config.seed,
        )
    return tasks


def _place(name: str, given: str | None, kind: BenchmarkKind, *, brought: Path) -> tuple[Path, Kind]:
    """Where a benchmark lies and what it is; what a source brings is laid out as Concept101, and need not be there."""
    found = Kind(kind)
    if given is None:
        if found is not Kind.CONCEPT101:
            raise ConfigError(f"got ingest.{name}_kind {kind!r} and no ingest.{name}; set it to the place of that kind")
        return brought, found
    path, expected = Path(given), "file" if found is Kind.OWN else "folder"
    if not path.exists():
        raise ConfigError(
            f"there is no {name} {expected} {path}; set ingest.{name} to a {expected} of the kind {kind}, or to null"
        )
    if path.is_dir() != (expected == "folder"):
        raise ConfigError(f"got ingest.{name} {path}; expected a {expected} for ingest.{name}_kind {kind}")
    return path, found


class Sa1bOptions(Section):
    """SA-1B as downloaded."""

    folder: Path  # with sa_*.tar


class Sa1b:
    """Tar shards, read in place."""

    Options: ClassVar[type[Section]] = Sa1bOptions

    def __init__(self, options: Sa1bOptions) -> None:
        self.options = options

    def prepare(self, folder: Path) -> None:
        """Nothing to make."""

    def shards(self, folder: Path) -> list[Shard]:
        return tar_shards(self.options.folder)

    def index(self, shard: Shard, *, source: str) -> Indexed:
        return index_tar(shard, source=source)


class FolderOptions(Section):
    """Loose image and JSON files, side by side or in different subfolders."""

    folder: Path
    shard_size: PositiveInt  # images


class Folder:
    """Loose jpg/json pairs; files of one stem always come into one shard."""

    Options: ClassVar[type[Section]] = FolderOptions

    def __init__(self, options: FolderOptions) -> None:
        self.options = options

    def prepare(self, folder: Path) -> None:
        """Nothing to make."""

    def shards(self, folder: Path) -> list[Shard]:
        root = self.options.folder
        if not root.is_dir():
            raise DataError(f"there is no folder {root}; check ingest.options")
        by_stem: dict[str, list[Path]] = {}
        for file in sorted(root.rglob("*")):
            if not file.is_dir():
                by_stem.setdefault(file.stem, []).append(file)
        groups = [by_stem[stem] for stem in sorted(by_stem)]
        step = self.options.shard_size
        return [
            Shard(f"{start // step:05d}", tuple(file for group in groups[start : start + step] for file in group))
            for start in range(0, len(groups), step)
        ]

    def index(self, shard: Shard, *, source: str) -> Indexed:
        return index_loose(shard, root=self.options.folder, source=source)
