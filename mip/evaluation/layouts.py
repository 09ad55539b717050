"""Scenes that give the places of a task's objects: sampling starts from them, noised, and decides the looks alone.

B tasks   C, H, W latent channels, height and width   N references   Y, X height and width of a mask in pixels
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from mip.errors import ConfigError, DataError
from mip.evaluation.judge import Drawn, rendered_scenes
from mip.tables import Row, file_hash, fingerprint


@dataclass(frozen=True)
class Layouts:
    """A folder of tasks.parquet, images/<task_id>.png and masks/<task_id>.npz (masks_NYX, bool, one a reference).

    `level` is the timestep to which the scenes are noised; sampling begins at the first step that is not above it.
    """

    folder: Path
    level: int

    @cached_property
    def version(self) -> str:
        """All that decides where sampling starts, in one hash."""
        return fingerprint(scenes=file_hash(self.folder), level=self.level)

    @cached_property
    def tasks(self) -> list[Row]:
        """Rows of kind "tasks", with the references' files where they are."""
        return [drawn.task for drawn in self._scenes]

    @cached_property
    def _scenes(self) -> list[Drawn]:
        return rendered_scenes(self.folder)

    def late(self, scheduler: Any) -> DDIMScheduler:
        """The scheduler without the steps above the level.

        Raises:
            ConfigError: a scheduler whose steps depend on one another, or no step that is left.
        """
        if not isinstance(scheduler, DDIMScheduler):
            raise ConfigError(f"got the scheduler {type(scheduler).__name__}; layouts need a base with DDIMScheduler")
        level = self.level

        class Late(DDIMScheduler):
            def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
                super().set_timesteps(num_inference_steps, device)
                self.timesteps = self.timesteps[self.timesteps <= level]
                if not len(self.timesteps):
                    raise ConfigError(f"got level {level}, below the last of {num_inference_steps} steps; raise it")

        late = Late.from_config(scheduler.config)
        assert isinstance(late, Late)
        return late

    @torch.no_grad()
    def latents(
        self,
        pipe: StableDiffusionXLPipeline,
        tasks: Sequence[Row],
        generators: Sequence[torch.Generator],
        *,
        steps: int,
    ) -> Tensor:
        """The scenes' latents (B, C, H, W), with the noise of the first step that the late scheduler takes."""
        images = {drawn.task["task_id"]: drawn for drawn in self._scenes}
        pixels = pipe.image_processor.preprocess([images[task["task_id"]].open() for task in tasks])
        scheduler, vae = self.late(pipe.scheduler), pipe.vae
        scheduler.set_timesteps(steps)
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode() * vae.config["scaling_factor"]
        noise = randn_tensor(latents.shape, generator=list(generators), device=latents.device, dtype=latents.dtype)
        return scheduler.add_noise(latents, noise, scheduler.timesteps[:1].expand(len(tasks)))  # pyright: ignore[reportArgumentType]

    def regions(self, task: Row) -> list[Tensor]:
        """The true mask of each reference's object, (Y, X) in {0, 1}. Raises DataError where they are missing."""
        path = self.folder / "masks" / f"{task['task_id']}.npz"
        if not path.is_file():
            raise DataError(f"there is no {path}; the oracle needs the masks of every layout")
        with np.load(path, allow_pickle=False) as file:
            return list(torch.from_numpy(file["masks_NYX"]).float())
