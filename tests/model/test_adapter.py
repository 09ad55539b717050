"""The adapter fits its UNet, goes in, and leaves no trace."""

import pytest
import torch

from mip.errors import CheckpointError, ConfigError
from mip.model.adapter import MIPAdapter
from mip.model.checkpoint import AdapterCheckpoint, read_adapter


def test_ejecting_restores_the_unet_bit_for_bit(unet, make_adapter, run_unet, make_references):
    processors, state, output = unet.attn_processors, dict(unet.state_dict()), run_unet(unet)
    adapter = make_adapter(unet).install(unet)
    run_unet(unet, references=make_references([2]))
    adapter.eject()
    assert unet.attn_processors == processors  # the very same objects
    assert list(unet.state_dict()) == list(state)
    assert all(torch.equal(unet.state_dict()[key], value) for key, value in state.items())
    assert torch.equal(run_unet(unet), output)


def test_installed_is_a_context_that_ejects_also_after_an_error(unet, make_adapter):
    adapter, processors = make_adapter(unet), unet.attn_processors
    with pytest.raises(RuntimeError), adapter.installed(unet):
        assert adapter.is_installed
        raise RuntimeError
    assert not adapter.is_installed and unet.attn_processors == processors


def test_an_adapter_or_unet_in_use_is_refused(make_unet, make_adapter):
    unet, other = make_unet(), make_unet()
    adapter = make_adapter(unet).install(unet)
    with pytest.raises(ConfigError, match="already in use"):
        adapter.install(other)
    with pytest.raises(ConfigError, match="already in use"):
        make_adapter(other).install(unet)


def test_ejecting_twice_is_refused(unet, make_adapter):
    adapter = make_adapter(unet).install(unet)
    adapter.eject()
    with pytest.raises(ConfigError, match="not in a UNet"):
        adapter.eject()


def test_another_unet_layout_is_refused(make_unet, make_adapter, adapter_files):
    deeper = make_unet(transformer_layers_per_block=2)
    with pytest.raises(ConfigError, match="other cross-attention layers"):
        make_adapter(make_unet()).install(deeper)
    with pytest.raises(CheckpointError) as error:
        MIPAdapter.from_checkpoint(adapter_files["sdxl"], deeper)
    missing = [index for index, name in enumerate(deeper.attn_processors) if "attn2" in name][-1]
    assert f"missing {missing}.to_k_ip.weight" in str(error.value)


def test_another_width_is_refused_with_both_shapes(make_unet, adapter_files):
    with pytest.raises(CheckpointError, match=r"1.to_k_ip.weight is \(16, 12\) instead of \(16, 20\)"):
        MIPAdapter.from_checkpoint(adapter_files["sdxl"], make_unet(cross_attention_dim=20))


def test_every_missing_and_unexpected_layer_key_is_named(unet, adapter_files):
    whole = read_adapter(adapter_files["sdxl"])
    layers = {k: v for k, v in whole.layers.items() if k not in ("1.to_v_ip.weight", "3.text_to_weight.weight")}
    damaged = AdapterCheckpoint(image_proj=whole.image_proj, layers=layers | {"99.to_k_ip.weight": torch.ones(1, 1)})
    with pytest.raises(CheckpointError) as error:
        MIPAdapter.from_checkpoint(damaged, unet)
    for expected in (
        "missing 1.to_v_ip.weight",
        "missing 3.text_to_weight.weight",
        "unexpected 99.to_k_ip.weight",
    ):
        assert expected in str(error.value)


def test_indices_are_positions_among_all_processors_mid_block_last(unet, make_adapter):
    adapter = make_adapter(unet)
    names = list(unet.attn_processors)
    assert [names[index] for index in adapter.processors] == [p.name for p in adapter.processors.values()]
    assert [index % 2 for index in adapter.processors] == [1] * len(adapter.processors)
    assert "mid_block" in adapter.processors[max(adapter.processors)].name


def test_a_fresh_adapter_starts_from_the_text_projections_and_an_open_gate(unet):
    fresh = MIPAdapter.fresh(unet, projection=torch.nn.Identity(), variant=None)  # pyright: ignore[reportArgumentType]
    for processor in fresh.processors.values():
        attention = unet.get_submodule(processor.name.removesuffix(".processor"))
        assert torch.equal(processor.to_k_ip.weight, attention.to_k.weight)
        assert torch.equal(processor.to_v_ip.weight, attention.to_v.weight)
        assert processor.text_to_weight is not None and not processor.text_to_weight.weight.any()


def test_a_gate_added_to_a_plain_adapter_changes_nothing_yet(make_unet, adapter_files, run_unet, make_references):
    outputs = []
    for adds_gate in (False, True):
        unet = make_unet()
        adapter = MIPAdapter.from_checkpoint(adapter_files["plain"], unet, adds_gate=adds_gate).install(unet)
        assert adapter.has_gate is adds_gate
        outputs.append(run_unet(unet, references=make_references([2])).detach())
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)


def test_a_zero_gate_receives_gradients(unet, adapter_files, run_unet, make_references):
    adapter = MIPAdapter.from_checkpoint(adapter_files["plain"], unet, adds_gate=True).install(unet)
    run_unet(unet, references=make_references([2])).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapter.trainable_parameters())
    assert all(parameter.grad is None for parameter in adapter.projection.parameters())
    assert all(p.grad is None for name, p in unet.named_parameters() if ".processor." not in name)


def test_a_checkpoint_makes_the_same_adapter_again(make_unet, make_adapter, run_unet, make_references, tmp_path):
    unet, other = make_unet(), make_unet()
    adapter = make_adapter(unet).install(unet)
    again = MIPAdapter.from_checkpoint(adapter.checkpoint(), other).install(other)
    references = make_references([2])
    assert torch.equal(run_unet(unet, references=references), run_unet(other, references=references).detach())
    features = torch.randn(2, 3, 6)
    assert torch.equal(adapter.image_tokens(features), again.image_tokens(features))
    assert len(again.trainable_parameters()) == 3 * len(again.processors)


def test_processors_follow_the_unet_to_another_precision(unet, make_adapter, run_unet, make_references):
    adapter = make_adapter(unet).install(unet)
    unet.to(torch.bfloat16)
    assert {p.dtype for p in adapter.trainable_parameters()} == {torch.bfloat16}
    assert {p.dtype for p in adapter.projection.parameters()} == {torch.float32}
    assert run_unet(unet, references=make_references([1]).to(dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_layers_that_sdxl_does_not_have_are_refused(unet, make_adapter):
    attention = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2")
    attention.group_norm = torch.nn.GroupNorm(1, 16)
    with pytest.raises(ConfigError, match=r"mid_block.*group_norm"):
        make_adapter(unet)
