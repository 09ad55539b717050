"""The golden data: recorded runs of the official code on a tiny model of SDXL's shape, and what was compared with them.

MIP_GOLDEN names the folder; by default it is `shared/golden` beside the repository. Which cases there are, how many
objects they have and how large they are is read from the folder's files, never assumed.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer

from mip.model.references import References
from tests.closure import ROOT

GOLDEN = Path(os.environ.get("MIP_GOLDEN") or ROOT.parent / "shared" / "golden").absolute()
SHARED = Path(os.environ.get("MIP_SHARED") or ROOT.parent / "shared").absolute()

# Fixture -> the kind of cases that it takes one by one.
KINDS = {
    "base_case": "base",
    "order_case": "order",
    "adapter_case": "adapters",
    "attention_case": "attention",
    "unet_case": "unet",
    "training_run": "train",
    "pixels_case": "e2e pixels",
    "generation_case": "e2e",
    "data_case": "data",
    "filter_case": "data filter",
    "flip_case": "data flips",
    "dropout_case": "data dropout",
    "lookup_case": "data lookup",
    "limits_case": "data limits",
    "scores_case": "eval scores",
    "preprocess_case": "eval preprocess",
    "crop_case": "eval crops",
    "prompts_case": "eval prompts",
}


@dataclass(frozen=True, eq=False)
class Case:
    """Something recorded: a run with its tensors, or an entry of one of the JSON files."""

    id: str
    kind: str
    file: Path
    params: Mapping[str, Any]
    outputs: tuple[str, ...] = ()  # tensors that the official code computed

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Inputs, outputs and intermediate values by name."""
        return _tensors(self.file)

    @property
    def cases(self) -> tuple["Case", ...]:
        """Itself; a run has several."""
        return (self,)


@dataclass(frozen=True, eq=False)
class Run:
    """Training steps that follow one another."""

    id: str
    cases: tuple[Case, ...]


@cache
def _tensors(file: Path) -> dict[str, Tensor]:
    return load_file(file)


def read_json(path: str) -> Any:
    """A file of the golden data; an empty dictionary if it has none."""
    file = GOLDEN / path
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


@cache
def manifest() -> Mapping[str, Any]:
    """The manifest; without golden data an empty one."""
    return {"cases": [], **read_json("manifest.json")}


@cache
def cases() -> tuple[Case, ...]:
    """Everything recorded: the manifest's cases, then what the files beside them list."""
    return (*_manifest_cases(), *_adapters(), *_orders(), *_records(), *_prompts())


def of_kind(kind: str) -> list[Case] | list[Run]:
    """Cases of one kind; training steps are joined to runs."""
    found = [case for case in cases() if case.kind == kind]
    if kind != "train":
        return found
    steps = defaultdict(list)
    for case in sorted(found, key=lambda case: case.params["step"]):
        steps[case.params["variant"]].append(case)
    return [Run(variant, tuple(run)) for variant, run in steps.items()]


def _manifest_cases() -> Iterator[Case]:
    for entry in manifest()["cases"]:
        outputs = tuple(tensor["name"] for tensor in entry["tensors"] if tensor["role"] == "output")
        yield Case(entry["id"], _kind(entry), GOLDEN / entry["file"], entry["params"], outputs)


def _kind(entry: Mapping[str, Any]) -> str:
    """By folder, and within it by what only this kind has; a kind that no fixture takes ends in a failure."""
    folder, params = Path(entry["file"]).parent.name or "base", entry["params"]
    if folder == "e2e" and "adapter" not in params:
        return "e2e pixels"
    if folder == "eval":
        kinds = {"combinations": "scores", "boxes": "crops", "image": "preprocess"}
        return "eval " + next((kind for key, kind in kinds.items() if key in params), "")
    return folder


def _adapters() -> Iterator[Case]:
    path = manifest().get("adapters", "adapters/adapters.json")
    for variant, entry in read_json(path).items():
        yield Case(variant, "adapters", GOLDEN / entry["file"], entry)


def _orders() -> Iterator[Case]:
    for name, order in read_json("processor_order.json").items():
        if isinstance(order, dict):
            yield Case(name, "order", GOLDEN, order)


