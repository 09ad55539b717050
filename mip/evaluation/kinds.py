"""The benchmarks by name: one way to read any of them into a table of tasks, and to look for all that is wrong."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from mip.errors import ConfigError, DataError
from mip.evaluation.benchmarks import Reason, Variant, read_concept101
from mip.evaluation.concept101_check import survey_concept101
from mip.evaluation.dreambooth import survey_dreambooth, survey_pairs
from mip.evaluation.own_benchmark import survey_own
from mip.evaluation.survey import Fault, Survey
from mip.tables import Row


class Kind(StrEnum):
    """Which benchmark lies somewhere."""

    CONCEPT101 = "concept101"
    DREAMBOOTH = "dreambooth"
    DREAMBOOTH_PAIRS = "dreambooth-pairs"
    OWN = "own"


@dataclass(frozen=True)
class Benchmark:
    """How a kind is surveyed, and where its authors publish it."""

    survey: Callable[..., Survey]
    published: str


BENCHMARKS: Mapping[Kind, Benchmark] = {
    Kind.CONCEPT101: Benchmark(
        survey_concept101,
        "CustomConcept101 by the authors of Custom Diffusion: dataset_multiconcept.json and prompts/ lie in their "
        "project, the photos of benchmark_dataset/ are a separate download there; json_data/ with the boxes lies in "
        "the repository hqhQAQ/MIP-Adapter",
    ),
    Kind.DREAMBOOTH: Benchmark(
        survey_dreambooth,
        "the repository google/dreambooth: its folder dataset/ with prompts_and_classes.txt and 30 folders of photos",
    ),
    Kind.DREAMBOOTH_PAIRS: Benchmark(
        survey_pairs,
        "dreambench_multiip.json by the authors of UNO (30 pairs, 750 tasks); the photos and prompts_and_classes.txt "
        "by the repository google/dreambooth",
    ),
    Kind.OWN: Benchmark(survey_own, "a file of your own; docs/benchmarks.md tells what it holds"),
}
ADVICE: Mapping[str, str] = {
    Reason.NO_IMAGES: "its tasks are left out; put the photos there",
    Reason.REPEATED_PROMPT: "the corrected variant takes it once",
    Reason.NOT_AN_IMAGE: "it is ignored; move it away, or name it .jpg or .png if it is one",
    Reason.BROKEN_IMAGE: "it is ignored; copy or download it again",
    Reason.BAD_BOX: "expected x1, y1, x2, y2 inside the photo of shorter side 800; correct it, or delete it to use the "
    "whole photo",
    Fault.MISSING_FILE: "put it there",
    Fault.BAD_FILE: "correct it, or download it again",
    Fault.BAD_ENTRY: "see docs/benchmarks.md for what is expected, and correct it",
    Fault.MISSING_IMAGE: "put the photo there, or correct the path",
    Fault.UNKNOWN_SUBJECT: "correct the name",
    Fault.BAD_PLACEHOLDER: "use {0} for the first, {1} for the second and so on",
    Fault.NOT_NAMED: "let the prompt name every reference",
    Fault.BAD_SEEDS: "give one seed a prompt, or none",
}


def read_benchmark(
    kind: Kind, path: Path, *, variant: Variant, prompts_per_combination: int, combinations: int | None, seed: int
) -> tuple[list[Row], list[Row]]:
    """The tasks of a benchmark of any kind and what was left out, with reasons.

    Args:
        kind: what lies there.
        path: a folder; for a benchmark of one's own, the file.
        variant: "corrected" puts the known errors of Concept101 right; the others have no such list.
        prompts_per_combination: the first ones are taken.
        combinations: the first ones are taken; None takes all.
        seed: one seed per task is derived from it.

    Raises:
        DataError: a file is missing or not what it should be.
        ConfigError: a variant that the kind does not have.
    """
    if kind is Kind.CONCEPT101:
        return read_concept101(
            path,
            variant=variant,
            prompts_per_combination=prompts_per_combination,
            combinations=combinations,
            seed=seed,
        )
    of_kind = _settings(kind, variant)
    survey = BENCHMARKS[kind].survey(
        path, prompts_per_combination=prompts_per_combination, combinations=combinations, seed=seed, **of_kind
    )
    return survey.result(path)


def look(kind: Kind, path: Path, *, variant: Variant) -> Survey:
    """All that is in a benchmark and all that is wrong with it. Raises DataError where there is nothing at all."""
    if not path.exists():
        raise DataError(f"there is no {path}; this benchmark is {BENCHMARKS[kind].published}")
    if path.is_dir() == (kind is Kind.OWN):
        raise DataError(f"got {path} for {kind}; expected a {'file' if kind is Kind.OWN else 'folder'}")
    of_kind = _settings(kind, variant)
    return BENCHMARKS[kind].survey(path, prompts_per_combination=2**31, combinations=None, seed=0, **of_kind)


def problems(survey: Survey) -> list[str]:
    """One line a problem: where, reason, what was found, what to do. Tasks that lack the same thing share a line."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in [*survey.faults, *survey.dropped]:
        same = () if row["unit"] == "task" and row["detail"] else (row["unit"], row["id"])
        groups.setdefault((row["reason"], row["detail"], *same), []).append(row)
    lines = []
    for rows in groups.values():
        first = rows[0]
        where = first["id"] if len(rows) == 1 else f"{first['id']} and {len(rows) - 1} more tasks"
        found = f"{first['detail']}; " if first["detail"] else ""
        line = f"{where}: {first['reason']}: {found}{ADVICE[first['reason']]}"
        lines.append("".join(c if c.isprintable() else "?" for c in line))  # a name may hold what a terminal obeys
    return lines


def _settings(kind: Kind, variant: Variant) -> dict[str, Variant]:
    if kind is Kind.CONCEPT101:
        return {"variant": variant}
    if variant != "official":
        raise ConfigError(f"got variant {variant!r} of {kind}, which has no list of known errors; take official")
    return {}
