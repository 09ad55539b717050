"""Where each reference acted: relevance kept as means, so that nothing grows with steps or layers.

B images   N references   H, W latent height and width   Q latent positions of a layer
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers.pipelines.stable_diffusion_xl.pipeline_output import StableDiffusionXLPipelineOutput
from torch import Tensor

from mip.model.references import ReferenceMaps, layer_grid


@dataclass(frozen=True, eq=False)
class RelevanceMaps:
    """The relevance of one image's references, float32 on the CPU at the latent size.

    At every position it sums to 1 over the references, on the background too. It is 0 where none may act: outside all
    regions, or when no step had references.
    """

    names: tuple[str, ...]
    """The references' names, in the order that was given."""
    mean_NHW: Tensor
    """Mean over all layers and steps."""
    blocks: Mapping[str, Tensor]
    """The same within each block of the UNet that attends to text, e.g. "mid_block" or "up_blocks.0"."""


@dataclass
class MIPAdapterXLPipelineOutput(StableDiffusionXLPipelineOutput):
    """The parent's output, with the maps of each image if they were asked for."""

    maps: list[RelevanceMaps] | None = None


@dataclass(eq=False)
class MeanRelevance(ReferenceMaps):
    """Records the means alone, of the positive rows of guidance."""

    latent_size: tuple[int, int] = (0, 0)
    rows: int = 0
    """Number of images B: the last rows of a UNet batch."""
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def add(self, layer: str, mass_BNQ: Tensor, relevance_BNQ: Tensor | None) -> None:
        """Add the maps of one pass through a layer."""
        if relevance_BNQ is None:
            return
        own_BNQ = relevance_BNQ[-self.rows :]
        own_BNHW = own_BNQ.unflatten(-1, layer_grid(self.latent_size, own_BNQ.shape[-1]))
        own_BNHW = F.interpolate(own_BNHW, size=self.latent_size, mode="bilinear")
        block = _block(layer)
        self._sums[block] = self._sums[block] + own_BNHW if block in self._sums else own_BNHW
        self._counts[block] = self._counts.get(block, 0) + 1

    def of_images(self, names: Sequence[Sequence[str]]) -> list[RelevanceMaps]:
        """The maps of each image; `names` are those of its references."""
        sums = {block: sum_BNHW.cpu() for block, sum_BNHW in self._sums.items()}
        maps = []
        for row, own_names in enumerate(names):
            own = {block: sum_BNHW[row, : len(own_names)] for block, sum_BNHW in sums.items()}
            total_NHW = sum(own.values(), torch.zeros(len(own_names), *self.latent_size))
            blocks = {block: sum_NHW / self._counts[block] for block, sum_NHW in own.items()}
            maps.append(RelevanceMaps(tuple(own_names), total_NHW / max(sum(self._counts.values()), 1), blocks))
        return maps


def _block(layer: str) -> str:
    """ "up_blocks.0" of "up_blocks.0.attentions.1.transformer_blocks.0.attn2.processor"."""
    found = re.match(r"(down_blocks|up_blocks)\.\d+|mid_block", layer)
    return found.group() if found else layer