def _records() -> Iterator[Case]:
    records = read_json(manifest().get("data_records", "data/records.json"))
    lists = {key: entries for key, entries in records.items() if key.startswith("same_samples_at_size_")}
    sized = {int(key.rpartition("_")[2]): entries for key, entries in lists.items()}
    for size, entries in {records.get("size"): records.get("samples", []), **sized}.items():
        for number, entry in enumerate(entries):
            params = {**entry, "size": size, "number": number}
            yield Case(f"{entry['sample']}-{size}", "data filter", GOLDEN, params)
    numbers = {entry["sample"]: number for number, entry in enumerate(records.get("samples", []))}
    for entry in records.get("flips_enabled", []):
        params = {**entry, "size": records["size"], "number": numbers[entry["sample"]]}
        yield Case(f"{entry['sample']}-flips", "data flips", GOLDEN, params)
    for key, kind in (("dropout_rule", "data dropout"), ("entity_lookup", "data lookup")):
        for number, entry in enumerate(records.get(key, [])):
            yield Case(f"{key}-{number}", kind, GOLDEN, entry)
    if end := records.get("end_of_range"):
        yield Case("end_of_range", "data lookup", GOLDEN, end)
    if limits := records.get("constants"):
        yield Case("constants", "data limits", GOLDEN, limits)


def _prompts() -> Iterator[Case]:
    if prompts := read_json("eval/concept101_prompts.json"):
        yield Case("concept101_prompts", "eval prompts", GOLDEN, prompts)


def photograph_path(name: str) -> Path:
    """Where a reference photograph lies that a case names, with or without folder and ending."""
    more, file = SHARED / "references_more", f"{Path(name).stem}.png"
    folders = (GOLDEN / "reference_images", GOLDEN / "eval" / "reference_crop", more, more / "reference_crop")
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    raise FileNotFoundError(f"no {file} in {', '.join(map(str, folders))}")


def photograph(name: str) -> Image.Image:
    """A reference photograph that a case names."""
    with Image.open(photograph_path(name)) as photo:
        return photo.copy()


@cache
def load_tokenizer(part: str) -> Any:
    """One of the base's tokenizers."""
    return CLIPTokenizer.from_pretrained(GOLDEN / "base" / part)


def references_of(tokens_BNRE: Tensor, phrase_BNTE: Tensor, lengths_BN: Tensor, *, scale: float) -> References:
    """References from recorded tensors: image tokens, embeddings of the names, their token counts."""
    position_T = torch.arange(phrase_BNTE.shape[2])
    return References(
        image_BNRE=tokens_BNRE,
        phrase_BNTE=phrase_BNTE,
        words_BNT=(position_T >= 1) & (position_T <= lengths_BN[..., None]),
        present_BN=torch.ones_like(lengths_BN, dtype=torch.bool),
        scale_BN=torch.full(lengths_BN.shape, float(scale)),
    )


@dataclass(repr=False)
class Ledger:
    """What the tests have compared so far."""

    cases: set[Case] = field(default_factory=set)  # taken by a test that was not skipped
    outputs: set[tuple[str, str]] = field(default_factory=set)  # id of a case, name of a tensor
    largest: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)  # difference, allowed

    def compare(
        self,
        case: Case,
        name: str,
        ours: Tensor | ArrayLike,
        *,
        atol: float = 0.0,
        l2: float | None = None,
        where: Tensor | None = None,
        label: str = "",
    ) -> None:
        """Assert that ours is the recorded tensor.

        Args:
            case: which has it.
            name: of the tensor.
            ours: of the same shape.
            atol: largest absolute difference; 0 for equality.
            l2: largest difference relative to the recorded tensor in the L2 norm, instead of `atol`.
            where: bool; compare only these entries.
            label: added to the name in the summary.
        """
        recorded = case.tensors[name].double()
        given = torch.from_numpy(np.array(ours.detach() if isinstance(ours, Tensor) else ours, np.float64))
        assert given.shape == recorded.shape, f"{name}: {tuple(given.shape)}, recorded {tuple(recorded.shape)}"
        error = given - recorded if where is None else (given - recorded)[where]
        assert error.numel(), f"{name}: nothing to compare"
        found = float(error.abs().max() if l2 is None else error.norm() / recorded.norm())
        allowed = atol if l2 is None else l2
        self.outputs.add((case.id, name))
        self.note(case.kind, re.sub(r"\d+", "#", name) + label, found, allowed)
        assert found <= allowed, f"{name} differs by {found:.3g}, allowed {allowed:.3g}"

    def note(self, kind: str, name: str, found: float, allowed: float) -> None:
        """Keep the largest difference of this name, for the summary."""
        before, _ = self.largest.get((kind, name), (-1.0, 0.0))
        self.largest[kind, name] = max(before, found), allowed

    def missing_cases(self) -> list[str]:
        """Cases that no test has taken."""
        return [f"{case.kind}: {case.id}" for case in cases() if case not in self.cases]

    def missing_outputs(self) -> list[str]:
        """Recorded results that no test has compared."""
        return [f"{c.id}: {name}" for c in cases() for name in c.outputs if (c.id, name) not in self.outputs]


HERE = Path(__file__).parent
LEDGER = pytest.StashKey[Ledger]()
NOT_RUN = pytest.StashKey[list[str]]()  # tests of this folder that were deselected
