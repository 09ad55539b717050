"""Cross-attention that merges several reference images, position by position.

B batch   N references   R image tokens per reference   T text tokens   W name tokens   Q latent positions
H heads   D head width   C channels = H * D             E context width
X = N * R image tokens of all references, one after the other

The equations are those of MIP-Adapter (arXiv 2409.17920) as its released weights expect them. Both quotients are
computed as a softmax of logarithms in at least float32, so that no denominator can underflow and no epsilon is needed.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from mip.errors import ReferencesError
from mip.model.references import ReferenceCache, ReferenceMaps, References


def log_word_maps(q_BHQD: Tensor, k_BNHWD: Tensor, words_BNW: Tensor) -> Tensor:
    """log of M: how the attention of each name spreads over the image.

    Args:
        q_BHQD: queries of the layer.
        k_BNHWD: keys of the names' tokens, by the layer's own text projection.
        words_BNW: bool, True on the tokens to average; at least one per reference.

    Returns:
        log_map_BNQ, float32 (float64 for float64 queries); exp of it sums to 1 over Q.
    """
    wide = torch.promote_types(q_BHQD.dtype, torch.float32)
    # Scaling before the product keeps half-precision logits in range; there are far fewer keys than queries.
    logits_BNHWQ = torch.einsum("bhqd,bnhwd->bnhwq", q_BHQD, k_BNHWD * q_BHQD.shape[-1] ** -0.5)
    # Softmax over positions, not words: each word spreads one unit of mass over the image.
    log_maps_BNHWQ = logits_BNHWQ.to(wide).log_softmax(dim=-1)
    log_maps_BNHWQ = log_maps_BNHWQ.masked_fill(~words_BNW[:, :, None, :, None], -torch.inf)
    averaged_BN = words_BNW.sum(dim=-1) * q_BHQD.shape[1]
    return log_maps_BNHWQ.logsumexp(dim=(2, 3)) - averaged_BN.to(wide).log()[:, :, None]


def relevance(log_map_BNQ: Tensor, log_prior_BNQ: Tensor) -> Tensor:
    """A: how strongly each position belongs to each reference.

    Args:
        log_map_BNQ: log of M.
        log_prior_BNQ: log of the weight that multiplies M; -inf forbids a reference. Q may be 1.

    Returns:
        A_BNQ; sums to 1 over references, to 0 where every reference is forbidden.
    """
    logits_BNQ = log_map_BNQ + log_prior_BNQ
    nowhere_B1Q = (logits_BNQ == -torch.inf).all(dim=1, keepdim=True)
    return logits_BNQ.masked_fill(nowhere_B1Q, 0).softmax(dim=1).masked_fill(nowhere_B1Q, 0)


def gate(logits_BQ: Tensor) -> Tensor:
    """f: sigmoid of the logits, divided by its mean over positions; the result has mean 1 and is at least float32."""
    wide_BQ = logits_BQ.to(torch.promote_types(logits_BQ.dtype, torch.float32))
    return F.logsigmoid(wide_BQ).softmax(dim=-1) * logits_BQ.shape[-1]


def attend_weighted(q_BHQD: Tensor, k_BHXD: Tensor, v_BHXD: Tensor, weight_BNQ: Tensor) -> Tensor:
    """Attention to the image tokens of each reference on its own, summed with a weight at every position: BHQD.

    The weights enter before the product with the values: one product for all references, and no features of each.
    """
    logits_BHQX = q_BHQD @ (k_BHXD * q_BHQD.shape[-1] ** -0.5).mT
    share_BHQNR = logits_BHQX.unflatten(-1, (weight_BNQ.shape[1], -1)).softmax(dim=-1)
    weighted_BHQNR = share_BHQNR * weight_BNQ.mT[:, None, :, :, None].to(share_BHQNR.dtype)
    return weighted_BHQNR.flatten(-2) @ v_BHXD


def attend_together(q_BHQD: Tensor, k_BHXD: Tensor, v_BHXD: Tensor, log_prior_BNQ: Tensor) -> Tensor:
    """Attention to the image tokens of all references in one softmax (plain IP-Adapter): BHQD.

    The prior is added to the logits of a reference's tokens; where all are forbidden the result is 0.
    """
    nowhere_B1Q = (log_prior_BNQ == -torch.inf).all(dim=1, keepdim=True)
    bias_BNQ = log_prior_BNQ.masked_fill(nowhere_B1Q, 0).to(q_BHQD.dtype)
    # (B, 1, Q, X): the same for all heads.
    bias = bias_BNQ.mT[:, None].repeat_interleave(k_BHXD.shape[2] // bias_BNQ.shape[1], dim=-1)
    images_BHQD = F.scaled_dot_product_attention(q_BHQD, k_BHXD, v_BHXD, attn_mask=bias)
    return images_BHQD.masked_fill(nowhere_B1Q[..., None], 0)


@dataclass(frozen=True, eq=False)
class LayerReferences:
    """What one layer makes of the references; the same at every step."""

    k_BHXD: Tensor
    v_BHXD: Tensor
    word_k_BNHWD: Tensor
    words_BNW: Tensor
    log_prior_BNQ: Tensor


class PlainAttnProcessor(AttnProcessor2_0):
    """The stock processor, for self-attention: accepts and ignores what is meant for cross-attention.

    diffusers reads the parameter names of `__call__` and warns at every call about those it does not find.
    """

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


class MIPAttnProcessor(nn.Module):
    """Cross-attention to the text plus the merged references; stateless but for its weights.

    Args:
        name: diffusers' name of the processor; keys the cache and the recorded maps.
        context_width: E.
        channels: C.
        has_gate: False for a plain IP-Adapter, which has no `text_to_weight`; then f = 1.
    """

    def __init__(self, name: str, *, context_width: int, channels: int, has_gate: bool) -> None:
        super().__init__()
        self.name = name
        # These three names are fixed by the published checkpoints.
        self.to_k_ip = nn.Linear(context_width, channels, bias=False)
        self.to_v_ip = nn.Linear(context_width, channels, bias=False)
        self.text_to_weight = nn.Linear(channels, 1, bias=False) if has_gate else None
        self._plain = PlainAttnProcessor()

    # diffusers inspects the signature of `__call__`, so this is not called `forward`.
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
        """Attend from hidden_states (B, Q, C) to encoder_hidden_states (B, T, E) and to the references.

        Without references the result is that of the stock processor, bit for bit; so it is in every row of a batch
        that has no present reference.

        Raises:
            ReferencesError: references that do not fit the batch or the layer.
        """
        if references is None or references.count == 0:
            return self._plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if encoder_hidden_states is None or hidden_states.ndim != 3:
            raise ReferencesError(
                "got references in a layer that is not SDXL cross-attention; install on its UNet only"
            )

        if torch.compiler.is_compiling():
            # Looking into the cache would break the graph. Built anew, the few tokens cost little beside the positions.
            reference_cache = None
        # In one piece: each product with it would else make its own copy.
        q_BHQD = _split_heads(attn.to_q(hidden_states), attn.heads).contiguous()
        rows = references.rows(hidden_states.shape[0])
        layer = self._prepare(attn, references, rows, reference_cache, q_BHQD.shape[2])
        k_BHTD, v_BHTD = self._text(attn, encoder_hidden_states, reference_cache)
        text_BQC = _join_heads(_attend_text(attn, q_BHQD, k_BHTD, v_BHTD, attention_mask))
        recorder = reference_maps if reference_maps is not None and reference_maps.wants(self.name) else None
        merged_BHQD = self._merged(q_BHQD, text_BQC, rows, layer, recorder).to(text_BQC.dtype)
        del q_BHQD  # as large as the result; nothing needs it from here on
        total_BQC = _added(text_BQC, merged_BHQD)
        return _output(attn, total_BQC, residual_BQC=hidden_states)

    def _prepare(
        self,
        attn: Attention,
        references: References,
        rows: References,
        cache: ReferenceCache | None,
        positions: int,
    ) -> LayerReferences:
        def build() -> LayerReferences:
            # An absent slot may hold anything: 0 * nan would not be 0.
            image_BXE = rows.image_BNRE.masked_fill(~rows.present_BN[:, :, None, None], 0).flatten(1, 2)
            phrase_BNWE, words_BNW = rows.names
            phrase_BNWE = phrase_BNWE.masked_fill(~rows.present_BN[:, :, None, None], 0)
            return LayerReferences(
                k_BHXD=_split_heads(self.to_k_ip(image_BXE), attn.heads),
                v_BHXD=_split_heads(self.to_v_ip(image_BXE), attn.heads),
                word_k_BNHWD=_text_keys(attn, phrase_BNWE),
                words_BNW=words_BNW,
                log_prior_BNQ=rows.log_prior(positions),
            )

        return build() if cache is None else cache.get((self.name, rows.batch, positions), references, build)

    def _text(self, attn: Attention, context_BTE: Tensor, cache: ReferenceCache | None) -> tuple[Tensor, Tensor]:
        """The layer's own keys and values of the prompt."""

        def build() -> tuple[Tensor, Tensor]:
            assert attn.to_v is not None
            return _text_keys(attn, context_BTE), _split_heads(attn.to_v(context_BTE), attn.heads)

        return build() if cache is None else cache.get_of_text(self.name, context_BTE, build)

    def _merged(
        self,
        q_BHQD: Tensor,
        text_BQC: Tensor,
        rows: References,
        layer: LayerReferences,
        recorder: ReferenceMaps | None,
    ) -> Tensor:
        log_map_BNQ = _log_map(q_BHQD, layer, recorder) if rows.uses_words or recorder is not None else None
        relevance_BNQ = None if rows.merge == "concat" else _weights(rows, layer, log_map_BNQ, q_BHQD.shape[2])
        if recorder is not None and log_map_BNQ is not None:
            mass_BNQ = log_map_BNQ.exp().masked_fill(~rows.present_BN[:, :, None], 0)
            recorder.add(self.name, mass_BNQ, relevance_BNQ)

        scale_BN = rows.scale_BN.masked_fill(~rows.present_BN, 0)
        if relevance_BNQ is None:
            scale_BX = scale_BN.repeat_interleave(rows.image_BNRE.shape[2], dim=1)
            v_BHXD = layer.v_BHXD * scale_BX[:, None, :, None].to(layer.v_BHXD.dtype)
            return attend_together(q_BHQD, layer.k_BHXD, v_BHXD, layer.log_prior_BNQ)
        weight_BNQ = relevance_BNQ * scale_BN[:, :, None]
        if rows.merge == "weighted" and rows.is_gated and self.text_to_weight is not None:
            weight_BNQ = weight_BNQ * gate(self.text_to_weight(text_BQC).squeeze(-1))[:, None]
        return attend_weighted(q_BHQD, layer.k_BHXD, layer.v_BHXD, weight_BNQ)


