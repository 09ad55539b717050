"""Word localisation on any SDXL pipeline: chance for equal names, order, and no trace of the measurement."""

import numpy as np
import pytest
import torch
from PIL import Image

from mip.evaluation.words import Pictured, mean_of_layers, word_localisation


@pytest.fixture
def pipe(build_pipeline):
    return build_pipeline()


def _pictures(names: list[str]) -> list[Pictured]:
    masks_NYX = np.zeros((2, 16, 16), bool)
    masks_NYX[0, :, :6], masks_NYX[1, :, 10:] = True, True
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    return [Pictured(image, "a cat and a dog", names, masks_NYX)]


def test_equal_names_are_at_chance_in_every_layer(pipe):
    found = word_localisation(pipe, _pictures(["cat", "cat"]), levels=(100, 900), seed=0)
    assert list(found) == [100, 900]
    assert all(value == pytest.approx(0.5) for layers in found.values() for value in layers.values())
    assert mean_of_layers(found) == {100: pytest.approx(0.5), 900: pytest.approx(0.5)}


def test_every_cross_attention_layer_is_measured(pipe):
    layers = word_localisation(pipe, _pictures(["cat", "dog"]), levels=(500,), seed=0)[500]
    attended = {n.split(".transformer_blocks")[0] for n in pipe.unet.attn_processors if "attn2" in n}
    assert set(layers) == attended


def test_exchanging_names_exchanges_right_and_wrong(pipe):
    right, wrong = (
        word_localisation(pipe, _pictures(names), levels=(500,), seed=0)[500]
        for names in (["cat", "dog"], ["dog", "cat"])
    )
    assert any(abs(value - 0.5) > 1e-4 for value in right.values())
    assert all(right[layer] + wrong[layer] == pytest.approx(1, abs=1e-5) for layer in right)


def test_the_pipeline_is_left_as_it_was(pipe):
    before = pipe.unet.attn_processors
    word_localisation(pipe, _pictures(["cat", "dog"]), levels=(500,), seed=0)
    assert pipe.unet.attn_processors == before
    assert not any(isinstance(p, torch.nn.Module) for p in before.values())
