"""Which samples are taken: ranked by score, ties by id (or at random), and examined from the best down."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import pyarrow as pa

from mip.config import Manifest
from mip.data import parts
from mip.data.hashes import NearHashes, perceptual_hash
from mip.data.images import decode, read_bytes
from mip.errors import DataError
from mip.evaluation.benchmarks import load_reference
from mip.tables import Row, read_rows, read_table

_BATCH = 4096  # rows
_NAMES = "objects.list.element.label"
_WHERE = ("image_path", "image_offset", "image_size", "width", "height")


class Reason(StrEnum):
    """Why `manifest` rejects a sample."""

    BELOW_THRESHOLD = "below_threshold"
    BELOW_TOP_K = "below_top_k"
    CLASS_PAIR_FULL = "class_pair_full"
    UNREADABLE = "unreadable"
    BENCHMARK_LEAK = "benchmark_leak"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"


@dataclass(frozen=True)
class Ranked:
    """The columns that decide, of all scored samples, in their order. Columnar: the rows themselves stay on disk."""

    table: pa.Table

    def rows(self) -> Iterator[Row]:
        """All of them, in their order."""
        for batch in self.table.to_batches(max_chunksize=_BATCH):
            yield from batch.to_pylist()

    def row(self, number: int) -> Row:
        return self.table.slice(number, 1).to_pylist()[0]


@dataclass(frozen=True)
class Accepted:
    """What choosing adds to a sample."""

    rank: int  # 1 is the first
    score: float
    phash: str  # 16 hexadecimal digits
    split: str


def rank(config: Manifest, samples: Path, scores: Path, *, shards: Sequence[str]) -> Ranked:
    """All scored samples, by falling score, then by id; or in an order that only their ids and the seed decide."""
    tables = []
    for shard in shards:
        sample = parts.read_columns(parts.part_path(samples, shard), "samples", ["sample_id", *_WHERE, _NAMES])
        score = read_table(parts.part_path(scores, shard), "scores", ["sample_id", "score"])
        joined = _in_order_of(score, sample)
        tables.append(joined.append_column("score", score["score"]))
    table = pa.concat_tables(tables)
    if config.order == "random":
        places = [_uniform(config.seed, name) for name in table["sample_id"].to_pylist()]
        return Ranked(table.take(pa.array(sorted(range(len(places)), key=places.__getitem__), pa.int64())))
    return Ranked(table.sort_by([("score", "descending"), ("sample_id", "ascending")]))


def _in_order_of(scores: pa.Table, samples: pa.Table) -> pa.Table:
    """The samples that have a score, in the scores' order."""
    place = {name: number for number, name in enumerate(samples["sample_id"].to_pylist())}
    names = scores["sample_id"].to_pylist()
    if len(set(names)) < len(names) or not place.keys() >= set(names):
        raise DataError(
            "the scores do not belong to these samples: an id is unknown or repeated; run the stage score again"
        )
    return samples.take(pa.array([place[name] for name in names], pa.int64()))


def references(index: Path, *, distance: int) -> NearHashes:
    """The hashes of all reference images of the benchmark and of the validation tasks, whole."""
    tables = [index / "tasks.parquet", index / "validation_tasks.parquet"]
    tasks = [task for table in tables for task in read_rows(table, "tasks", ["references"])]
    known = NearHashes(distance)
    for path in sorted({path for task in tasks for reference in task["references"] for path in reference["images"]}):
        known.add(perceptual_hash(load_reference(Path(path), None)), path)
    return known


Verdict = Accepted | tuple[Reason, str]


def verdicts(config: Manifest, ranked: Ranked, leaks: NearHashes) -> Iterator[tuple[int, Row, Verdict]]:
    """(place, row, verdict) of every sample, in order. An image is read only where nothing else has ruled it out."""
    taken: Counter[str] = Counter()
    exact: dict[str, str] = {}
    near = NearHashes(config.duplicate_distance)
    count = 0
    for number, row in enumerate(ranked.rows()):
        names = "+".join(sorted(thing["label"].casefold() for thing in row["objects"]))
        verdict = _cheap(config, row, names=names, count=count, taken=taken)
        if verdict is not None:
            yield number, row, verdict
            continue
        try:
            data = read_bytes(Path(row["image_path"]), offset=row["image_offset"], size=row["image_size"])
            image = decode(data, max_pixels=row["width"] * row["height"])
        except DataError as error:
            yield number, row, (Reason.UNREADABLE, str(error)[:200])
            continue
        digest, phash = hashlib.sha256(data).hexdigest(), perceptual_hash(image)
        if (leak := leaks.find(phash)) is not None:
            yield number, row, (Reason.BENCHMARK_LEAK, f"{leak[0]}, {leak[1]} bits away")
        elif digest in exact:
            yield number, row, (Reason.DUPLICATE, exact[digest])
        elif (twin := near.find(phash)) is not None:
            yield number, row, (Reason.NEAR_DUPLICATE, f"{twin[0]}, {twin[1]} bits away")
        else:
            exact[digest] = row["sample_id"]
            near.add(phash, row["sample_id"])
            taken[names] += 1
            count += 1
            is_validation = _uniform(config.seed, digest) < config.validation_share
            yield number, row, Accepted(count, row["score"], f"{phash:016x}", "val" if is_validation else "train")


def _cheap(config: Manifest, row: Row, *, names: str, count: int, taken: Counter[str]) -> tuple[Reason, str] | None:
    """What rules a sample out without a look at its image."""
    if config.threshold is not None and row["score"] < config.threshold:
        return Reason.BELOW_THRESHOLD, f"{row['score']:.4f}"
    if config.top_k is not None and count >= config.top_k:
        return Reason.BELOW_TOP_K, f"{row['score']:.4f}"
    if config.max_per_class_pair is not None and taken[names] >= config.max_per_class_pair:
        return Reason.CLASS_PAIR_FULL, names
    return None


def _uniform(seed: int, key: str) -> float:
    """In [0, 1). From an image's digest the same image falls on the same side in any selection."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "big") / 2**64
