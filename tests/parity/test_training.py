"""Optimisation steps of the official code, repeated by ours: the parts on their own, and the trainer as a whole."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from torch import Tensor

from mip.config import Models, Train
from mip.model.adapter import MIPAdapter
from mip.model.checkpoint import AdapterCheckpoint, read_adapter
from mip.tables import read_rows, write_table
from mip.training import loop
from mip.training.crops import Crop
from mip.training.dataset import Absence, Batch, Loaded
from mip.training.networks import Encoders
from mip.training.objective import Draws, NoiseSchedule, losses
from mip.training.start import load_unet
from tests.parity.golden import GOLDEN, Case, Ledger, Run, manifest, of_kind, read_json, references_of

FEATURES = 1e-5  # of text and images
GRADIENTS = 5e-4  # relative, in the L2 norm
WEIGHTS = 2e-6


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """accelerate keeps its settings for the life of a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture
def models(training_run: Run) -> Models:
    """The recorded networks."""
    size = int(training_run.cases[0].tensors["target_size"][0, 0])
    return Models.model_validate(
        {
            "variant": training_run.id,
            "base": str(GOLDEN / "base"),
            "image_encoder": str(GOLDEN / "base"),
            "image_encoder_subfolder": "image_encoder",
            "ip_adapter": str(GOLDEN / read_json("adapters/adapters.json")[training_run.id]["file"]),
            "ip_adapter_weight": None,
            "resolution": size,
            "dtype": "float32",
            "device": "cpu",
        }
    )


def train_config(run: Run) -> Train:
    """The recorded settings; nothing is dropped, for the recorded conditions are dropped already."""
    params, steps = run.cases[0].params, len(run.cases)
    batch = len(run.cases[0].tensors["latents"])
    return Train.model_validate(
        {
            "start": "ip_adapter",
            "merge": "weighted",
            "gated": True,
            "timesteps": (0.0, 1.0),
            "seed": 0,
            "steps": steps,
            "batch": batch,
            "micro_batch": batch,
            "warm_up": 0,
            "schedule": "constant",
            "learning_rate": params["learning_rate"],
            "weight_decay": params["weight_decay"],
            "max_grad_norm": None,
            "drop_image": 0.0,
            "drop_text": 0.0,
            "drop_both": 0.0,
            "precision": "no",
            "validation_every": steps,
            "validation_batches": 1,
            "samples": None,
            "checkpoint_every": steps,
            "keep_checkpoints": 1,
            "optimizer": "adamw",
            "snr_gamma": None,
            "noise_offset": 0.0,
            "ema": None,
            "gradient_checkpointing": False,
            "checkpoint_minutes": None,
            "on_bad_loss": "stop",
            "patience": 3,
            "trackers": (),
        }
    )


def recorded_features(case: Case) -> Tensor:
    """Image features by sample and object; sdxl records them in one axis."""
    features, leading = case.tensors["image_features"], case.tensors["entity_token_lens"].shape
    return features if features.shape[:2] == leading else features.unflatten(0, leading)


def recorded_batch(case: Case) -> tuple[Batch, Draws]:
    """The batch as it entered the official step."""
    tensors = case.tensors
    latents, lengths_BN = tensors["latents"], tensors["entity_token_lens"]
    rows, count = lengths_BN.shape
    references = references_of(
        torch.zeros(rows, count, 1, 1), tensors["entity_text_embeds"][..., :1], lengths_BN, scale=1
    )
    batch = Batch(
        sample_ids=tuple(map(str, range(rows))),
        mean_BCHW=latents,
        std_BCHW=torch.zeros_like(latents),
        prompt_BTE=tensors["prompt_embeds"],
        pooled_BD=tensors["pooled_prompt_embeds"],
        time_ids_B6=tensors["time_ids"],
        features_BNF=recorded_features(case),
        phrase_BNTE=tensors["entity_text_embeds"],
        words_BNT=references.words_BNT,
        present_BN=references.present_BN,
        masks_BNHW=torch.zeros(rows, count, *latents.shape[2:]),
    )
    kept = torch.zeros(rows, dtype=torch.bool)
    return batch, Draws(tensors["noise"], torch.zeros_like(latents), tensors["timesteps"], kept, kept)


