"""SDXL's real architecture without its weights: every position and shape of both released adapters."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from benchmarks import full_size
from mip.model.checkpoint import AdapterCheckpoint
from mip.model.references import ReferenceCache, References
from tests.closure import ROOT

ORDER = Path(os.environ.get("MIP_GOLDEN") or ROOT.parent / "shared" / "golden") / "processor_order.json"


@pytest.fixture(scope="module")
def unet():
    with torch.device("meta"):
        return full_size.unet()


@pytest.fixture(scope="module")
def recorded():
    """Position -> processor name."""
    if not ORDER.is_file():
        pytest.skip(f"no golden data: {ORDER} is missing; set MIP_GOLDEN")
    return {int(index): name for index, name in json.loads(ORDER.read_text())["real_sdxl"].items()}


@pytest.mark.parametrize(("variant", "tokens"), [("sdxl", 4), ("sdxl_plus", 16)])
def test_an_adapter_has_the_released_shapes_at_every_position(unet, recorded, variant, tokens):
    with torch.device("meta"):
        adapter = full_size.adapter(variant, unet)
        features = torch.zeros(2, 3, 1280) if variant == "sdxl" else torch.zeros(2, 3, 257, 1280)
        assert adapter.projection(features).shape == (2, 3, tokens, 2048)
    assert {index: layer.name for index, layer in adapter.processors.items()} == {
        index: name for index, name in recorded.items() if "attn2" in name
    }
    for index, layer in adapter.processors.items():
        width = unet.get_submodule(recorded[index].removesuffix(".processor")).to_q.weight.shape[0]
        assert width == (640 if "down_blocks.1" in layer.name or "up_blocks.1" in layer.name else 1280)
        assert layer.to_k_ip.weight.shape == layer.to_v_ip.weight.shape == (width, 2048)
        assert layer.text_to_weight is not None and layer.text_to_weight.weight.shape == (1, width)
    with adapter.installed(unet):
        kinds = [type(processor).__name__ for processor in unet.attn_processors.values()]
        assert kinds == ["PlainAttnProcessor", "MIPAttnProcessor"] * 70


def test_the_variant_is_told_from_the_released_shapes(unet):
    for variant in ("sdxl", "sdxl_plus"):
        with torch.device("meta"):
            projection = full_size.projection(variant).state_dict()
        empty = {key: torch.zeros(t.shape) for key, t in projection.items()}
        found = AdapterCheckpoint(image_proj=empty, layers={"1.to_k_ip.weight": torch.zeros(640, 2048)})
        assert found.variant.name == variant


def test_the_seventy_blocks_compile_into_one_graph_per_width():
    with torch.device("meta"):
        unet = full_size.unet()
        full_size.adapter("sdxl", unet).install(unet)
    torch._dynamo.reset()
    graphs = CompileCounter()
    unet.compile_repeated_blocks(backend=graphs, fullgraph=True)
    for _ in range(2):  # two calls of two steps
        references = _shapes_of_references()
        cache = ReferenceCache(references)
        for _ in range(2):
            _shapes_of_a_step(unet, {"references": references, "reference_cache": cache})
    assert graphs.frame_count == 2
    torch._dynamo.reset()


def _shapes_of_references() -> References:
    """Two references with guidance, without values."""
    with torch.device("meta"):
        references = References(
            image_BNRE=torch.empty(2, 2, 4, full_size.CONTEXT_WIDTH),
            phrase_BNTE=torch.empty(2, 2, 77, full_size.CONTEXT_WIDTH),
            words_BNT=torch.empty(2, 2, 77, dtype=torch.bool),
            present_BN=torch.empty(2, 2, dtype=torch.bool),
            scale_BN=torch.empty(2, 2),
            negatives=1,
        )
        for rows in (references, references.positive):
            # How long the names are is read from values.
            names = torch.empty(rows.batch, 2, 3, full_size.CONTEXT_WIDTH), torch.empty(rows.batch, 2, 3) > 0
            vars(rows)["names"] = names
    return references


def _shapes_of_a_step(unet, cross_attention_kwargs):
    with torch.device("meta"), torch.no_grad():
        conditions = {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)}
        inputs = torch.empty(2, 4, 128, 128), torch.empty(2), torch.empty(2, 77, full_size.CONTEXT_WIDTH)
    with torch.no_grad():
        unet(*inputs, added_cond_kwargs=conditions, cross_attention_kwargs=cross_attention_kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["sdxl", "sdxl_plus"])
@pytest.mark.parametrize("count", [2, 4])
def test_the_whole_model_draws_in_half_precision(variant, count):
    from benchmarks.generate import drawn, toy_tokenizer

    pipe = full_size.of_random_weights(variant, toy_tokenizer(), device="cuda", dtype=torch.float16)
    pipe.mip_adapter = full_size.adapter(variant, pipe.unet).to("cuda").install(pipe.unet, dtype=torch.float16)
    assert bool(drawn(pipe, references=count, size=1024, steps=30).isfinite().all())
