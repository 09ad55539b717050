"""What one training step computes: noise, dropped conditions, prediction, error.

All random draws belong to a sample's place in the global batch, so that they are the same for any number of processes
or micro-batches, and after a resumption.

B samples   N objects   C, H, W latents
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn

from mip.config import Models, Train
from mip.errors import ConfigError
from mip.model.adapter import MIPAdapter
from mip.model.references import Merge, References
from mip.training.dataset import Absence, Batch
from mip.training.networks import base_weights


@dataclass(frozen=True)
class Dropout:
    """Shares of the samples that lose a condition."""

    image: float
    text: float
    both: float

    def __post_init__(self) -> None:
        if self._edges()[2] > 1:
            raise ConfigError(
                f"got drop_image {self.image}, drop_text {self.text}, drop_both {self.both}; give a sum of at most 1"
            )

    def drops(self, draw: float) -> tuple[bool, bool]:
        """Whether a sample with this uniform draw from [0, 1) loses its image and its text."""
        image, text, both = self._edges()
        return draw < image or text <= draw < both, image <= draw < both

    def _edges(self) -> tuple[float, float, float]:
        # Rounded, for 0.05 + 0.05 + 0.05 is not 0.15 in binary.
        return self.image, round(self.image + self.text, 12), round(self.image + self.text + self.both, 12)


@dataclass(frozen=True, eq=False)
class Draws:
    """All that is random about a batch."""

    noise_BCHW: Tensor
    latent_noise_BCHW: Tensor  # of the VAE's distribution
    timestep_B: Tensor
    drops_image_B: Tensor  # bool
    drops_text_B: Tensor

    def to(self, device: torch.device) -> "Draws":
        """Move all tensors."""
        return Draws(**{name: tensor.to(device) for name, tensor in vars(self).items()})


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The base model's noise levels, and which of them are trained."""

    scheduler: DDPMScheduler
    first: int
    end: int  # exclusive

    @classmethod
    def of(cls, models: Models, config: Train) -> "NoiseSchedule":
        """From the base's own scheduler: its betas, its prediction type, its terminal signal-to-noise ratio.

        Raises:
            ConfigError: `timesteps` without a step, or a prediction type other than epsilon, v_prediction and sample.
        """
        base = base_weights(models)
        scheduler = DDPMScheduler.from_pretrained(base.name, revision=base.revision, subfolder="scheduler")
        assert isinstance(scheduler, DDPMScheduler)
        kind, steps = scheduler.config["prediction_type"], scheduler.config["num_train_timesteps"]
        if kind not in ("epsilon", "v_prediction", "sample"):
            raise ConfigError(f"got a base that predicts {kind!r}; expected epsilon, v_prediction or sample")
        first, end = (round(share * steps) for share in config.timesteps)
        if first >= end:
            raise ConfigError(f"got timesteps {list(config.timesteps)}; expected a first smaller than the second")
        return cls(scheduler, first, end)

    def target(self, latents_BCHW: Tensor, draws: Draws) -> Tensor:
        """What the UNet should predict."""
        kind = self.scheduler.config["prediction_type"]
        if kind == "v_prediction":
            return self.scheduler.get_velocity(latents_BCHW, draws.noise_BCHW, draws.timestep_B)  # pyright: ignore[reportArgumentType]
        return latents_BCHW if kind == "sample" else draws.noise_BCHW

    def min_snr(self, timestep_B: Tensor, *, gamma: float) -> Tensor:
        """Weights of the samples' squared errors (arXiv 2303.09556, section 3.4): float32, finite at every noise level.

        With s the signal-to-noise ratio: min(s, gamma) / s where the base predicts the noise, min(s, gamma) / (s + 1)
        where it predicts v, min(s, gamma) where it predicts the sample.
        """
        # Written without s in a denominator: it is 0 at the last level of a schedule with zero terminal SNR.
        signal_B = self.scheduler.alphas_cumprod.to(timestep_B.device)[timestep_B]
        noise_B = 1 - signal_B
        kind = self.scheduler.config["prediction_type"]
        if kind == "v_prediction":
            return torch.minimum(signal_B, gamma * noise_B)
        if kind == "sample":
            return (signal_B / noise_B).clamp(max=gamma)
        return gamma * noise_B / torch.maximum(signal_B, gamma * noise_B)

    def draw(
        self, shape: Sequence[int], *, keys: Sequence[object], seed: int, dropout: Dropout, offset: float = 0.0
    ) -> Draws:
        """One sample of shape (C, H, W) per key.

        `offset` is the standard deviation of a shift of the noise, drawn for each sample and channel.
        """
        rows = [self._draw_one(shape, key=key, seed=seed, dropout=dropout, offset=offset) for key in keys]
        return Draws(*(torch.stack(column) for column in zip(*rows, strict=True)))

    def spread(self, shape: Sequence[int], *, places: Sequence[int], count: int, seed: int) -> Draws:
        """For validation: nothing dropped, place i of `count` at the i-th of evenly spread noise levels."""
        keys = [("validation", place) for place in places]
        draws = self.draw(shape, keys=keys, seed=seed, dropout=Dropout(image=0, text=0, both=0))
        levels = [self.first + int((place + 0.5) / count * (self.end - self.first)) for place in places]
        return replace(draws, timestep_B=torch.tensor(levels))

    def _draw_one(
        self, shape: Sequence[int], *, key: object, seed: int, dropout: Dropout, offset: float
    ) -> tuple[Tensor, ...]:
        digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        uniform = torch.rand((), generator=generator, dtype=torch.float64)
        timestep = torch.randint(self.first, self.end, (), generator=generator)
        noise, latent_noise = (torch.randn(tuple(shape), generator=generator) for _ in range(2))
        shift = torch.randn((shape[0], 1, 1), generator=generator)  # last, so that it changes no other draw
        drops_image, drops_text = dropout.drops(float(uniform))
        return noise + offset * shift, latent_noise, timestep, torch.tensor(drops_image), torch.tensor(drops_text)


