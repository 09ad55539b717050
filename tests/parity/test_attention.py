"""One attention layer against the official code."""

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from mip.model.attention import MIPAttnProcessor, gate
from mip.model.official import OfficialAttnProcessor
from mip.model.references import ReferenceMaps
from tests.parity.golden import Case, Ledger, references_of

TOLERANCE = 1e-5


@pytest.fixture
def layer(attention_case: Case) -> tuple[Attention, MIPAttnProcessor]:
    """The recorded layer with our processor."""
    sizes, tensors = attention_case.params, attention_case.tensors
    attention = Attention(
        query_dim=sizes["hidden_size"],
        cross_attention_dim=sizes["cross_attention_dim"],
        heads=sizes["heads"],
        dim_head=sizes["dim_head"],
        residual_connection=sizes["residual_connection"],
        out_bias=sizes["to_out_has_bias"],
    )
    processor = MIPAttnProcessor(
        "layer", context_width=sizes["cross_attention_dim"], channels=sizes["hidden_size"], has_gate=True
    )
    for prefix, module in (("attn.", attention), ("proc.", processor)):
        module.load_state_dict({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
    attention.set_processor(processor)  # pyright: ignore[reportArgumentType]
    return attention.requires_grad_(False), processor.requires_grad_(False)


def run(layer: Attention, case: Case, **options: Any) -> Tensor:
    tensors = case.tensors
    references = references_of(
        tensors["ip_tokens"], tensors["entity_text_embeds"], tensors["entity_token_lens"], scale=case.params["scale"]
    )
    return layer(
        tensors["hidden_states"], encoder_hidden_states=tensors["text_embeds"], references=references, **options
    )


def test_a_layer_gives_the_recorded_output(layer, attention_case: Case, ledger: Ledger):
    ledger.compare(attention_case, "output", run(layer[0], attention_case), atol=TOLERANCE)


def test_official_arithmetic_gives_the_recorded_output(layer, attention_case: Case, ledger: Ledger):
    attention, processor = layer
    attention.set_processor(OfficialAttnProcessor(processor))
    # The same operations in the same order: only the kernels of another processor may round otherwise.
    ledger.compare(attention_case, "output", run(attention, attention_case), atol=1e-6, label=" (official)")


def test_a_layer_gives_the_recorded_relevance_and_gate(layer, attention_case: Case, ledger: Ledger):
    attention, processor = layer
    maps, seen = ReferenceMaps(), {}
    processor.text_to_weight.register_forward_hook(
        lambda module, args, output: seen.update(text=args[0], logits=output)
    )
    run(attention, attention_case, reference_maps=maps)
    relevance_BNQ, gate_BQ = maps.relevance["layer"][0], gate(seen["logits"].squeeze(-1))
    ledger.compare(attention_case, "mid.object_map", relevance_BNQ, atol=TOLERANCE)
    ledger.compare(attention_case, "mid.text_out", seen["text"], atol=TOLERANCE)
    ledger.compare(attention_case, "mid.text_weight", gate_BQ, atol=TOLERANCE)
    ledger.compare(attention_case, "mid.object_weight", relevance_BNQ * gate_BQ[:, None], atol=TOLERANCE)


def test_a_layer_in_float64_stays_near_the_record(layer, attention_case: Case, ledger: Ledger):
    attention, processor = layer
    processor.double()
    tensors = {name: t.double() if t.is_floating_point() else t for name, t in attention_case.tensors.items()}
    references = references_of(
        tensors["ip_tokens"],
        tensors["entity_text_embeds"],
        tensors["entity_token_lens"],
        scale=attention_case.params["scale"],
    )
    output = attention.double()(
        tensors["hidden_states"], encoder_hidden_states=tensors["text_embeds"], references=references
    )
    ledger.compare(attention_case, "output", output, atol=TOLERANCE, label=" (float64)")


def test_relevance_sums_to_one_and_equal_names_share_it_equally(layer, attention_case: Case):
    maps = ReferenceMaps()
    run(layer[0], attention_case, reference_maps=maps)
    relevance_BNQ = maps.relevance["layer"][0]
    torch.testing.assert_close(relevance_BNQ.sum(dim=1), torch.ones_like(relevance_BNQ[:, 0]))
    given = [attention_case.tensors[name] for name in ("entity_text_embeds", "entity_token_lens")]
    count = relevance_BNQ.shape[1]
    if all(torch.equal(t[:, 0], t[:, n]) for t in given for n in range(count)):
        assert torch.equal(relevance_BNQ, torch.full_like(relevance_BNQ, 1 / count))
