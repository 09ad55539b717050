"""How many came in at each stage, how many stayed, and why the others did not."""

from collections import Counter
from pathlib import Path
from typing import Any

from mip.data import parts

_NAMES = "objects.list.element.label"


def funnel(*, index: Path, masks: Path, samples: Path, scores: Path, manifest: Path) -> dict[str, Any]:
    """Counts by stage, unit and reason. Checks every stage's conservation law, stage after stage."""
    counts = {
        folder: parts.count_rejected(folder / parts.REJECTED) for folder in (index, masks, samples, scores, manifest)
    }
    indexed, decoded = parts.count_rows(index), parts.count_distinct(masks, "masks", "image_id")
    objects, chosen = parts.count_rows(masks), parts.count_rows(samples)
    used = sum(_count_objects(part) for part in parts.parts(samples))
    scored = parts.count_rows(scores)
    splits = {split: parts.count_rows(manifest / f"{split}.parquet") for split in ("train", "val")}
    steps = [
        _step("ingest", "image", counts[index], came=None, kept=indexed),
        _step("extract", "image", counts[masks], came=indexed, kept=decoded),
        _step("extract", "object", counts[masks], came=None, kept=objects),
        _step("construct", "image", counts[samples], came=decoded, kept=chosen),
        _step("construct", "object", counts[samples], came=objects, kept=used),
        _step("score", "sample", counts[scores], came=chosen, kept=scored),
        _step("manifest", "sample", counts[manifest], came=scored, kept=sum(splits.values())),
    ]
    stages = {"ingest": index, "extract": masks, "construct": samples, "score": scores, "manifest": manifest}
    counted = {(step["stage"], step["unit"]) for step in steps}
    # What is counted in no unit that goes on: stray files, lines of a label file, tasks of the benchmark, whole shards.
    others = [
        {"stage": stage, "unit": unit, "rejected": _reasons(counts[folder], unit)}
        for stage, folder in stages.items()
        for unit in sorted({unit for unit, _ in counts[folder]})
        if (stage, unit) not in counted
    ]
    return {
        "schema_version": 1,
        "train": splits["train"],
        "validation": splits["val"],
        "stages": steps,
        "others": others,
    }


def _step(stage: str, unit: str, counts: Counter[tuple[str, str]], *, came: int | None, kept: int) -> dict[str, Any]:
    reasons = _reasons(counts, unit)
    lost = sum(reasons.values())
    came = kept + lost if came is None else came  # a stage that is first to see a unit
    assert came == kept + lost, f"{stage}: {came} {unit}s came in, {kept} went out and {lost} were rejected"
    return {"stage": stage, "unit": unit, "came": came, "kept": kept, "rejected": reasons}


def _reasons(counts: Counter[tuple[str, str]], unit: str) -> dict[str, int]:
    return {reason: number for (counted, reason), number in sorted(counts.items()) if counted == unit}


def _count_objects(samples_part: Path) -> int:
    return sum(map(len, parts.read_columns(samples_part, "samples", [_NAMES])["objects"].to_pylist()))
