"""The plain base model: this stack reads it as the recorded one did."""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from benchmarks import full_size
from mip.model.adapter import MIPAdapter
from mip.model.encoding import encode_texts, image_pixels
from tests.parity.golden import GOLDEN, Case, Ledger, photograph

BASE = GOLDEN / "base"


def load_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(BASE / "unet").eval().requires_grad_(False)


def test_texts_are_encoded_as_recorded(base_case: Case, ledger: Ledger):
    prompts = base_case.params["prompts"]
    tokenizers = [CLIPTokenizer.from_pretrained(BASE / name) for name in ("tokenizer", "tokenizer_2")]
    encoders = [
        CLIPTextModel.from_pretrained(BASE / "text_encoder").eval(),
        CLIPTextModelWithProjection.from_pretrained(BASE / "text_encoder_2").eval(),
    ]
    for tokenizer, name in zip(tokenizers, ("input_ids", "input_ids_2"), strict=True):
        length = tokenizer.model_max_length
        ids_XT = tokenizer(prompts, padding="max_length", max_length=length, return_tensors="pt").input_ids
        ledger.compare(base_case, name, ids_XT)
    with torch.no_grad():
        states_XTE = encode_texts(prompts, tokenizers=tokenizers, text_encoders=encoders)
        pooled_XD = encoders[1](base_case.tensors["input_ids_2"]).text_embeds
    first, second = states_XTE.split([encoder.config.hidden_size for encoder in encoders], dim=-1)
    ledger.compare(base_case, "te1_penultimate", first, atol=1e-5)
    ledger.compare(base_case, "te2_penultimate", second, atol=1e-5)
    ledger.compare(base_case, "te2_pooled", pooled_XD, atol=1e-5)


def test_the_plain_unet_predicts_as_recorded(base_case: Case, ledger: Ledger):
    tensors = base_case.tensors
    predicted = load_unet()(
        tensors["latents"],
        tensors["timesteps"],
        tensors["encoder_hidden_states"],
        added_cond_kwargs={"text_embeds": tensors["pooled"], "time_ids": tensors["time_ids"]},
    ).sample
    # Another CPU alone makes 1e-5: the tiny UNet amplifies rounding.
    ledger.compare(base_case, "unet_out", predicted, atol=1e-4)


def test_an_installed_adapter_without_references_leaves_the_plain_unet(base_case: Case, adapter_case: Case):
    unet, tensors = load_unet(), base_case.tensors
    inputs = (tensors["latents"], tensors["timesteps"], tensors["encoder_hidden_states"])
    conditions = {"text_embeds": tensors["pooled"], "time_ids": tensors["time_ids"]}
    plain = unet(*inputs, added_cond_kwargs=conditions).sample
    adapter = MIPAdapter.from_checkpoint(adapter_case.file, unet)
    with adapter.installed(unet):
        assert torch.equal(unet(*inputs, added_cond_kwargs=conditions).sample, plain)


def test_images_are_encoded_as_recorded(base_case: Case, ledger: Ledger):
    encoder = CLIPVisionModelWithProjection.from_pretrained(BASE / "image_encoder").eval()
    with torch.no_grad():
        output = encoder(base_case.tensors["vision_pixels"].float(), output_hidden_states=True)
    ledger.compare(base_case, "vision_image_embeds", output.image_embeds, atol=1e-5)
    ledger.compare(base_case, "vision_penultimate", output.hidden_states[-2], atol=1e-5)


def test_the_autoencoder_encodes_and_decodes_as_recorded(base_case: Case, ledger: Ledger):
    vae: Any = AutoencoderKL.from_pretrained(BASE / "vae")
    with torch.no_grad():
        decoded = vae.eval().decode(base_case.tensors["vae_z"]).sample
        encoded = vae.encode(base_case.tensors["vae_x"]).latent_dist
    # The golden data asks for the same bits of its own machine; kernels of another one round otherwise.
    ledger.compare(base_case, "vae_decoded", decoded, atol=1e-5)
    ledger.compare(base_case, "vae_mean", encoded.mean, atol=1e-5)
    ledger.compare(base_case, "vae_logvar", encoded.logvar, atol=1e-5)


def test_the_scheduler_steps_as_recorded(base_case: Case, ledger: Ledger):
    scheduler = EulerDiscreteScheduler.from_pretrained(BASE / "scheduler")
    assert isinstance(scheduler, EulerDiscreteScheduler)
    scheduler.set_timesteps(len(base_case.tensors["euler_timesteps"]))
    ledger.compare(base_case, "euler_timesteps", scheduler.timesteps)
    ledger.compare(base_case, "euler_sigmas", scheduler.sigmas, atol=1e-5)
    ledger.compare(base_case, "euler_init_noise_sigma", scheduler.init_noise_sigma, atol=1e-5)


def test_the_order_of_the_processors_is_the_recorded_one(order_case: Case):
    if order_case.id == "real_sdxl":
        with torch.device("meta"):
            unet = full_size.unet()
    else:
        unet = load_unet()
    order = order_case.params
    assert list(unet.attn_processors) == [order[str(index)] for index in range(len(order))]


def test_photos_are_prepared_as_recorded(pixels_case: Case, ledger: Ledger):
    for key, recorded_3HW in pixels_case.tensors.items():
        photo = photograph(key.removeprefix("pixel_values."))
        (ours_3HW,) = image_pixels([photo], size=recorded_3HW.shape[-1], framing="centre_crop")
        ledger.compare(pixels_case, key, ours_3HW, atol=2e-3)  # stored in float16