def _log_map(q_BHQD: Tensor, layer: LayerReferences, recorder: ReferenceMaps | None) -> Tensor:
    # The paper lets no gradient through the map; a recorder may want it for a loss of its own.
    keeps_graph = torch.is_grad_enabled() and recorder is not None and recorder.has_gradient
    with torch.set_grad_enabled(keeps_graph):
        return log_word_maps(q_BHQD, layer.word_k_BNHWD, layer.words_BNW)


def _weights(rows: References, layer: LayerReferences, log_map_BNQ: Tensor | None, positions: int) -> Tensor:
    """A_BNQ; without word maps (mean, oracle) only the prior decides."""
    if log_map_BNQ is None or not rows.uses_words:
        log_map_BNQ = torch.zeros_like(rows.scale_BN)[:, :, None].expand(-1, -1, positions)
    return relevance(log_map_BNQ.detach(), layer.log_prior_BNQ)


def _added(text_BQC: Tensor, merged_BHQD: Tensor) -> Tensor:
    """Their sum, BQC; in the text's own memory where no gradient needs it."""
    heads = merged_BHQD.shape[1]
    text_BQHD, merged_BQHD = text_BQC.unflatten(-1, (heads, -1)), merged_BHQD.transpose(1, 2)
    total_BQHD = text_BQHD + merged_BQHD if torch.is_grad_enabled() else text_BQHD.add_(merged_BQHD)
    return total_BQHD.flatten(2)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """(..., L, C) -> (..., H, L, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def _join_heads(x: Tensor) -> Tensor:
    """(..., H, L, D) -> (..., L, C)."""
    return x.transpose(-3, -2).flatten(-2)


def _text_keys(attn: Attention, context: Tensor) -> Tensor:
    """(..., T, E) -> (..., H, T, D)."""
    assert attn.to_k is not None  # only layers with added projections lack it; the adapter refuses those
    return _split_heads(attn.to_k(context), attn.heads)


def _attend_text(attn: Attention, q_BHQD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, mask: Tensor | None) -> Tensor:
    # The same operations as the stock processor, so that absent references leave its very bits.
    if mask is not None:
        batch, tokens = k_BHTD.shape[0], k_BHTD.shape[2]
        mask = attn.prepare_attention_mask(mask, tokens, batch)
        mask = mask.view(batch, attn.heads, -1, mask.shape[-1])
    return F.scaled_dot_product_attention(q_BHQD, k_BHTD, v_BHTD, attn_mask=mask).to(q_BHQD.dtype)


def _output(attn: Attention, merged_BQC: Tensor, *, residual_BQC: Tensor) -> Tensor:
    out_BQC = attn.to_out[1](attn.to_out[0](merged_BQC))  # pyright: ignore[reportOptionalSubscript]
    if attn.residual_connection:
        out_BQC = out_BQC + residual_BQC
    return out_BQC / attn.rescale_output_factor
