"""The plain base model and the adapter files: this stack reads them as the recorded one did."""

import json

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from mip.errors import CheckpointError
from mip.model.adapter import MIPAdapter
from mip.model.checkpoint import export_official_bin, read_adapter
from mip.model.encoding import encode_texts

# diffusers' Euler scheduler with numpy 2.4.


@pytest.fixture(scope="module")
def unet(golden):
    return UNet2DConditionModel.from_pretrained(golden / "base" / "unet").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def sanity(golden_case):
    return golden_case("base_sanity")


@pytest.fixture(scope="module", params=["sdxl", "sdxl_plus"])
def listed(golden, request):
    """What the golden data says of one variant's adapter files."""
    everything = json.loads((golden / "adapters" / "adapters.json").read_text())
    if request.param not in everything:
        pytest.skip(f"the golden data has no {request.param} adapter")
    return request.param, everything[request.param]


def test_texts_are_encoded_as_recorded(golden, sanity):
    base, tensors, prompts = golden / "base", sanity.tensors, sanity.params["prompts"]
    tokenizers = [CLIPTokenizer.from_pretrained(base / name) for name in ("tokenizer", "tokenizer_2")]
    encoders = [
        CLIPTextModel.from_pretrained(base / "text_encoder").eval(),
        CLIPTextModelWithProjection.from_pretrained(base / "text_encoder_2").eval(),
    ]
    for tokenizer, name in zip(tokenizers, ("input_ids", "input_ids_2"), strict=True):
        length = tokenizer.model_max_length
        ids_XT = tokenizer(prompts, padding="max_length", max_length=length, return_tensors="pt").input_ids
        assert torch.equal(ids_XT, tensors[name])
    with torch.no_grad():
        states_XTE = encode_texts(prompts, tokenizers=tokenizers, text_encoders=encoders)
    recorded_XTE = torch.cat([tensors["te1_penultimate"], tensors["te2_penultimate"]], dim=-1)
    torch.testing.assert_close(states_XTE, recorded_XTE, atol=1e-5, rtol=0)


def test_the_plain_unet_predicts_as_recorded(unet, sanity):
    tensors = sanity.tensors
    predicted = unet(
        tensors["latents"],
        tensors["timesteps"],
        tensors["encoder_hidden_states"],
        added_cond_kwargs={"text_embeds": tensors["pooled"], "time_ids": tensors["time_ids"]},
    ).sample
    # Another CPU alone makes 1e-5: the tiny UNet amplifies rounding.
    torch.testing.assert_close(predicted, tensors["unet_out"], atol=1e-4, rtol=0)


def test_an_installed_adapter_without_references_predicts_as_recorded(golden, unet, sanity, listed):
    tensors = sanity.tensors
    inputs = (tensors["latents"], tensors["timesteps"], tensors["encoder_hidden_states"])
    conditions = {"text_embeds": tensors["pooled"], "time_ids": tensors["time_ids"]}
    plain = unet(*inputs, added_cond_kwargs=conditions).sample
    adapter = MIPAdapter.from_checkpoint(golden / listed[1]["file"], unet)
    with adapter.installed(unet):
        assert torch.equal(unet(*inputs, added_cond_kwargs=conditions).sample, plain)


def test_images_are_encoded_as_recorded(golden, sanity):
    tensors = sanity.tensors
    encoder = CLIPVisionModelWithProjection.from_pretrained(golden / "base" / "image_encoder").eval()
    with torch.no_grad():
        output = encoder(tensors["vision_pixels"].float(), output_hidden_states=True)
    torch.testing.assert_close(output.image_embeds, tensors["vision_image_embeds"], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.hidden_states[-2], tensors["vision_penultimate"], atol=1e-5, rtol=0)


def test_the_scheduler_steps_as_recorded(golden, sanity):
    tensors = sanity.tensors
    scheduler = EulerDiscreteScheduler.from_pretrained(golden / "base" / "scheduler")
    assert isinstance(scheduler, EulerDiscreteScheduler)
    scheduler.set_timesteps(len(tensors["euler_timesteps"]))
    assert torch.equal(scheduler.timesteps, tensors["euler_timesteps"])
    torch.testing.assert_close(scheduler.sigmas, tensors["euler_sigmas"])


def test_adapter_files_have_the_listed_keys_shapes_and_layers(golden, unet, listed):
    variant, entry = listed
    checkpoint = read_adapter(golden / entry["file"], variant=variant)
    assert {k: list(t.shape) for k, t in checkpoint.layers.items()} == {
        layer["key"]: layer["shape"] for layer in entry["ip_adapter"]
    }
    assert {k: list(t.shape) for k, t in checkpoint.image_proj.items()} == entry["image_proj"]
    adapter = MIPAdapter.from_checkpoint(checkpoint, unet)
    for layer in entry["ip_adapter"]:
        assert adapter.processors[int(layer["key"].split(".")[0])].name == layer["unet_layer"]
    if variant == "sdxl":
        features = torch.zeros(1, checkpoint.image_proj["proj.weight"].shape[1])
    else:
        features = torch.zeros(1, 3, checkpoint.image_proj["proj_in.weight"].shape[1])
    assert adapter.image_tokens(features).shape[1] == entry["num_tokens"]


def test_loaded_weights_are_those_of_the_file_in_float32(golden, unet, listed):
    _, entry = listed
    checkpoint = read_adapter(golden / entry["file"])
    loaded = MIPAdapter.from_checkpoint(checkpoint, unet).checkpoint()
    for section in ("image_proj", "layers"):
        expected = {key: t.float() for key, t in getattr(checkpoint, section).items()}
        torch.testing.assert_close(dict(getattr(loaded, section)), expected, rtol=0, atol=0)


def test_a_plain_ip_adapter_is_recognised_and_has_no_gate(golden, unet, listed):
    variant, entry = listed
    adapter = MIPAdapter.from_checkpoint(golden / entry["plain_file"], unet)
    assert adapter.variant.name == variant and not adapter.has_gate


def test_the_export_is_the_official_file_again(golden, unet, listed, tmp_path):
    _, entry = listed
    adapter = MIPAdapter.from_checkpoint(golden / entry["file"], unet)
    export_official_bin(tmp_path / "adapter.bin", adapter.checkpoint())
    official, exported = (torch.load(f, weights_only=True) for f in (golden / entry["file"], tmp_path / "adapter.bin"))
    assert exported.keys() == official.keys()
    for section, tensors in official.items():
        assert exported[section].keys() == tensors.keys()
        assert all(torch.equal(exported[section][key], t) for key, t in tensors.items())


def test_every_key_missing_from_an_official_file_is_named(golden, unet, listed, tmp_path):
    _, entry = listed
    official = torch.load(golden / entry["file"], weights_only=True)
    dropped = [layer["key"] for layer in entry["ip_adapter"]][::4]
    for key in dropped:
        del official["ip_adapter"][key]
    torch.save(official, tmp_path / "adapter.bin")
    with pytest.raises(CheckpointError) as error:
        MIPAdapter.from_checkpoint(tmp_path / "adapter.bin", unet)
    assert all(f"missing {key}" in str(error.value) for key in dropped)


def test_the_order_of_the_processors_is_the_recorded_one(golden, unet):
    recorded = json.loads((golden / "processor_order.json").read_text())["tiny"]
    assert list(unet.attn_processors) == [recorded[str(index)] for index in range(len(recorded))]
