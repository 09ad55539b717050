"""From the features of an image encoder to image tokens, and what differs between the two variants.

X any leading axes   S encoder tokens   D encoder width   R image tokens   E context width   P projection's inner width
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from mip.errors import CheckpointError, ConfigError

# Fixed by the published resampler: the checkpoint holds only the product heads * width.
_HEAD_WIDTH = 64


class ImageProjection(nn.Module):
    """One linear map from an image embedding to R tokens, then a LayerNorm. Keys `proj.*`, `norm.*`."""

    def __init__(self, *, feature_width: int, tokens: int, context_width: int) -> None:
        super().__init__()
        self.feature_width, self.tokens = feature_width, tokens
        self.proj = nn.Linear(feature_width, tokens * context_width)
        self.norm = nn.LayerNorm(context_width)

    def forward(self, features_XD: Tensor) -> Tensor:
        """(..., D) -> (..., R, E)."""
        return self.norm(self.proj(features_XD).unflatten(-1, (self.tokens, -1)))


class ResamplerAttention(nn.Module):
    """Attention from the latent tokens to the image features and the latents themselves, pre-normalised."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)  # of the image features
        self.norm2 = nn.LayerNorm(width)  # of the latents
        self.to_q = nn.Linear(width, heads * _HEAD_WIDTH, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * _HEAD_WIDTH, bias=False)
        self.to_out = nn.Linear(heads * _HEAD_WIDTH, width, bias=False)

    def forward(self, features_BSP: Tensor, latents_BRP: Tensor) -> Tensor:
        """Update of the latents, to be added to them: (B, R, P)."""
        features_BSP, latents_BRP = self.norm1(features_BSP), self.norm2(latents_BRP)
        keys_and_values = self.to_kv(torch.cat([features_BSP, latents_BRP], dim=1)).chunk(2, dim=-1)
        q, k, v = (
            x.unflatten(-1, (self.heads, _HEAD_WIDTH)).transpose(1, 2)
            for x in (self.to_q(latents_BRP), *keys_and_values)
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """Perceiver that reads the encoder's hidden states with R learnt queries.

    Keys `latents`, `proj_in.*`, `proj_out.*`, `norm_out.*`, `layers.<n>.0.*` (attention) and `layers.<n>.1.*`
    (feed-forward).
    """

    def __init__(
        self,
        *,
        feature_width: int,
        tokens: int,
        context_width: int,
        width: int,
        depth: int,
        heads: int,
        ff_width: int,
    ) -> None:
        super().__init__()
        self.feature_width = feature_width
        self.latents = nn.Parameter(torch.randn(1, tokens, width) * width**-0.5)
        self.proj_in = nn.Linear(feature_width, width)
        self.proj_out = nn.Linear(width, context_width)
        self.norm_out = nn.LayerNorm(context_width)
        self.layers = nn.ModuleList(
            nn.ModuleList([ResamplerAttention(width=width, heads=heads), _feed_forward(width, ff_width)])
            for _ in range(depth)
        )

    def forward(self, features_XSD: Tensor) -> Tensor:
        """(..., S, D) -> (..., R, E)."""
        leading = features_XSD.shape[:-2]
        features_BSP = self.proj_in(features_XSD.flatten(0, -3) if leading else features_XSD[None])
        latents_BRP = self.latents.expand(features_BSP.shape[0], -1, -1)
        for layer in self.layers:
            attention, feed_forward = layer  # pyright: ignore[reportGeneralTypeIssues]
            latents_BRP = attention(features_BSP, latents_BRP) + latents_BRP
            latents_BRP = feed_forward(latents_BRP) + latents_BRP
        tokens_BRE = self.norm_out(self.proj_out(latents_BRP))
        return tokens_BRE.reshape(*leading, *tokens_BRE.shape[1:])


def _feed_forward(width: int, inner: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, inner, bias=False),
        nn.GELU(),
        nn.Linear(inner, width, bias=False),
    )


class Variant(Protocol):
    """All that differs between the two published adapters."""

    @property
    def name(self) -> str:
        """Key in VARIANTS, in parameters and in checkpoint headers."""
        ...

    @property
    def marker(self) -> str:
        """A key of the projection's state that only this variant has."""
        ...

    def feature_width(self, encoder: CLIPVisionModelWithProjection) -> int:
        """D of what this encoder gives."""
        ...

    def features(self, encoder: CLIPVisionModelWithProjection, pixels_X3HW: Tensor) -> Tensor:
        """What the projection reads, for normalised pixels."""
        ...

    def absent_features(self, encoder: CLIPVisionModelWithProjection, pixels_X3HW: Tensor) -> Tensor:
        """What stands for "no image", in dropout and in the negative half; shaped as `features`."""
        ...

    def build_projection(self, state: Mapping[str, Tensor]) -> nn.Module:
        """An empty projection with the sizes of this state; the caller loads it, strictly."""
        ...