def with_dropout(batch: Batch, draws: Draws, absence: Absence) -> Batch:
    """Put the variant's "no image" in place of all objects' features, "" in place of the prompt. Names stay."""
    image_B, text_B = draws.drops_image_B, draws.drops_text_B
    features_BNF, prompt_BTE = batch.features_BNF, batch.prompt_BTE
    return replace(
        batch,
        features_BNF=torch.where(image_B.reshape(-1, *[1] * (features_BNF.ndim - 1)), absence.features_F, features_BNF),
        prompt_BTE=torch.where(text_B[:, None, None], absence.prompt_TE, prompt_BTE),
        pooled_BD=torch.where(text_B[:, None], absence.pooled_D, batch.pooled_BD),
    )


def losses(
    unet: nn.Module,
    adapter: MIPAdapter,
    schedule: NoiseSchedule,
    batch: Batch,
    draws: Draws,
    *,
    merge: Merge,
    is_gated: bool,
) -> Tensor:
    """Mean squared error of each sample: (B,), float32, at scale 1.

    `unet` has the adapter installed; it may be wrapped (autocast, data parallel).
    """
    latents_BCHW = batch.mean_BCHW + batch.std_BCHW * draws.latent_noise_BCHW
    noisy_BCHW = schedule.scheduler.add_noise(latents_BCHW, draws.noise_BCHW, draws.timestep_B)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():  # the projection is frozen, as in the paper
        image_BNRE = adapter.image_tokens(batch.features_BNF)
    references = References(
        image_BNRE=image_BNRE,
        phrase_BNTE=batch.phrase_BNTE,
        words_BNT=batch.words_BNT,
        present_BN=batch.present_BN,
        scale_BN=torch.ones_like(batch.present_BN, dtype=torch.float32),
        merge=merge,
        is_gated=is_gated,
    )
    predicted_BCHW = unet(
        noisy_BCHW,
        draws.timestep_B,
        encoder_hidden_states=batch.prompt_BTE,
        added_cond_kwargs={"text_embeds": batch.pooled_BD, "time_ids": batch.time_ids_B6},
        cross_attention_kwargs={"references": references},
        return_dict=False,
    )[0]
    error_BCHW = predicted_BCHW.float() - schedule.target(latents_BCHW, draws).float()
    return error_BCHW.square().flatten(1).mean(dim=1)
