"""Two optimisation steps of the official code, repeated by ours; the recorded data are found through MIP_GOLDEN."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mip.config import Models
from mip.model.adapter import MIPAdapter
from mip.model.checkpoint import read_adapter
from mip.training.dataset import Batch
from mip.training.networks import Encoders
from mip.training.objective import Draws, NoiseSchedule, losses
from mip.training.start import load_unet

GOLDEN = Path(os.environ.get("MIP_GOLDEN", Path(__file__).parents[2] / "../shared/golden")).resolve()
pytestmark = pytest.mark.skipif(
    not (GOLDEN / "manifest.json").is_file(),
    reason=f"there is no golden data in {GOLDEN}; set MIP_GOLDEN to its folder",
)
VARIANTS = ["sdxl", "sdxl_plus"]
Maker = Callable[..., Any]


def case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Parameters and tensors of a recorded case."""
    cases = {c["id"]: c for c in json.loads((GOLDEN / "manifest.json").read_text())["cases"]}
    return cases[name]["params"], load_file(GOLDEN / cases[name]["file"])


def golden_models(variant: str) -> Models:
    """The recorded networks."""
    return Models.model_validate(
        {
            "variant": variant,
            "base": str(GOLDEN / "base"),
            "image_encoder": str(GOLDEN / "base"),
            "image_encoder_subfolder": "image_encoder",
            "ip_adapter": str(GOLDEN / f"adapters/mip-adapter_{variant}.bin"),
            "ip_adapter_weight": None,
            "resolution": 128,
            "dtype": "float32",
            "device": "cpu",
        }
    )


def recorded_batch(tensors: dict[str, Tensor]) -> tuple[Batch, Draws]:
    """The batch as it entered the official step: conditions are dropped already."""
    latents, lengths_BN = tensors["latents"], tensors["entity_token_lens"]
    rows, count = lengths_BN.shape
    features, position_T = tensors["image_features"], torch.arange(77)
    batch = Batch(
        sample_ids=tuple(map(str, range(rows))),
        mean_BCHW=latents,
        std_BCHW=torch.zeros_like(latents),
        prompt_BTE=tensors["prompt_embeds"],
        pooled_BD=tensors["pooled_prompt_embeds"],
        time_ids_B6=tensors["time_ids"],
        features_BNF=features if features.ndim == 4 else features.unflatten(0, (rows, count)),
        phrase_BNTE=tensors["entity_text_embeds"],
        words_BNT=(position_T >= 1) & (position_T <= lengths_BN[..., None]),
        present_BN=torch.ones(rows, count, dtype=torch.bool),
        masks_BNHW=torch.zeros(rows, count, *latents.shape[2:]),
    )
    kept = torch.zeros(rows, dtype=torch.bool)
    return batch, Draws(tensors["noise"], torch.zeros_like(latents), tensors["timesteps"], kept, kept)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_steps_have_the_official_losses_gradients_and_weights(variant: str, make_train_config: Maker):
    models = golden_models(variant)
    unet = load_unet(models, precision="no")
    adapter = MIPAdapter.from_checkpoint(Path(models.ip_adapter), unet).install(unet)
    schedule = NoiseSchedule.of(models, make_train_config())
    optimizer = torch.optim.AdamW(adapter.trainable_parameters(), lr=1e-4, weight_decay=1e-2)
    for step in (1, 2):
        params, tensors = case(f"train_{variant}_step{step}")
        batch, draws = recorded_batch(tensors)
        loss = losses(unet, adapter, schedule, batch, draws, merge="weighted", is_gated=True).mean()
        optimizer.zero_grad()
        loss.backward()
        assert loss.item() == pytest.approx(params["loss"], rel=1e-5)
        gradients = {key: p.grad for key, p in adapter.layers.named_parameters() if p.grad is not None}
        norms = {key: float(gradient.norm()) for key, gradient in gradients.items()}
        assert norms == pytest.approx(params["adapter_grad_norms"], rel=5e-4)
        optimizer.step()
        for key, weight in adapter.layers.state_dict().items():
            if (expected := tensors.get(f"after.{key}")) is not None:
                # Adam's first steps are lr * sign(gradient), whatever its size: noise where there is hardly any.
                is_certain = gradients[key].abs() > 1e-6
                torch.testing.assert_close(weight[is_certain], expected[is_certain], rtol=0, atol=2e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_after_two_steps_are_those_of_the_official_checkpoint(variant: str, make_train_config: Maker):
    models = golden_models(variant)
    unet = load_unet(models, precision="no")
    adapter = MIPAdapter.from_checkpoint(Path(models.ip_adapter), unet).install(unet)
    schedule = NoiseSchedule.of(models, make_train_config())
    optimizer = torch.optim.AdamW(adapter.trainable_parameters(), lr=1e-4, weight_decay=1e-2)
    for step in (1, 2):
        batch, draws = recorded_batch(case(f"train_{variant}_step{step}")[1])
        optimizer.zero_grad()
        losses(unet, adapter, schedule, batch, draws, merge="weighted", is_gated=True).mean().backward()
        optimizer.step()
    official = read_adapter(GOLDEN / f"train/official_checkpoint_after_step2_{variant}.bin").layers
    ours = torch.cat([weight.flatten() for weight in adapter.layers.state_dict().values()]).half()
    theirs = torch.cat([official[key].flatten() for key in adapter.layers.state_dict()])
    # A last-digit difference in float32 may round to the other neighbour; a missing step would change nearly all.
    assert float((ours == theirs).float().mean()) > 0.98
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompts_and_what_replaces_dropped_ones_are_encoded_as_officially(variant: str):
    encoders = Encoders.load(golden_models(variant))
    params, tensors = case(f"train_{variant}_step1")
    assert "" in params["prompts"]
    for row, prompt in enumerate(params["prompts"]):
        text = encoders.text(prompt)
        torch.testing.assert_close(text.embedding_TE, tensors["prompt_embeds"][row], rtol=0, atol=1e-5)
        torch.testing.assert_close(text.pooled_D, tensors["pooled_prompt_embeds"][row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_replaces_a_dropped_image_is_the_official_one(variant: str):
    absent_F = Encoders.load(golden_models(variant)).absent_features()
    params, tensors = case(f"train_{variant}_step1")
    batch, _ = recorded_batch(tensors)
    dropped = [row for row, flag in enumerate(params["sample_drop_image"]) if flag]
    assert dropped
    for row in dropped:
        for features_F in batch.features_BNF[row]:
            torch.testing.assert_close(features_F, absent_F, rtol=0, atol=1e-5)
