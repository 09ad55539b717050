"""What cross-attention needs to know about the reference images of one batch.

B batch   N references   R image tokens per reference   T text tokens   W name tokens (W <= T)
Q latent positions, row by row   H, W (as a pair) height and width of a mask   E context width
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mip.errors import ReferencesError

Merge = Literal["weighted", "concat", "mean"]
MERGES: tuple[Merge, ...] = ("weighted", "concat", "mean")

# Axis 0 is the batch and axis 1 the reference in every one of these.
_REQUIRED = ("image_BNRE", "phrase_BNTE", "words_BNT", "present_BN", "scale_BN")
_OPTIONAL = ("regions_BNHW", "oracle_BNHW")
_Value = TypeVar("_Value")


@dataclass(frozen=True, eq=False)
class References:
    """The references of one batch; an argument of every cross-attention layer, never a state.

    Rows may have different numbers of references: unused slots have `present_BN` False and contribute nothing,
    whatever they hold. `merge` is "weighted" (the paper), or one of two plain IP-Adapters without gate and relevance:
    "concat" (the tokens of all references in one softmax) and "mean" (average over the present references).

    Values (not shapes) are checked only for tensors on the CPU, where reading them stalls nothing.

    Raises:
        ReferencesError: shapes, dtypes or values that do not fit together.
    """

    image_BNRE: Tensor
    """Projected image tokens of each reference."""
    phrase_BNTE: Tensor
    """Text embedding of each entity name, encoded alone."""
    words_BNT: Tensor
    """bool; True on the tokens of the name (one or more), never on BOS, EOS or padding."""
    present_BN: Tensor
    """bool; True for slots that hold a reference."""
    scale_BN: Tensor
    """float; strength of each reference, applied after normalisation and without renormalising."""
    latent_size: tuple[int, int] | None = None
    """Height and width of the UNet's input; needed only to place regions and oracle weights."""
    regions_BNHW: Tensor | None = None
    """float >= 0, any height and width; multiplies the word maps before they are normalised over references."""
    oracle_BNHW: Tensor | None = None
    """float >= 0, any height and width; replaces the word maps. Where all are 0 no reference contributes."""
    merge: Merge = "weighted"
    is_gated: bool = True
    """False leaves the gate out (f = 1), also where a layer has one."""
    negatives: int = 0
    """Leading rows that are the negative half of guidance; a UNet batch without them takes the rest."""

    def __post_init__(self) -> None:
        self._check_shapes()
        if self.present_BN.device.type == "cpu":
            self._check_values()

    @property
    def batch(self) -> int:
        """Number of rows B."""
        return self.present_BN.shape[0]

    @property
    def count(self) -> int:
        """Number of reference slots N."""
        return self.present_BN.shape[1]

    @property
    def uses_words(self) -> bool:
        """Whether the weights come from the word maps."""
        return self.merge == "weighted" and self.oracle_BNHW is None

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "References":
        """Move to a device and cast the embeddings; scales and masks stay in float32."""
        moved = {name: t.to(device=device) for name, t in self._tensors().items()}
        for name in ("image_BNRE", "phrase_BNTE"):
            moved[name] = moved[name].to(dtype=dtype)
        return replace(self, **moved)

    def rows(self, batch: int) -> "References":
        """The references of a UNet batch: all rows, or the positive ones when guidance has been switched off.

        Raises:
            ReferencesError: `batch` is neither.
        """
        if batch == self.batch:
            return self
        if batch == self.batch - self.negatives:
            return self.positive
        raise ReferencesError(
            f"got references for {self.batch} rows ({self.negatives} negative) and a UNet batch of {batch}; "
            "give one row of references per row of the batch"
        )

    @cached_property
    def positive(self) -> "References":
        """The rows without the negative half of guidance."""
        kept = {name: t[self.negatives :] for name, t in self._tensors().items()}
        return replace(self, negatives=0, **kept)

    def repeat(self, times: int) -> "References":
        """Repeat every row `times` times in a row, as diffusers does for num_images_per_prompt."""
        repeated = {name: t.repeat_interleave(times, dim=0) for name, t in self._tensors().items()}
        return replace(self, negatives=self.negatives * times, **repeated)

    def with_negative(self, negative: "References") -> "References":
        """Put the negative half of guidance in front."""
        return replace(References.stack([negative, self]), negatives=negative.batch)

    @staticmethod
    def stack(parts: Sequence["References"]) -> "References":
        """Join along the batch; parts with fewer references are padded with absent slots.

        Raises:
            ReferencesError: no parts, or parts that disagree in anything but their batch and number of references.
        """
        if not parts:
            raise ReferencesError("got no references to stack; give at least one row")
        first = parts[0]
        for part in parts[1:]:
            _check_same_settings(first, part)
        count = max(part.count for part in parts)
        names = [name for name in _REQUIRED + _OPTIONAL if any(getattr(p, name) is not None for p in parts)]
        joined = {name: torch.cat([_padded(p, name, count, parts) for p in parts]) for name in names}
        return replace(first, negatives=0, **joined)

    @cached_property
    def names(self) -> tuple[Tensor, Tensor]:
        """The rows of `phrase_BNTE` that belong to names, gathered: phrase_BNWE and words_BNW (bool).

        A name without tokens (possible only in an absent slot) counts all W rows, to keep its maps finite.
        """
        lengths_BN = self.words_BNT.sum(dim=-1)
        longest = max(int(lengths_BN.max()), 1) if lengths_BN.numel() else 1
        # A stable descending sort of 0/1 puts the True positions first and keeps their order.
        order_BNW = self.words_BNT.int().argsort(dim=-1, descending=True, stable=True)[..., :longest]
        words_BNW = self.words_BNT.gather(-1, order_BNW)
        index_BNWE = order_BNW[..., None].expand(*order_BNW.shape, self.phrase_BNTE.shape[-1])
        phrase_BNWE = self.phrase_BNTE.gather(2, index_BNWE)
        return phrase_BNWE, words_BNW | ~words_BNW.any(dim=-1, keepdim=True)

    def log_prior(self, positions: int) -> Tensor:
        """log of what multiplies the word maps before normalisation: presence, region, oracle.

        Returns:
            prior_BNQ, float32; -inf where a reference may not act. Q is 1 where nothing depends on the position.
        """
        active_BN = self.present_BN
        if self.uses_words:
            active_BN = active_BN & self.words_BNT.any(dim=-1)
        prior_BNQ = torch.zeros_like(self.scale_BN)[:, :, None]
        for mask_BNHW in (self.regions_BNHW, self.oracle_BNHW):
            if mask_BNHW is not None:
                prior_BNQ = prior_BNQ + self._on_grid(mask_BNHW, positions).log()
        return prior_BNQ.masked_fill(~active_BN[:, :, None], -torch.inf)

    def _on_grid(self, mask_BNHW: Tensor, positions: int) -> Tensor:
        assert self.latent_size is not None  # checked at construction
        grid = layer_grid(self.latent_size, positions)
        return F.adaptive_avg_pool2d(mask_BNHW, grid).flatten(2)

    def _tensors(self) -> dict[str, Tensor]:
        values = {name: getattr(self, name) for name in _REQUIRED + _OPTIONAL}
        return {name: value for name, value in values.items() if value is not None}

    def _check_shapes(self) -> None:
        shapes = {name: tuple(t.shape) for name, t in self._tensors().items()}
        axes = {f.name: len(f.name.rpartition("_")[2]) for f in fields(self) if f.name in shapes}
        for name, shape in shapes.items():
            if len(shape) != axes[name] or shape[:2] != shapes["present_BN"][:2]:
                raise ReferencesError(
                    f"got {name} of shape {shape} beside present_BN {shapes['present_BN']}; axes must agree"
                )
        if shapes["phrase_BNTE"][:3] != shapes["words_BNT"] or shapes["phrase_BNTE"][3] != shapes["image_BNRE"][3]:
            raise ReferencesError(
                f"got image_BNRE {shapes['image_BNRE']}, phrase_BNTE {shapes['phrase_BNTE']}, "
                f"words_BNT {shapes['words_BNT']}; T and E must agree"
            )
        for name in ("words_BNT", "present_BN"):
            if getattr(self, name).dtype != torch.bool:
                raise ReferencesError(f"got {name} of {getattr(self, name).dtype}; give torch.bool")
        if self.merge not in MERGES:
            raise ReferencesError(f"got merge={self.merge!r}; give one of {', '.join(MERGES)}")
        if self.latent_size is None and any(name in shapes for name in _OPTIONAL):
            raise ReferencesError(
                "got regions or oracle weights without latent_size; give the UNet input's (height, width)"
            )

    def _check_values(self) -> None:
        if self.uses_words and bool((self.present_BN & ~self.words_BNT.any(dim=-1)).any()):
            raise ReferencesError("got a present reference without name tokens in words_BNT; give each at least one")
        for name in ("scale_BN", *_OPTIONAL):
            value = getattr(self, name)
            if value is None:
                continue
            if not bool(value[self.present_BN].isfinite().all()):
                raise ReferencesError(f"got {name} with NaN or infinity; give finite numbers")
            if name in _OPTIONAL and bool((value < 0).any()):
                raise ReferencesError(f"got {name} with negative weights; give numbers >= 0")


