"""The public code's order of operations: the same mathematics as ours, and only what it can do."""

import pytest
import torch

from mip.errors import ReferencesError


def test_official_arithmetic_computes_the_same(make_unet, make_adapter, make_references, run_unet):
    unet = make_unet().double()
    adapter, references = make_adapter(unet).double(), make_references([3, 3]).to(dtype=torch.float64)
    with adapter.installed(unet):
        fast = run_unet(unet, batch=2, references=references)
    adapter.install(unet, arithmetic="official")
    official = run_unet(unet, batch=2, references=references)
    assert not torch.equal(official, run_unet(unet, batch=2))
    torch.testing.assert_close(official, fast, atol=1e-10, rtol=0)


def test_official_arithmetic_leaves_no_trace(make_unet, make_adapter, run_unet):
    unet = make_unet()
    before, processors = run_unet(unet), unet.attn_processors
    make_adapter(unet).install(unet, arithmetic="official").eject()
    assert unet.attn_processors == processors and torch.equal(run_unet(unet), before)


@pytest.mark.parametrize(
    ("counts", "changes", "message"),
    [
        ([2], {"merge": "concat"}, "merge that the public code lacks"),
        ([2], {"is_gated": False}, "merge that the public code lacks"),
        ([1, 2], {}, "fewer references"),
        ([2], {"regions_BNHW": torch.ones(1, 2, 8, 8), "latent_size": (8, 8)}, "regions"),
    ],
)
def test_what_the_public_code_cannot_do_is_refused(
    make_unet, make_adapter, make_references, run_unet, counts, changes, message
):
    unet = make_unet()
    make_adapter(unet).install(unet, arithmetic="official")
    with pytest.raises(ReferencesError, match=message):
        run_unet(unet, batch=len(counts), references=make_references(counts, **changes))