def check_weights(ledger: Ledger, case: Case, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
    for name in case.outputs:
        if name.startswith("after."):
            key = name.removeprefix("after.")
            # Adam's first steps are lr * sign(gradient), whatever its size: noise where there is hardly any.
            ledger.compare(case, name, weights[key], atol=WEIGHTS, where=gradients[key].abs() > 1e-6)
            ledger.compare(case, name, weights[key], atol=2e-4, label=" (tiny gradients too)")


def test_steps_have_the_official_losses_gradients_and_weights(training_run: Run, models: Models, ledger: Ledger):
    config = train_config(training_run)
    unet = load_unet(models, precision="no")
    adapter = MIPAdapter.from_checkpoint(Path(models.ip_adapter), unet).install(unet)
    schedule = NoiseSchedule.of(models, config)
    optimizer = torch.optim.AdamW(
        adapter.trainable_parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    seen: dict[str, Tensor] = {}
    unet.register_forward_hook(lambda module, args, output: seen.update(noisy=args[0], predicted=output[0]))
    for case in training_run.cases:
        params = case.params
        assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == (tuple(params["betas"]), params["eps"])
        batch, draws = recorded_batch(case)
        loss = losses(unet, adapter, schedule, batch, draws, merge="weighted", is_gated=True).mean()
        optimizer.zero_grad()
        loss.backward()
        ledger.compare(case, "noisy_latents", seen["noisy"], atol=FEATURES)
        ledger.compare(case, "noise_pred", seen["predicted"], atol=1e-4)
        ledger.compare(case, "loss", loss.reshape(case.tensors["loss"].shape), l2=1e-5)
        gradients = {key: p.grad for key, p in adapter.layers.named_parameters() if p.grad is not None}
        norms = {key: float(gradient.norm()) for key, gradient in gradients.items()}
        assert norms == pytest.approx(params["adapter_grad_norms"], rel=GRADIENTS)
        for name in case.outputs:
            if name.startswith("grad."):
                ledger.compare(case, name, gradients[name.removeprefix("grad.")], l2=GRADIENTS)
        optimizer.step()
        check_weights(ledger, case, adapter.layers.state_dict(), gradients)


@dataclass
class RecordedSet:
    """Stands for the features on disk: place i of step s is sample i of the recorded step."""

    steps: Sequence[tuple[Batch, Draws]]

    def __post_init__(self) -> None:
        self.size = len(self.steps[0][0].sample_ids) if self.steps else 0
        self.weights, self.made_from = np.ones(len(self)), {"manifest": ""}

    def __len__(self) -> int:
        return len(self.steps) * self.size

    def read(self, places: Sequence[int]) -> Loaded:
        assert [place % self.size for place in places] == list(range(self.size))
        return Loaded.complete(self.steps[places[0] // self.size][0])

    def absence(self) -> Absence:
        """Never used: nothing is dropped any more."""
        batch = self.steps[0][0]
        return Absence(torch.zeros_like(batch.features_BNF[0, 0]), batch.prompt_BTE[0], batch.pooled_BD[0])


@pytest.fixture
def trained(training_run: Run, models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What the real trainer writes, with only its samples and its random draws replaced by the recorded ones."""
    steps = [recorded_batch(case) for case in training_run.cases]

    def order(self: loop.Sampler, step: int) -> list[int]:
        return list(range(step * self.size, (step + 1) * self.size))

    def draw(self: NoiseSchedule, shape: Any, *, keys: Sequence[tuple[int, int]], **options: Any) -> Draws:
        return steps[keys[0][0]][1]

    make: Callable[..., RecordedSet] = lambda folder, split, live: RecordedSet(steps if split == "train" else [])  # noqa: E731
    monkeypatch.setattr(loop, "FeatureSet", make)
    monkeypatch.setattr(loop.Sampler, "places", order)
    monkeypatch.setattr(NoiseSchedule, "draw", draw)
    write_table(tmp_path / "index.parquet", "features", [], {})
    return loop.train(
        train_config(training_run), models=models, features=tmp_path, out=tmp_path / "out", work=tmp_path / "work"
    )


def official_result(run: Run) -> AdapterCheckpoint:
    return read_adapter(GOLDEN / "train" / f"official_checkpoint_after_step{len(run.cases)}_{run.id}.bin")


def test_the_trainer_has_the_official_losses_and_weights(training_run: Run, trained: Path, ledger: Ledger):
    curve = read_rows(trained / "curve.parquet", "curve")
    for row, case in zip(curve, training_run.cases, strict=True):
        ledger.compare(case, "loss", np.full(case.tensors["loss"].shape, row["loss"]), l2=1e-5, label=" (trainer)")
    official, ours = official_result(training_run).layers, read_adapter(trained / "adapter.safetensors").layers
    assert ours.keys() == official.keys()
    start = read_adapter(Path(GOLDEN / read_json("adapters/adapters.json")[training_run.id]["file"])).layers
    both = [torch.cat([layers[key].flatten() for key in official]).half() for layers in (ours, official, start)]
    # A last-digit difference in float32 may round to the other neighbour; a missing step would change nearly all.
    assert float((both[0] == both[1]).float().mean()) > 0.98 > float((both[2] == both[1]).float().mean())
    torch.testing.assert_close(both[0], both[1], rtol=2e-3, atol=2e-4)
    last = training_run.cases[-1]
    for name in last.outputs:
        if name.startswith("after."):
            # Without the gradients at hand: the tolerance of the entries whose gradient is tiny.
            key = name.removeprefix("after.")
            ledger.compare(last, name, ours[key], atol=2e-4, label=" (trainer)")


def test_the_projection_is_left_alone(training_run: Run, trained: Path):
    ours, official = read_adapter(trained / "adapter.safetensors").image_proj, official_result(training_run).image_proj
    assert ours.keys() == official.keys()
    assert all(torch.equal(ours[key].half(), official[key]) for key in official)


def test_what_is_trained_is_what_the_official_optimizer_holds(training_run: Run, models: Models):
    adapter = MIPAdapter.from_checkpoint(Path(models.ip_adapter), load_unet(models, precision="no"))
    trained = {id(parameter) for parameter in adapter.trainable_parameters()}
    names = {f"adapter_modules.{name}" for name, p in adapter.layers.named_parameters() if id(p) in trained}
    official = manifest()["training"][training_run.id]["optimizer_parameters"]
    assert len(names) == len(trained) and names == set(official)


def entity_crops() -> dict[int, list[Image.Image]]:
    """Recorded 8-bit crops of each training sample, by its number; one step of one run holds them."""
    for run in cast(list[Run], of_kind("train")):
        for case in run.cases:
            if (crops := case.tensors.get("clip_images_u8")) is not None:
                images = [[Image.fromarray(crop.permute(1, 2, 0).numpy()) for crop in row] for row in crops]
                return dict(zip(case.params["sample_order"], images, strict=True))
    raise AssertionError("no training step holds the entity crops")


def test_texts_and_images_are_encoded_as_officially(training_run: Run, models: Models, ledger: Ledger):
    encoders, crops = Encoders.load(models), entity_crops()
    absent_F = encoders.absent_features()
    for case in training_run.cases:
        tensors, params = case.tensors, case.params
        for name, ids, tokenizer in zip(("", "_2"), ("entity_ids", "entity_ids_2"), encoders.tokenizers, strict=True):
            padding = {"padding": "max_length", "max_length": tensors[ids].shape[-1], "return_tensors": "pt"}
            given: Any = tokenizer(params["prompts"], **padding)
            assert torch.equal(given.input_ids, tensors[f"text_input_ids{name}"])
        prompts = [encoders.text(prompt) for prompt in params["prompts"]]
        ledger.compare(case, "prompt_embeds", torch.stack([p.embedding_TE for p in prompts]), atol=FEATURES)
        ledger.compare(case, "pooled_prompt_embeds", torch.stack([p.pooled_D for p in prompts]), atol=FEATURES)
        tokenizer, lengths_BN = encoders.tokenizers[0], tensors["entity_token_lens"]
        names = [
            [encoders.text(str(tokenizer.decode(ids[1 : count + 1]))) for ids, count in zip(*of_row, strict=True)]
            for of_row in zip(tensors["entity_ids"].tolist(), lengths_BN.tolist(), strict=True)
        ]
        phrase_BNTE = torch.stack([torch.stack([name.embedding_TE for name in row]) for row in names])
        ledger.compare(case, "entity_text_embeds", phrase_BNTE, atol=FEATURES)
        assert [[int(name.words_T.sum()) for name in row] for row in names] == lengths_BN.tolist()
        is_dropped = dict(enumerate(params["sample_drop_image"]))
        features = torch.stack(
            [
                absent_F.expand(lengths_BN.shape[1], *absent_F.shape)
                if is_dropped[row]
                else encoders.features(crops[sample])
                for row, sample in enumerate(params["sample_order"])
            ]
        )
        ledger.compare(case, "image_features", features.reshape_as(tensors["image_features"]), atol=FEATURES)


def test_the_micro_conditioning_is_put_together_as_officially(training_run: Run, ledger: Ledger):
    for case in training_run.cases:
        sizes = [case.tensors[name].int().tolist() for name in ("original_size", "crop_coords_top_left", "target_size")]
        ids = [
            Crop(left=left, top=top, side=0).time_ids(width=width, height=height, resolution=target[0])
            for (height, width), (top, left), target in zip(*sizes, strict=True)
        ]
        ledger.compare(case, "time_ids", torch.tensor(ids))
