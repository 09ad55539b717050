"""The adapter: the weights of all layers and the image projection, and how they enter and leave a UNet."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from mip.errors import ConfigError
from mip.model.attention import MIPAttnProcessor, PlainAttnProcessor
from mip.model.checkpoint import AdapterCheckpoint, read_adapter
from mip.model.official import OfficialAttnProcessor, OfficialSelfAttnProcessor
from mip.model.projection import Variant, check_tensors, load_projection

Arithmetic = Literal["fast", "official"]


class MIPAdapter(nn.Module):
    """Owns `projection` and one processor per cross-attention layer of a UNet.

    Build it with `from_checkpoint` or `fresh`. While installed, the processors are submodules of the UNet as well, so
    they follow its `.to(...)`. They would also follow its `requires_grad_(False)` and be saved by its
    `save_pretrained`: freeze before you install, and eject before you save.

    Attributes:
        variant: what differs between the two published adapters.
        projection: image features to image tokens; frozen unless the caller thaws it.
        metadata: header of the file it came from; empty for one that was made here.
    """

    metadata: Mapping[str, str] = MappingProxyType({})

    def __init__(self, processors: Mapping[int, MIPAttnProcessor], projection: nn.Module, variant: Variant) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(index): processor for index, processor in processors.items()})
        self.projection = projection
        self.variant = variant
        self._unet: list[UNet2DConditionModel] = []
        self._replaced: dict[str, Any] = {}

    @classmethod
    def from_checkpoint(
        cls,
        source: AdapterCheckpoint | Path | str,
        unet: UNet2DConditionModel,
        *,
        adds_gate: bool = False,
    ) -> "MIPAdapter":
        """An adapter with the weights of a checkpoint, in float32, for this UNet; not yet installed.

        Args:
            source: a checkpoint or the path of one.
            unet: the UNet it is for; only read.
            adds_gate: give a plain IP-Adapter, which has no gate, one that starts at f = 1 everywhere (for training).

        Raises:
            CheckpointError: unreadable, or it does not fit this UNet; every missing or unexpected key is named.
        """
        checkpoint = source if isinstance(source, AdapterCheckpoint) else read_adapter(Path(source))
        adapter = cls(
            _empty_processors(unet, has_gate=checkpoint.has_gate),
            load_projection(checkpoint.variant, checkpoint.image_proj),
            checkpoint.variant,
        )
        adapter._load_layers(checkpoint.layers)
        adapter.metadata = checkpoint.metadata
        if adds_gate and not checkpoint.has_gate:
            adapter.add_gate()
        return adapter

    @classmethod
    def fresh(
        cls, unet: UNet2DConditionModel, *, projection: nn.Module, variant: Variant, has_gate: bool = True
    ) -> "MIPAdapter":
        """An untrained adapter: keys and values start from the layer's own for text, the gate at f = 1 everywhere."""
        adapter = cls(_empty_processors(unet, has_gate=False), projection, variant)
        attentions = _cross_attentions(unet)
        for index, processor in adapter.processors.items():
            _, attention = attentions[index]
            assert attention.to_k is not None and attention.to_v is not None
            processor.to_k_ip.weight.data.copy_(attention.to_k.weight)
            processor.to_v_ip.weight.data.copy_(attention.to_v.weight)
        if has_gate:
            adapter.add_gate()
        return adapter

    @property
    def processors(self) -> dict[int, MIPAttnProcessor]:
        """The processors by official index: their position in `unet.attn_processors`."""
        return {int(index): processor for index, processor in self.layers.items()}  # pyright: ignore[reportReturnType]

    @property
    def has_gate(self) -> bool:
        """Whether the layers have `text_to_weight`."""
        return all(processor.text_to_weight is not None for processor in self.processors.values())

    @property
    def is_installed(self) -> bool:
        """Whether the processors are in a UNet now."""
        return bool(self._unet)

    def add_gate(self) -> None:
        """Give every layer without `text_to_weight` one of zeros: f = 1 everywhere, on any machine and seed."""
        for processor in self.processors.values():
            if processor.text_to_weight is None:
                like = processor.to_k_ip.weight
                linear = nn.Linear(like.shape[0], 1, bias=False, device=like.device, dtype=like.dtype)
                nn.init.zeros_(linear.weight)
                processor.text_to_weight = linear

    def install(
        self, unet: UNet2DConditionModel, *, dtype: torch.dtype | None = None, arithmetic: Arithmetic = "fast"
    ) -> "MIPAdapter":
        """Put the processors into the UNet, on its device; self-attention gets one that ignores the references.

        Args:
            unet: of the layout the adapter was built for.
            dtype: cast the processors (not the projection); None keeps theirs, as for training in float32.
            arithmetic: "official" computes in the public code's order of operations, for comparison to the last bit.

        Raises:
            ConfigError: already installed, the UNet has another adapter, or its layers do not fit.
        """
        present = unet.attn_processors
        if self.is_installed or any(isinstance(p, MIPAttnProcessor) for p in present.values()):
            raise ConfigError("got a UNet or an adapter that is already in use; eject the installed adapter first")
        names = {index: name for index, (name, _) in _cross_attentions(unet).items()}
        if names != {index: processor.name for index, processor in self.processors.items()}:
            raise ConfigError("got a UNet with other cross-attention layers than the adapter; build the adapter for it")
        self.layers.to(device=unet.device, dtype=dtype)
        own, plain = {processor.name: processor for processor in self.processors.values()}, PlainAttnProcessor
        if arithmetic == "official":
            own = {name: OfficialAttnProcessor(processor) for name, processor in own.items()}
            plain = OfficialSelfAttnProcessor
        unet.set_attn_processor({name: own.get(name) or plain() for name in present})  # pyright: ignore[reportArgumentType]
        # A list, so that nn.Module does not take the UNet for a part of the adapter.
        self._unet, self._replaced = [unet], present
        return self

    def eject(self) -> None:
        """Put back the very processors that were there before.

        Raises:
            ConfigError: the adapter is not installed.
        """
        if not self.is_installed:
            raise ConfigError("got eject() on an adapter that is not in a UNet; install it first")
        self._unet[0].set_attn_processor(dict(self._replaced))
        self._unet, self._replaced = [], {}

    @contextmanager
    def installed(self, unet: UNet2DConditionModel, *, dtype: torch.dtype | None = None) -> Iterator["MIPAdapter"]:
        """Install for the length of a `with` block."""
        self.install(unet, dtype=dtype)
        try:
            yield self
        finally:
            self.eject()

    @contextmanager
    def ejected(self) -> Iterator[UNet2DConditionModel]:
        """The UNet as it was without the adapter, for the length of a `with` block."""
        (unet,), processors = self._unet, self._unet[0].attn_processors
        unet.set_attn_processor(dict(self._replaced))
        try:
            yield unet
        finally:
            unet.set_attn_processor(processors)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the paper trains: to_k_ip, to_v_ip and text_to_weight of every layer, by index."""
        return [parameter for processor in self.processors.values() for parameter in processor.parameters()]

    def image_tokens(self, features: Tensor) -> Tensor:
        """Project encoder features (..., D) or (..., S, D), as the variant has them, to image tokens (..., R, E).

        Computed in the projection's precision, float32 unless the caller cast it, also under autocast: the resampler
        can overflow in half precision.
        """
        like = next(self.projection.parameters())
        with torch.autocast(like.device.type, enabled=False):
            return self.projection(features.to(like))

    def checkpoint(self, metadata: Mapping[str, str] | None = None) -> AdapterCheckpoint:
        """The present weights, to be saved; shares memory with the adapter."""
        return AdapterCheckpoint(
            image_proj={key: t.detach() for key, t in self.projection.state_dict().items()},
            layers={key: t.detach() for key, t in self.layers.state_dict().items()},
            metadata=metadata or {},
        )

    def _load_layers(self, state: Mapping[str, Tensor]) -> None:
        expected = {key: tuple(t.shape) for key, t in self.layers.state_dict().items()}
        check_tensors(state, expected, "ip_adapter")
        self.layers.load_state_dict(state)  # copies into float32


def _cross_attentions(unet: UNet2DConditionModel) -> dict[int, tuple[str, Attention]]:
    """Processor name and layer of every cross-attention, by official index."""
    found = {}
    for index, name in enumerate(unet.attn_processors):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        assert isinstance(attention, Attention)
        if attention.is_cross_attention:
            found[index] = (name, attention)
            _check_supported(name, attention)
    return found


def _check_supported(name: str, attention: Attention) -> None:
    extras = ("group_norm", "spatial_norm", "norm_cross", "norm_q", "norm_k", "added_kv_proj_dim")
    used = [extra for extra in extras if getattr(attention, extra) is not None]
    if used:
        raise ConfigError(
            f"got {name} with {', '.join(used)}; the adapter is for SDXL's cross-attention, which has none"
        )


def _empty_processors(unet: UNet2DConditionModel, *, has_gate: bool) -> dict[int, MIPAttnProcessor]:
    return {
        index: MIPAttnProcessor(
            name, context_width=attention.cross_attention_dim, channels=attention.inner_dim, has_gate=has_gate
        )
        for index, (name, attention) in _cross_attentions(unet).items()
    }
