"""Loss and gradients of one training step against the official code."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from mip.model.adapter import MIPAdapter


def test_the_first_step_has_the_recorded_loss_and_gradients(training_case, golden, references_of):
    params, tensors = training_case.params, training_case.tensors
    if params["step"] != 1:
        pytest.skip("starts from trained weights, not from a file")
    files = json.loads((golden / "adapters" / "adapters.json").read_text())
    unet = UNet2DConditionModel.from_pretrained(golden / "base" / "unet").eval().requires_grad_(False)
    adapter = MIPAdapter.from_checkpoint(golden / files[params["variant"]]["file"], unet).install(unet)

    lengths_BN = tensors["entity_token_lens"]
    features = tensors["image_features"]
    # sdxl records objects of all samples in one axis, sdxl_plus in two.
    if features.shape[:2] != lengths_BN.shape:
        features = features.unflatten(0, lengths_BN.shape)
    tokens_BNRE = adapter.image_tokens(features)
    references = references_of(tokens_BNRE, tensors["entity_text_embeds"], lengths_BN, scale=params["scale"])
    predicted = unet(
        tensors["noisy_latents"],
        tensors["timesteps"],
        tensors["prompt_embeds"],
        added_cond_kwargs={"text_embeds": tensors["pooled_prompt_embeds"], "time_ids": tensors["time_ids"]},
        cross_attention_kwargs={"references": references},
    ).sample
    torch.testing.assert_close(predicted, tensors["noise_pred"], atol=1e-4, rtol=0)
    loss = F.mse_loss(predicted, tensors["noise"])
    torch.testing.assert_close(loss, tensors["loss"].reshape(()), rtol=1e-5, atol=0)

    loss.backward()
    gradients = {
        name: parameter.grad for name, parameter in adapter.layers.named_parameters() if parameter.grad is not None
    }
    for name, norm in params["adapter_grad_norms"].items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=5e-4)
    for name, recorded in tensors.items():
        if name.startswith("grad."):
            difference = gradients[name.removeprefix("grad.")] - recorded
            assert difference.norm() <= 5e-4 * recorded.norm()
