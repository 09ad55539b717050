"""Finds the golden data: recorded runs of the official code on a tiny model of SDXL's shape.

MIP_GOLDEN names the folder; by default it is `shared/golden` beside the repository. Which cases there are, how many
objects they have and how large they are is read from the folder's manifest, never assumed.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mip.model.references import References

GOLDEN = Path(os.environ.get("MIP_GOLDEN") or Path(__file__).parents[3] / "shared" / "golden")

# First part of a case's file -> the fixture that takes such cases one by one.
_FIXTURES = {
    "attention": "attention_case",
    "unet": "unet_case",
    "train": "training_case",
    "e2e": "generation_case",
}


@dataclass(frozen=True)
class Case:
    """One recorded run; `tensors` are read when asked for."""

    id: str
    file: Path
    params: Mapping[str, Any]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Inputs, outputs and intermediate values by name."""
        return load_file(self.file)


def golden_cases() -> list[Case]:
    """All recorded runs; none without golden data."""
    manifest = GOLDEN / "manifest.json"
    if not manifest.is_file():
        return []
    listed = json.loads(manifest.read_text())["cases"]
    return [Case(c["id"], GOLDEN / c["file"], c["params"]) for c in listed]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each test the cases of its kind."""
    for folder, fixture in _FIXTURES.items():
        if fixture in metafunc.fixturenames:
            # Runs are told from their auxiliary files by what only they have.
            found = [
                case
                for case in golden_cases()
                if case.file.parent.name == folder and case.params.keys() & {"adapter", "heads", "adapter_grad_norms"}
            ]
            metafunc.parametrize(fixture, found, ids=[case.id for case in found])


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder; skips the test when there is none."""
    if not (GOLDEN / "manifest.json").is_file():
        pytest.skip(f"no golden data in {GOLDEN}; set MIP_GOLDEN")
    return GOLDEN


@pytest.fixture(scope="session")
def golden_case(golden: Path) -> Callable[[str], Case]:
    """A case by its id."""
    cases = {case.id: case for case in golden_cases()}
    return lambda name: cases[name]


@pytest.fixture(scope="session")
def references_of() -> Callable[..., References]:
    """References from recorded tensors: tokens (B, N, R, E), embeddings of the names, their token counts."""

    def build(tokens_BNRE: Tensor, phrase_BNTE: Tensor, lengths_BN: Tensor, *, scale: float) -> References:
        position_T = torch.arange(phrase_BNTE.shape[2])
        return References(
            image_BNRE=tokens_BNRE,
            phrase_BNTE=phrase_BNTE,
            words_BNT=(position_T >= 1) & (position_T <= lengths_BN[..., None]),
            present_BN=torch.ones_like(lengths_BN, dtype=torch.bool),
            scale_BN=torch.full(lengths_BN.shape, float(scale)),
        )

    return build
