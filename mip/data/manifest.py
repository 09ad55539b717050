"""manifest: the files that training reads, with the record of what was chosen and why.

The rows keep the samples' own order, so that writing streams: a sample's rank is a column.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mip.config import Manifest
from mip.data import parts
from mip.data.funnel import funnel
from mip.data.selection import Accepted, Ranked, Reason, rank, references, verdicts
from mip.data.sheets import Tile, write_sheet
from mip.tables import Row, check_kind, file_hash, fingerprint, rejected, write_json

_WEIGHT = 1.0  # every sample is drawn alike: no other weighting has been shown to help


def build(config: Manifest, *, index: Path, masks: Path, samples: Path, scores: Path, out: Path) -> Path:
    """Choose samples; write train.parquet, val.parquet, rejected.parquet, funnel.json and two contact sheets to `out`.

    `index`, `masks`, `samples` and `scores` are the folders of the stages before. Returns `out`.
    """
    shards = [parts.shard_name(part) for part in parts.parts(scores)]
    made_from = {
        "stage": "manifest",
        "params": fingerprint(config=config),
        "samples": fingerprint(parts=[file_hash(parts.part_path(samples, shard)) for shard in shards]),
        "scores": fingerprint(parts=[file_hash(parts.part_path(scores, shard)) for shard in shards]),
        "benchmark": file_hash(index / "tasks.parquet"),
    }
    ranked = rank(config, samples, scores, shards=shards)
    reasons: dict[Reason, list[int]] = defaultdict(list)
    accepted: dict[str, Accepted] = {}
    with parts.TableWriter(out / parts.REJECTED, "rejected", made_from=made_from) as dropped:
        for number, row, verdict in verdicts(config, ranked, references(index, distance=config.leak_distance)):
            if isinstance(verdict, Accepted):
                accepted[row["sample_id"]] = verdict
            else:
                reasons[verdict[0]].append(number)
                dropped.add([rejected("sample", row["sample_id"], *verdict)])
    _write_splits(accepted, shards, samples=samples, scores=scores, out=out, made_from=made_from)
    write_json(out / "funnel.json", funnel(index=index, masks=masks, samples=samples, scores=scores, manifest=out))
    _write_sheets(config, ranked, accepted, reasons, samples=samples, out=out)
    return out


def _write_splits(
    accepted: dict[str, Accepted],
    shards: Sequence[str],
    *,
    samples: Path,
    scores: Path,
    out: Path,
    made_from: dict[str, str],
) -> None:
    with (
        parts.TableWriter(out / "train.parquet", "manifest", made_from=made_from) as train,
        parts.TableWriter(out / "val.parquet", "manifest", made_from=made_from) as validation,
    ):
        splits = {"train": train, "val": validation}
        for shard in shards:
            sample_part, score_part = parts.part_path(samples, shard), parts.part_path(scores, shard)
            models = _models(sample_part, score_part)
            terms = {row["sample_id"]: row for row in parts.stream_rows(score_part, "scores")}
            for row in parts.stream_rows(sample_part, "samples"):
                if (chosen := accepted.get(row["sample_id"])) is not None:
                    added = {"rank": chosen.rank, "phash": chosen.phash, "weight": _WEIGHT, "models": models}
                    splits[chosen.split].add([{**row, **terms[row["sample_id"]], **added}])


def _models(sample_part: Path, score_part: Path) -> str:
    """Lineage: what named the objects and what scored them."""
    labels, score = check_kind(sample_part, "samples"), check_kind(score_part, "scores")
    return json.dumps({"labels": labels.get("labels"), "score": score.get("model")}, sort_keys=True)


def _write_sheets(
    config: Manifest,
    ranked: Ranked,
    accepted: dict[str, Accepted],
    reasons: dict[Reason, list[int]],
    *,
    samples: Path,
    out: Path,
) -> None:
    """accepted.png: the first ones. rejected.png: of every reason alike, spread over its ranks."""
    best = [name for name, _ in zip(accepted, range(config.sheet), strict=False)]  # accepted is in the order of rank
    share = max(1, config.sheet // max(1, len(reasons)))
    chosen = [
        (reason, ranked.row(int(number)))
        for reason, numbers in sorted(reasons.items())
        for number in _spread(numbers, share)
    ]
    wanted = {*best, *(row["sample_id"] for _, row in chosen)}
    rows = {
        row["sample_id"]: row
        for part in parts.parts(samples)
        for row in parts.stream_rows(part, "samples")
        if row["sample_id"] in wanted
    }
    write_sheet(
        out / "accepted.png",
        [_tile(rows[name], f"{accepted[name].rank}. {accepted[name].score:.3f}") for name in best],
        title=f"The first {len(best)} of {len(accepted)} accepted samples: rank, score, objects, caption",
    )
    write_sheet(
        out / "rejected.png",
        [_tile(rows[row["sample_id"]], f"{reason} {row['score']:.3f}") for reason, row in chosen],
        title=f"{len(chosen)} of {sum(map(len, reasons.values()))} rejected samples: reason, score, objects, caption",
    )


def _tile(row: Row, words: str) -> Tile:
    return Tile(row, (words, ", ".join(thing["label"] for thing in row["objects"]), row["caption"]))


def _spread(numbers: Sequence[int], count: int) -> NDArray[np.int64]:
    """`count` of the numbers, or all, evenly from the first to the last."""
    places = np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(np.int64)
    return np.asarray(numbers, np.int64)[places]
