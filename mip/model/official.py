"""The merge in the public code's own order of operations: its float32 results bit for bit, on one thread.

Slower than `mip.model.attention` and without its guards: for comparison with recorded results, not for use. The tiny
network of the golden data turns the rounding of another order into 1e-5; the mathematics is the same.

B batch   N references   R image tokens   T text tokens   Q latent positions   H heads   D head width   C = H * D
X = B * H
"""

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn

from mip.errors import ReferencesError
from mip.model.attention import MIPAttnProcessor
from mip.model.references import ReferenceCache, ReferenceMaps, References


class OfficialSelfAttnProcessor(AttnProcessor):
    """Explicit self-attention that accepts and ignores what is meant for cross-attention."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        references: References | None = None,
        reference_cache: ReferenceCache | None = None,
        reference_maps: ReferenceMaps | None = None,
    ) -> Tensor:
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class OfficialAttnProcessor(MIPAttnProcessor):
    """The processor with these weights (shared, not copied) in the public code's arithmetic."""

    def __init__(self, weights: MIPAttnProcessor) -> None:
        nn.Module.__init__(self)
        self.name = weights.name
        self.to_k_ip, self.to_v_ip, self.text_to_weight = weights.to_k_ip, weights.to_v_ip, weights.text_to_weight
        self._plain = OfficialSelfAttnProcessor()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        references: References | None = None,
        reference_cache: ReferenceCache | None = None,
        reference_maps: ReferenceMaps | None = None,
    ) -> Tensor:
        """As MIPAttnProcessor's; only what the public code can do.

        Raises:
            ReferencesError: a plain IP-Adapter, another merge than "weighted", regions, absent references, a mask, or a
                recorder of maps.
        """
        if references is None or references.count == 0:
            return self._plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        rows = references.rows(hidden_states.shape[0])
        self._check(rows)
        if attention_mask is not None or reference_maps is not None:
            raise ReferencesError('got a mask of the prompt or a recorder of maps; use arithmetic="fast" for these')
        assert encoder_hidden_states is not None and attn.to_k is not None and attn.to_v is not None
        assert attn.to_out is not None and self.text_to_weight is not None
        q_XQD = attn.head_to_batch_dim(attn.to_q(hidden_states))

        def attend(k_BTC: Tensor, v_BTC: Tensor) -> Tensor:
            k_XTD, v_XTD = attn.head_to_batch_dim(k_BTC), attn.head_to_batch_dim(v_BTC)
            return attn.batch_to_head_dim(attn.get_attention_scores(q_XQD, k_XTD) @ v_XTD)

        text_BQC = attend(attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        slots = range(rows.count)
        image_BNQC = torch.stack(
            [attend(self.to_k_ip(rows.image_BNRE[:, n]), self.to_v_ip(rows.image_BNRE[:, n])) for n in slots], dim=1
        )
        mass_BNQ = torch.stack(
            [_mass(attn, q_XQD, attn.to_k(rows.phrase_BNTE[:, n]), rows.words_BNT[:, n]) for n in slots], dim=1
        )
        relevance_BNQ = mass_BNQ / mass_BNQ.sum(dim=1, keepdim=True)
        gate_BQ1 = torch.sigmoid(self.text_to_weight(text_BQC))
        gate_BQ1 = gate_BQ1 / gate_BQ1.mean(dim=1, keepdim=True)
        weight_BNQ1 = relevance_BNQ[..., None] * gate_BQ1[:, None]
        scaled_BNQC = rows.scale_BN[:, :, None, None].to(image_BNQC) * image_BNQC
        out_BQC = attn.to_out[1](attn.to_out[0](text_BQC + (scaled_BNQC * weight_BNQ1).sum(dim=1)))
        return (out_BQC + hidden_states if attn.residual_connection else out_BQC) / attn.rescale_output_factor

    def _check(self, rows: References) -> None:
        if rows.merge != "weighted" or not rows.is_gated or self.text_to_weight is None:
            raise ReferencesError('got a merge that the public code lacks; with arithmetic="official" use its own')
        if rows.regions_BNHW is not None or rows.oracle_BNHW is not None or not bool(rows.present_BN.all()):
            raise ReferencesError(
                'got regions or rows with fewer references, which the public code lacks; use arithmetic="fast"'
            )


def _mass(attn: Attention, q_XQD: Tensor, k_BTC: Tensor, words_BT: Tensor) -> Tensor:
    """M of one reference: (B, Q), a softmax over positions averaged over heads, then over the name's tokens."""
    map_XTQ = attn.get_attention_scores(attn.head_to_batch_dim(k_BTC), q_XQD)
    map_BTQ = map_XTQ.unflatten(0, (-1, attn.heads)).mean(dim=1)
    return torch.stack([map_TQ[words_T].mean(dim=0) for map_TQ, words_T in zip(map_BTQ, words_BT, strict=True)])
