"""Reads features where they lie, in an order that depends only on the seed and the step.

B samples   N objects, padded to the most in the batch   C, H, W latents   T text tokens   E context width
D pooled width   F one object's image features: (D,) or (S, D) by variant
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from mip.tables import check_kind, read_rows
from mip.training.checksums import read_checksums, verify


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples with any number of objects; the slots that `present_BN` says are empty hold zeros."""

    sample_ids: tuple[str, ...]
    mean_BCHW: Tensor  # of the latents, in the UNet's units
    std_BCHW: Tensor
    prompt_BTE: Tensor
    pooled_BD: Tensor
    time_ids_B6: Tensor  # float; original height, width; crop top, left; target height, width
    features_BNF: Tensor
    phrase_BNTE: Tensor
    words_BNT: Tensor  # bool
    present_BN: Tensor  # bool
    masks_BNHW: Tensor  # float, 0 to 1: coverage of each latent position

    def to(self, device: torch.device) -> "Batch":
        """Move all tensors."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


@dataclass(frozen=True, eq=False)
class Absence:
    """What takes the place of a condition that is dropped."""

    features_F: Tensor
    prompt_TE: Tensor
    pooled_D: Tensor

    def to(self, device: torch.device) -> "Absence":
        """Move all tensors."""
        return Absence(self.features_F.to(device), self.prompt_TE.to(device), self.pooled_D.to(device))


class FeatureSet:
    """One split of the features that `mip.training.features` wrote; the tensors stay on disk until they are used.

    Its files are read whole once, against their checksums, when it is opened.

    Raises:
        DataError: no features there, or a file that is missing or damaged.
    """

    def __init__(self, folder: Path, *, split: str) -> None:
        self.folder = folder
        self.made_from = check_kind(folder / "index.parquet", "features")
        self.rows = [row for row in read_rows(folder / "index.parquet", "features") if row["split"] == split]
        self.weights = np.asarray([row["weight"] for row in self.rows], np.float64)
        checksums = read_checksums(folder)
        texts = sorted(name for name in checksums if name.startswith("texts-"))
        shards = sorted({row["shard"] for row in self.rows})
        verify(folder, ["absent.safetensors", *texts, *shards], checksums)
        self._texts = [_open(folder / name) for name in texts]
        self._text_starts = np.cumsum([0, *(len(texts["pooled"]) for texts in self._texts)])
        self._shards = {name: _open(folder / name) for name in shards}

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, places: Sequence[int]) -> Batch:
        """The samples at these places, in this order."""
        rows = [self.rows[place] for place in places]
        width = max(len(row["names"]) for row in rows)

        def padded(values: Sequence[Tensor]) -> Tensor:
            """One row of N: the values, then zeros."""
            return torch.stack([*values, *[torch.zeros_like(values[0])] * (width - len(values))])

        def objects(name: str, column: str) -> Tensor:
            return torch.stack([padded([self._shards[row["shard"]][name][i] for i in row[column]]) for row in rows])

        names = [[self._text(number) for number in row["names"]] for row in rows]
        captions = [self._text(row["caption"]) for row in rows]
        return Batch(
            sample_ids=tuple(row["sample_id"] for row in rows),
            mean_BCHW=torch.stack([self._shards[row["shard"]]["mean"][row["row"]] for row in rows]),
            std_BCHW=torch.stack([self._shards[row["shard"]]["std"][row["row"]] for row in rows]),
            prompt_BTE=torch.stack([caption["embedding"] for caption in captions]).float(),
            pooled_BD=torch.stack([caption["pooled"] for caption in captions]).float(),
            time_ids_B6=torch.tensor([row["time_ids"] for row in rows], dtype=torch.float32),
            features_BNF=objects("views", "views").float(),
            phrase_BNTE=torch.stack([padded([name["embedding"] for name in row]) for row in names]).float(),
            words_BNT=torch.stack([padded([name["words"] for name in row]) for row in names]),
            present_BN=torch.tensor([[i < len(row["names"]) for i in range(width)] for row in rows]),
            masks_BNHW=objects("masks", "masks").float() / 255,
        )

    def absence(self) -> Absence:
        """Stands for a dropped image and a dropped text; "" is text number 0."""
        empty = self._text(0)
        features_F = _open(self.folder / "absent.safetensors")["features"]
        return Absence(features_F.float(), empty["embedding"].float(), empty["pooled"].float())

    def _text(self, number: int) -> dict[str, Tensor]:
        shard = int(np.searchsorted(self._text_starts, number, side="right")) - 1
        return {name: tensor[number - self._text_starts[shard]] for name, tensor in self._texts[shard].items()}


class Sampler:
    """Which samples an optimizer step takes, over all processes: a function of the step, without a state to keep.

    An epoch has as many draws as there are samples. With equal weights each sample comes once in it, in random order;
    else about in proportion to its weight.
    """

    def __init__(self, weights: NDArray[np.float64], *, batch: int, seed: int) -> None:
        self.weights, self.size, self.seed = weights, batch, seed
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def places(self, step: int) -> list[int]:
        """Places of the samples of one step, in order."""
        count = len(self.weights)
        return [int(self._epoch(i // count)[i % count]) for i in range(step * self.size, (step + 1) * self.size)]

    def _draw_epoch(self, epoch: int) -> NDArray[np.int64]:
        rng = np.random.default_rng([self.seed, epoch])
        # Systematic resampling: evenly spaced marks on the cumulated weights.
        marks = (np.arange(len(self.weights)) + rng.uniform(0.25, 0.75)) / len(self.weights)
        return rng.permutation(np.searchsorted(np.cumsum(self.weights) / np.sum(self.weights), marks))


def _open(path: Path) -> dict[str, Tensor]:
    """Tensors that are mapped, not read."""
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}
