"""Reads features where they lie, in an order that depends only on the seed and the step.

B samples   N objects, padded to the most in the batch   C, H, W latents   T text tokens   E context width
D pooled width   F one object's image features: (D,) or (S, D) by variant
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from mip.errors import DataError
from mip.tables import Row, check_kind, read_rows
from mip.training.checksums import read_checksums, verify
from mip.training.live import Cut, Live


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


@dataclass(frozen=True, eq=False)
class Loaded:
    """Samples that are read; `encode` makes the batch of them, with the networks for what is not cached."""

    sample_ids: tuple[str, ...]
    latent_shape: tuple[int, ...]  # of one sample: C, H, W
    encode: Callable[[], Batch]  # to be called by the thread that trains

    @classmethod
    def complete(cls, batch: Batch) -> "Loaded":
        """Nothing is left to encode."""
        return cls(batch.sample_ids, latent_shape=tuple(batch.mean_BCHW.shape[1:]), encode=lambda: batch)


class FeatureSet:
    """One split of the features that `mip.training.features` wrote; the tensors stay on disk until they are used.

    Its files are read whole once, against their checksums, when it is opened.

    Args:
        folder: where they lie.
        split: train or val.
        live: encodes the kinds that are not cached; see `Live.of`.

    Raises:
        DataError: no features there, a file that is missing or damaged, or a kind that is not cached without `live`.
    """

    def __init__(self, folder: Path, *, split: str, live: Live | None = None) -> None:
        self.folder, self.live = folder, live
        self.made_from = check_kind(folder / "index.parquet", "features")
        if live is None and "cache" in self.made_from:
            raise DataError(f"{folder} holds only [{self.made_from['cache']}]; the rest has to be encoded live")
        index = read_rows(folder / "index.parquet", "features")
        self.rows = [row for row in index if row["split"] == split]
        self.weights = np.asarray([row["weight"] for row in self.rows], np.float64)
        checksums = read_checksums(folder)
        texts = sorted(name for name in checksums if name.startswith("texts-"))
        shards = sorted({row["shard"] for row in self.rows})
        tables = sorted(name for name in checksums if name.endswith(".parquet"))
        verify(folder, ["absent.safetensors", *tables, *texts, *shards], checksums)
        if self._encodes("latents", "images"):
            sources = read_rows(folder / "live.parquet", "live")
            self._sources = [source for row, source in zip(index, sources, strict=True) if row["split"] == split]
        if self._encodes("texts"):
            self._strings = [row["text"] for row in read_rows(folder / "texts.parquet", "texts")]
        self._texts = [_open(folder / name) for name in texts]
        self._text_starts = np.cumsum([0, *(len(texts["pooled"]) for texts in self._texts)])
        self._shards = {name: _open(folder / name) for name in shards}

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, places: Sequence[int]) -> Batch:
        """The samples at these places, in this order."""
        return self.read(places).encode()

    def read(self, places: Sequence[int]) -> Loaded:
        """The same without running a network, so that another thread may read while one trains.

        Raises:
            DataError: an image that has changed since the rest was encoded.
        """
        rows = [self.rows[place] for place in places]
        if self.live is None:
            return Loaded.complete(self._batch(rows))
        cuts: Sequence[Cut | None] = [None] * len(rows)
        if self._encodes("latents", "images"):
            cuts = [self.live.cut(self._sources[place], self.rows[place]["time_ids"]) for place in places]
        shape = self._shards[rows[0]["shard"]]["masks"].shape[1:]
        return Loaded(
            tuple(row["sample_id"] for row in rows),
            latent_shape=(self.live.channels, *shape),
            encode=lambda: self._batch(rows, cuts),
        )

    def _encodes(self, *kinds: str) -> bool:
        return self.live is not None and any(kind in self.live.kinds for kind in kinds)

    def _batch(self, rows: Sequence[Row], cuts: Sequence[Cut | None] | None = None) -> Batch:
        cuts = cuts or [None] * len(rows)
        width = max(len(row["names"]) for row in rows)

        def padded(values: Sequence[Tensor]) -> Tensor:
            """One row of N: the values, then zeros."""
            return torch.stack([*values, *[torch.zeros_like(values[0])] * (width - len(values))])

        latents = [self._latents(row, cut) for row, cut in zip(rows, cuts, strict=True)]
        views = [self._views(row, cut) for row, cut in zip(rows, cuts, strict=True)]
        masks = [[self._shards[row["shard"]]["masks"][i] for i in row["masks"]] for row in rows]
        names = [[self._text(number) for number in row["names"]] for row in rows]
        captions = [self._text(row["caption"]) for row in rows]
        return Batch(
            sample_ids=tuple(row["sample_id"] for row in rows),
            mean_BCHW=torch.stack([mean_CHW for mean_CHW, _ in latents]),
            std_BCHW=torch.stack([std_CHW for _, std_CHW in latents]),
            prompt_BTE=torch.stack([caption["embedding"] for caption in captions]).float(),
            pooled_BD=torch.stack([caption["pooled"] for caption in captions]).float(),
            time_ids_B6=torch.tensor([row["time_ids"] for row in rows], dtype=torch.float32),
            features_BNF=torch.stack([padded(row) for row in views]).float(),
            phrase_BNTE=torch.stack([padded([name["embedding"] for name in row]) for row in names]).float(),
            words_BNT=torch.stack([padded([name["words"] for name in row]) for row in names]),
            present_BN=torch.tensor([[i < len(row["names"]) for i in range(width)] for row in rows]),
            masks_BNHW=torch.stack([padded(row) for row in masks]).float() / 255,
        )

    def absence(self) -> Absence:
        """Stands for a dropped image and a dropped text; "" is text number 0."""
        empty = self._text(0)
        features_F = _open(self.folder / "absent.safetensors")["features"]
        return Absence(features_F.float(), empty["embedding"].float(), empty["pooled"].float())

    def _latents(self, row: Row, cut: Cut | None) -> tuple[Tensor, Tensor]:
        if self.live is not None and cut is not None and self._encodes("latents"):
            return self.live.latents(cut)
        shard = self._shards[row["shard"]]
        return shard["mean"][row["row"]], shard["std"][row["row"]]

    def _views(self, row: Row, cut: Cut | None) -> list[Tensor]:
        if self.live is not None and cut is not None and self._encodes("images"):
            return self.live.views(cut)
        return [self._shards[row["shard"]]["views"][i] for i in row["views"]]

    def _text(self, number: int) -> dict[str, Tensor]:
        if self.live is not None and self._encodes("texts"):
            text = self.live.text(self._strings[number])
            return {"embedding": text.embedding_TE, "pooled": text.pooled_D, "words": text.words_T}
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