@dataclass(frozen=True)
class SDXL:
    """Four tokens from the encoder's projected embedding; no image = the encoder's OUTPUT is zero."""

    name: str = "sdxl"
    marker: str = "proj.weight"

    def feature_width(self, encoder: CLIPVisionModelWithProjection) -> int:
        """Width of the projected embedding."""
        return encoder.config.projection_dim

    def features(self, encoder: CLIPVisionModelWithProjection, pixels_X3HW: Tensor) -> Tensor:
        """Projected embeddings (X, D)."""
        return encoder(pixels_X3HW).image_embeds

    def absent_features(self, encoder: CLIPVisionModelWithProjection, pixels_X3HW: Tensor) -> Tensor:
        """Zeros (X, D)."""
        return pixels_X3HW.new_zeros(pixels_X3HW.shape[0], self.feature_width(encoder))

    def build_projection(self, state: Mapping[str, Tensor]) -> ImageProjection:
        """A projection with the sizes of this state."""
        (outputs, feature_width), (context_width,) = (
            _shape(state, "proj.weight", 2),
            _shape(state, "norm.weight", 1),
        )
        return ImageProjection(
            feature_width=feature_width, tokens=outputs // context_width, context_width=context_width
        )


@dataclass(frozen=True)
class SDXLPlus:
    """Sixteen tokens from the encoder's penultimate hidden states; no image = its INPUT pixels are zero."""

    name: str = "sdxl_plus"
    marker: str = "latents"

    def feature_width(self, encoder: CLIPVisionModelWithProjection) -> int:
        """Width of the hidden states."""
        return encoder.config.hidden_size

    def features(self, encoder: CLIPVisionModelWithProjection, pixels_X3HW: Tensor) -> Tensor:
        """Penultimate hidden states (X, S, D), class token first."""
        return encoder(pixels_X3HW, output_hidden_states=True).hidden_states[-2]

    def absent_features(self, encoder: CLIPVisionModelWithProjection, pixels_X3HW: Tensor) -> Tensor:
        """Penultimate hidden states (X, S, D) of images that are 0 after normalisation, i.e. of the mean colour."""
        # One image is encoded and shared: all rows are the same.
        features_1SD = self.features(encoder, torch.zeros_like(pixels_X3HW[:1]))
        return features_1SD.expand(pixels_X3HW.shape[0], -1, -1)

    def build_projection(self, state: Mapping[str, Tensor]) -> Resampler:
        """A resampler with the sizes of this state."""
        depth = len({key.split(".")[1] for key in state if key.startswith("layers.")})
        inner, width = _shape(state, "layers.0.0.to_q.weight", 2)
        return Resampler(
            feature_width=_shape(state, "proj_in.weight", 2)[1],
            tokens=_shape(state, "latents", 3)[1],
            context_width=_shape(state, "proj_out.weight", 2)[0],
            width=width,
            depth=depth,
            heads=inner // _HEAD_WIDTH,
            ff_width=_shape(state, "layers.0.1.1.weight", 2)[0],
        )


VARIANTS: Mapping[str, Variant] = {variant.name: variant for variant in (SDXL(), SDXLPlus())}


def variant_named(name: str) -> Variant:
    """The variant of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in VARIANTS:
        raise ConfigError(f"got variant {name!r}; give one of {', '.join(VARIANTS)}")
    return VARIANTS[name]


def detect_variant(state: Mapping[str, Tensor]) -> Variant:
    """The variant whose projection has this state.

    Raises:
        CheckpointError: the keys fit none, or more than one.
    """
    fitting = [variant for variant in VARIANTS.values() if variant.marker in state]
    if len(fitting) != 1:
        raise CheckpointError(
            f"got an image_proj with keys {', '.join(sorted(state)[:4]) or 'none'}; "
            "expected those of ImageProjModel (sdxl) or of Resampler (sdxl_plus)"
        )
    return fitting[0]


def load_projection(variant: Variant, state: Mapping[str, Tensor]) -> nn.Module:
    """The projection with these weights, in float32 and without gradients.

    Raises:
        CheckpointError: missing, unexpected or wrongly shaped entries, all of them named.
    """
    projection = variant.build_projection(state)
    check_tensors(state, {key: tuple(t.shape) for key, t in projection.state_dict().items()}, "image_proj")
    projection.load_state_dict({key: t.float() for key, t in state.items()})
    return projection.requires_grad_(False)


def check_encoder(variant: Variant, projection: nn.Module, encoder: CLIPVisionModelWithProjection) -> None:
    """Make sure that the projection can read what the encoder gives.

    Raises:
        ConfigError: it was trained with another encoder.
    """
    assert isinstance(projection, ImageProjection | Resampler)
    found, expected = variant.feature_width(encoder), projection.feature_width
    if found != expected:
        raise ConfigError(
            f"got an image encoder with features of width {found}, expected {expected} for this {variant.name} "
            "adapter; give the encoder that it was trained with"
        )


def check_tensors(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Compare names and shapes.

    Raises:
        CheckpointError: names every missing or unexpected entry and every wrong shape.
    """
    problems = [f"missing {key}" for key in expected if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in expected]
    problems += [
        f"{key} is {tuple(state[key].shape)} instead of {shape}"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    if problems:
        raise CheckpointError(f"{what} does not fit: {'; '.join(problems)}; give a checkpoint for this base model")


def _shape(state: Mapping[str, Tensor], key: str, axes: int) -> tuple[int, ...]:
    if key not in state or state[key].ndim != axes:
        found = tuple(state[key].shape) if key in state else "nothing"
        raise CheckpointError(f"image_proj does not fit: expected {key} with {axes} axes, got {found}")
    return tuple(state[key].shape)
