"""The loss that makes the base localise words: without it, a base this small attends everywhere to every name.

It supervises the very weight that MIP-Adapter's merge computes, with the masks that the renderer knows. Real SDXL was
never helped like this; wherever the toybox's results are shown, this is said.
"""

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor

from mip.model.attention import log_word_maps


class GroundedProcessor:
    """Explicit attention, which also appends log M of every name to `log_maps` (with gradient) in cross-attention.

    At 64 to 256 positions the fused kernel's backward pass is slower than this by a third of a training step.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        name_BNE: Tensor | None = None,
        log_maps: list[Tensor] | None = None,
    ) -> Tensor:
        assert attn.to_k is not None and attn.to_v is not None and attn.to_out is not None
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q_BHQD, k_BHTD, v_BHTD = (
            projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projected in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        if encoder_hidden_states is not None and name_BNE is not None and log_maps is not None:
            k_BNH1D = attn.to_k(name_BNE).unflatten(-1, (attn.heads, -1))[:, :, :, None]
            log_maps.append(log_word_maps(q_BHQD, k_BNH1D, torch.ones_like(name_BNE[:, :, :1], dtype=torch.bool)))
        weight_BHQT = (q_BHQD * attn.scale @ k_BHTD.mT).softmax(dim=-1)
        return attn.to_out[0]((weight_BHQT.to(v_BHTD.dtype) @ v_BHTD).transpose(1, 2).flatten(2))


def grounding_loss(log_map_BNQ: Tensor, owner_BNHW: Tensor, weight_B: Tensor) -> Tensor:
    """How far the merge weights are from the objects' masks.

    Args:
        log_map_BNQ: log M of each name; M sums to 1 over positions.
        owner_BNHW: 1 inside the n-th object's mask, else 0; all zero where there is no n-th object.
        weight_B: weight of each row (of its noise level).

    Returns:
        -log(M_own / sum_j M_j), averaged over positions inside the objects, plus half of -log(mass of M_own inside
        its mask). The cross-entropy over OBJECTS is what separates them; the mass term alone only separates them from
        the background.
    """
    side = round(log_map_BNQ.shape[-1] ** 0.5)
    inside_BNQ = F.adaptive_avg_pool2d(owner_BNHW, side).flatten(2)
    present_BN = owner_BNHW.amax(dim=(2, 3)) > 0
    log_map_BNQ = log_map_BNQ.masked_fill(~present_BN[:, :, None], -1e4)
    log_share_BNQ = log_map_BNQ.log_softmax(dim=1)
    between_B = -(log_share_BNQ * inside_BNQ).sum(dim=(1, 2)) / inside_BNQ.sum(dim=(1, 2)).clamp(min=1e-6)
    covered_BNQ = (inside_BNQ > 0.25).float() + 1e-9
    mass_BN = -(log_map_BNQ + covered_BNQ.log()).logsumexp(dim=-1)
    mass_B = (mass_BN * present_BN).sum(dim=1) / present_BN.sum(dim=1).clamp(min=1)
    return ((between_B + 0.5 * mass_B) * weight_B).mean()


def localisation(log_map_BNQ: Tensor, owner_BNHW: Tensor) -> Tensor:
    """The own name's share inside its object's mask, averaged over objects: (B,); chance is 1 / N."""
    side = round(log_map_BNQ.shape[-1] ** 0.5)
    inside_BNQ = F.adaptive_avg_pool2d(owner_BNHW, side).flatten(2)
    present_BN = owner_BNHW.amax(dim=(2, 3)) > 0
    share_BNQ = log_map_BNQ.masked_fill(~present_BN[:, :, None], -1e4).softmax(dim=1)
    own_BN = (share_BNQ * inside_BNQ).sum(dim=2) / inside_BNQ.sum(dim=2).clamp(min=1e-6)
    return (own_BN * present_BN).sum(dim=1) / present_BN.sum(dim=1).clamp(min=1)
