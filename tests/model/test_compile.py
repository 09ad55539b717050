"""A compiled UNet draws the same in unbroken graphs, and compiles nothing anew from step to step or call to call.

The compiler's "eager" backend traces as any other and leaves out what takes long: making machine code.
"""

import pytest
import torch
from diffusers.callbacks import SDXLCFGCutoffCallback
from torch._dynamo.testing import CompileCounter

from mip.model.request import Reference

PROMPT = "a cat, a dog, a red hat"


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


def draw(pipe, references, *, seed=0, steps=3, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    settings = {"num_inference_steps": steps, "height": 16, "width": 16, "output_type": "latent"}
    return pipe(PROMPT, references=references, generator=generator, **(settings | kwargs)).images


CASES = {
    "weighted": ({}, 1),
    "concat": ({"merge": "concat"}, 1),
    "a shorter window": ({"reference_end": 0.5}, 2),
    "guidance for a while": (
        {"callback_on_step_end": SDXLCFGCutoffCallback(cutoff_step_ratio=0.4)},
        2,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_blocks_of_a_unet_share_a_graph(build_pipeline, make_unet, make_adapter, objects, graphs, case):
    settings, count = CASES[case]
    pipe = build_pipeline()
    pipe.unet = make_unet(transformer_layers_per_block=3)  # 12 in all, more than the compiler would make graphs for
    pipe.mip_adapter = make_adapter(pipe.unet).install(pipe.unet)
    expected = draw(pipe, objects, **settings)
    pipe.unet.compile_repeated_blocks(backend=graphs, fullgraph=True)
    torch.testing.assert_close(draw(pipe, objects, **settings), expected)
    assert graphs.frame_count == count
    with torch.compiler.set_stance("fail_on_recompile"):
        draw(pipe, objects[::-1], seed=1, steps=5, **settings)  # other references of the same number


def test_a_whole_unet_is_one_graph_with_regions_and_maps_too(pipe, photos, graphs):
    left_HW = torch.tensor([[1.0, 0.0]])
    references = [Reference("cat", photos[:1], region=left_HW), Reference("dog", photos[1:2], region=1 - left_HW)]
    expected = draw(pipe, references)
    pipe.unet.compile(backend=graphs, fullgraph=True)
    torch.testing.assert_close(draw(pipe, references), expected)
    assert graphs.frame_count == 1
    torch.testing.assert_close(draw(pipe, references, return_maps=True), expected)
    assert graphs.frame_count == 4  # a layer's first maps, its second, and any after them
    with torch.compiler.set_stance("fail_on_recompile"):
        draw(pipe, references, steps=5, return_maps=True)
