"""Adapter files of the official code: keys, layers, what is missing, and the way back."""

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from mip.errors import CheckpointError
from mip.model.adapter import MIPAdapter
from mip.model.checkpoint import export_official_bin, read_adapter
from tests.parity.golden import GOLDEN, Case


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(GOLDEN / "base" / "unet").eval().requires_grad_(False)


def test_files_have_the_listed_keys_shapes_and_layers(adapter_case: Case, unet: UNet2DConditionModel):
    entry = adapter_case.params
    checkpoint = read_adapter(adapter_case.file, variant=adapter_case.id)
    assert {k: list(t.shape) for k, t in checkpoint.layers.items()} == {
        layer["key"]: layer["shape"] for layer in entry["ip_adapter"]
    }
    assert {k: list(t.shape) for k, t in checkpoint.image_proj.items()} == entry["image_proj"]
    adapter = MIPAdapter.from_checkpoint(checkpoint, unet)
    for layer in entry["ip_adapter"]:
        assert adapter.processors[int(layer["key"].split(".")[0])].name == layer["unet_layer"]
    if adapter_case.id == "sdxl":
        features = torch.zeros(1, checkpoint.image_proj["proj.weight"].shape[1])
    else:
        features = torch.zeros(1, 3, checkpoint.image_proj["proj_in.weight"].shape[1])
    assert adapter.image_tokens(features).shape[1] == entry["num_tokens"]


def test_loaded_weights_are_those_of_the_file_in_float32(adapter_case: Case, unet: UNet2DConditionModel):
    checkpoint = read_adapter(adapter_case.file)
    loaded = MIPAdapter.from_checkpoint(checkpoint, unet).checkpoint()
    for section in ("image_proj", "layers"):
        expected = {key: t.float() for key, t in getattr(checkpoint, section).items()}
        torch.testing.assert_close(dict(getattr(loaded, section)), expected, rtol=0, atol=0)


def test_a_plain_ip_adapter_is_recognised_and_has_no_gate(adapter_case: Case, unet: UNet2DConditionModel):
    adapter = MIPAdapter.from_checkpoint(GOLDEN / adapter_case.params["plain_file"], unet)
    assert adapter.variant.name == adapter_case.id and not adapter.has_gate


def test_the_export_is_the_official_file_again(adapter_case: Case, unet: UNet2DConditionModel, tmp_path):
    adapter = MIPAdapter.from_checkpoint(adapter_case.file, unet)
    export_official_bin(tmp_path / "adapter.bin", adapter.checkpoint())
    official, exported = (torch.load(f, weights_only=True) for f in (adapter_case.file, tmp_path / "adapter.bin"))
    assert exported.keys() == official.keys()
    for section, tensors in official.items():
        assert exported[section].keys() == tensors.keys()
        assert all(torch.equal(exported[section][key], t) for key, t in tensors.items())


def test_every_key_missing_from_a_file_is_named(adapter_case: Case, unet: UNet2DConditionModel, tmp_path):
    official = torch.load(adapter_case.file, weights_only=True)
    dropped = [layer["key"] for layer in adapter_case.params["ip_adapter"]][::4]
    for key in dropped:
        del official["ip_adapter"][key]
    torch.save(official, tmp_path / "adapter.bin")
    with pytest.raises(CheckpointError) as error:
        MIPAdapter.from_checkpoint(tmp_path / "adapter.bin", unet)
    assert all(f"missing {key}" in str(error.value) for key in dropped)