def layer_grid(latent_size: tuple[int, int], positions: int) -> tuple[int, int]:
    """Height and width of a layer that has `positions` positions, in a UNet that halves its input, rounding up.

    Raises:
        ReferencesError: no number of halvings gives that many positions.
    """
    height, width = latent_size
    while height * width > positions and max(height, width) > 1:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != positions:
        raise ReferencesError(
            f"got latent_size {latent_size} in a layer of {positions} positions; give the UNet input's size"
        )
    return height, width


class ReferenceCache:
    """Keys, values and masks that stay the same from step to step; made for one `References` and one call.

    The caller owns it and hands it over beside the references. Only for use without gradients, and while the layers'
    weights stay as they are.
    """

    def __init__(self, references: References) -> None:
        self.references = references
        # These read sizes from values, which a compiled graph cannot; they stay with the references.
        for rows in (references, references.positive):
            _ = rows.names
        self._values: dict[tuple[str, int, int], object] = {}
        self._of_text: dict[str, tuple[Tensor, int, object]] = {}

    def get(self, key: tuple[str, int, int], references: References, build: Callable[[], _Value]) -> _Value:
        """The value for (layer, batch, positions), built at the first request.

        Raises:
            ReferencesError: the cache was made for other references, or gradients are enabled.
        """
        if references is not self.references:
            raise ReferencesError("got a reference_cache made for other references; make a ReferenceCache per call")
        if torch.is_grad_enabled():
            raise ReferencesError("got a reference_cache while gradients are enabled; leave it out in training")
        if key not in self._values:
            self._values[key] = build()
        return self._values[key]  # pyright: ignore[reportReturnType]

    def get_of_text(self, layer: str, context_BTE: Tensor, build: Callable[[], _Value]) -> _Value:
        """The value for a layer and this very text, built anew when a callback has put another in its place.

        Tensors of torch.inference_mode do not tell whether they were written to, so theirs is never kept.
        """
        if context_BTE.is_inference():
            return build()
        known = self._of_text.get(layer)
        if known is None or known[0] is not context_BTE or known[1] != context_BTE._version:
            known = self._of_text[layer] = (context_BTE, context_BTE._version, build())
        return known[2]  # pyright: ignore[reportReturnType]


