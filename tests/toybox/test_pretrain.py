"""Pieces of the base's training that a wrong sign or a wrong axis would spoil without a word."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTokenizer

from mip.toybox.pretrain import denoiser, plain_adapter, text
from mip.toybox.pretrain.grounding import GroundedProcessor, grounding_loss, localisation
from mip.toybox.pretrain.optimizer import Muon, orthogonalised
from mip.toybox.pretrain.scenery import scenery
from mip.toybox.pretrain.vision import palette
from mip.toybox.pretrain.workers import ALONE, Workers
from mip.toybox.scenes import COLOURS, PATTERNS, Identity, dress, shows_secondary
from tests.closure import ROOT


def _own_BNHW() -> torch.Tensor:
    own_BNHW = torch.zeros(1, 3, 8, 8)
    own_BNHW[0, 0, :, :3], own_BNHW[0, 1, :, 5:] = 1, 1
    return own_BNHW


def test_grounding_is_best_where_each_name_lies_on_its_own_object():
    own_BNHW = _own_BNHW()
    right_BNQ = (own_BNHW.flatten(2) + 1e-4).log().log_softmax(dim=-1)
    flat_BNQ, wrong_BNQ = torch.zeros(1, 3, 64).log_softmax(dim=-1), right_BNQ[:, [1, 0, 2]]
    losses = [float(grounding_loss(m, own_BNHW, torch.ones(1))) for m in (right_BNQ, flat_BNQ, wrong_BNQ)]
    assert losses == sorted(losses) and losses[0] < 0.01 < losses[1]
    shares = [float(localisation(m, own_BNHW)) for m in (right_BNQ, flat_BNQ, wrong_BNQ)]
    assert shares == pytest.approx([1, 0.5, 0], abs=0.01)


def test_the_grounded_processor_attends_as_the_stock_one():
    torch.manual_seed(0)
    layer = Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4)
    hidden_BQC, text_BTE, maps = torch.randn(2, 16, 8), torch.randn(2, 5, 6), []
    layer.set_processor(AttnProcessor2_0())  # pyright: ignore[reportArgumentType]
    stock_BQC = layer(hidden_BQC, text_BTE)
    layer.set_processor(GroundedProcessor())  # pyright: ignore[reportArgumentType]
    grounded_BQC = layer(hidden_BQC, text_BTE, name_BNE=torch.randn(2, 3, 6), log_maps=maps)
    torch.testing.assert_close(grounded_BQC, stock_BQC)
    torch.testing.assert_close(maps[0].exp().sum(dim=-1), torch.ones(2, 3))


class _Halves(Workers):
    """Two workers in one process: what the other one would have sent is added."""

    def add_up(self, tensors: list[torch.Tensor]) -> None:
        sent.setdefault(self.rank, [t.clone() for t in tensors])
        for mine, other in zip(tensors, sent.get(1 - self.rank, tensors), strict=True):
            mine += other if 1 - self.rank in sent else 0


sent: dict[int, list[torch.Tensor]] = {}


def test_workers_share_the_orthogonalisation_and_step_alike():
    torch.manual_seed(0)
    start = [torch.randn(6, 4), torch.randn(3, 8), torch.randn(4, 4)]
    gradients = [torch.randn_like(t) for t in start]

    def stepped(workers: Workers) -> list[torch.Tensor]:
        parameters = [nn.Parameter(t.clone()) for t in start]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        Muon(parameters, lr=0.1, workers=workers).step()
        return [p.detach() for p in parameters]

    alone = stepped(Workers(0, 1))
    sent.clear()
    stepped(_Halves(1, 2))  # fills in what the second worker sends
    together = stepped(_Halves(0, 2))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_an_orthogonalised_update_has_singular_values_near_1():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalised(torch.randn(8, 20)))
    assert 0.5 < values.min() and values.max() < 1.5


@pytest.mark.parametrize("folder", ["tokenizer", "tokenizer_2"])
def test_the_shipped_tokenizers_are_those_that_would_be_made(folder):
    shipped = CLIPTokenizer.from_pretrained(ROOT / "data" / "toybox" / "base" / "pipeline" / folder)
    made = text.tokenizer()
    assert shipped.model_max_length == made.model_max_length
    assert shipped.backend_tokenizer.to_str() == made.backend_tokenizer.to_str()


def test_a_round_starts_from_the_files_of_the_one_before(tmp_path: Path):
    base = ROOT / "data" / "toybox" / "base"
    shipped = StableDiffusionXLPipeline.from_pretrained(base / "pipeline", dtype=torch.float32)
    scenes = scenery(tmp_path / "scenes", seed=1, count=2)
    rates: dict[str, Any] = {"seed": 0, "steps": 0, "batch": 2, "lr": 1.0, "workers": ALONE}
    files = {"start": base / "pipeline", "state": tmp_path / "state"}
    begun = denoiser.train(scenes, shipped.vae, tmp_path, grounding=0.2, **files, **rates)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for key, weight in getattr(shipped, part).state_dict().items():
            assert torch.equal(getattr(begun, part).state_dict()[key], weight), key

    before, after = base / "ip_adapter" / "ip-adapter_toybox.safetensors", tmp_path / "adapter.safetensors"
    encoder: Any = None  # no step needs one
    plain_adapter.train(shipped, encoder, scenes, np.empty(0), after, variant="sdxl", start=before, **rates)
    one, other = load_file(before), load_file(after)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_captions_of_the_base_name_classes_always_and_looks_mostly(tmp_path: Path):
    scenes = scenery(tmp_path, seed=1, count=60, workers=1)
    words, colours = text.tokenizer(), set(COLOURS)
    assert not any(colours & set(caption.split()) for caption in scenes.captions)
    assert np.mean([bool(colours & set(caption.split())) for caption in scenes.described]) > 0.6
    longest = max(len(words(caption).input_ids) for caption in scenes.described)
    assert longest <= text.LENGTH
    again = scenery(tmp_path, seed=1, count=60, workers=1)
    assert again.described == scenes.described and np.array_equal(again.image_NHWC, scenes.image_NHWC)


def test_a_noun_phrase_tells_what_can_be_seen():
    assert dress("ball", "red", "red", "plain") == "red ball"
    assert dress("house", "red", "blue", "plain") == "red and blue house"
    assert dress("ball", "red", "blue", "dots") == "red ball with blue dots"
    assert not shows_secondary("ball", Identity("red", "blue", "plain", 1.0))
    assert shows_secondary("house", Identity("red", "blue", "plain", 1.0))
    assert shows_secondary("ball", Identity("red", "blue", "stripes", 1.0))


def test_palettes_are_the_nearer_the_more_they_share():
    red, orange, yellow = range(3)
    stripes, dots = PATTERNS.index("stripes"), PATTERNS.index("dots")

    def likeness(one: tuple[int, ...], other: tuple[int, ...]) -> float:
        return float(np.sqrt(palette(np.array(one, np.int8))) @ np.sqrt(palette(np.array(other, np.int8))))

    same = likeness((0, red, orange, stripes), (1, red, orange, stripes))
    shared = likeness((0, red, orange, stripes), (0, red, yellow, stripes))
    foreign = likeness((0, red, orange, stripes), (0, 5, 6, dots))
    assert same == pytest.approx(1) and foreign == pytest.approx(0) and 0.4 < shared < 0.7