@dataclass
class ReferenceMaps:
    """Collects the maps of the layers; the caller owns it and passes it as `reference_maps`.

    Each list has one entry per pass through the layer, with the rows of the UNet batch (negative half first).
    """

    has_gradient: bool = False
    """True keeps the graph of `mass` (never of `relevance`), for a loss on where names attend."""
    layers: Container[str] | None = None
    """Layers to record, by diffusers' processor name; None records all."""
    mass: dict[str, list[Tensor]] = field(default_factory=dict)
    """M_BNQ, float32: mean softmax over positions of each name, sums to 1 over Q; before regions, 0 if absent."""
    relevance: dict[str, list[Tensor]] = field(default_factory=dict)
    """A_BNQ, float32: the weights that were used, sum to 1 over N; empty for merge="concat", which has none."""

    def wants(self, layer: str) -> bool:
        """Whether this layer is recorded."""
        return self.layers is None or layer in self.layers

    def add(self, layer: str, mass_BNQ: Tensor, relevance_BNQ: Tensor | None) -> None:
        """Append the maps of one pass."""
        self.mass.setdefault(layer, []).append(mass_BNQ)
        if relevance_BNQ is not None:
            self.relevance.setdefault(layer, []).append(relevance_BNQ)


def _check_same_settings(one: References, other: References) -> None:
    for name in ("latent_size", "merge", "is_gated"):
        if getattr(one, name) != getattr(other, name):
            raise ReferencesError(
                f"got rows with {name} {getattr(one, name)} and {getattr(other, name)}; they must agree"
            )
    if (one.oracle_BNHW is None) != (other.oracle_BNHW is None):
        raise ReferencesError("got oracle weights for some rows only; give them for all or for none")


def _padded(part: References, name: str, count: int, parts: Sequence[References]) -> Tensor:
    value = getattr(part, name)
    if value is None:  # only regions may be missing: everywhere allowed
        like = next(t for p in parts if (t := getattr(p, name)) is not None)
        value = like.new_ones(part.batch, part.count, *like.shape[2:])
    padding = value.new_zeros(part.batch, count - part.count, *value.shape[2:])
    return torch.cat([value, padding], dim=1)
