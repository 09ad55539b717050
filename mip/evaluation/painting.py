"""Draws tasks with one method: the pipeline, its weights, batches, and what is kept beside an image.

N references   H, W latent height and width
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from accelerate.utils import convert_outputs_to_fp32
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mip.config import Generate, Models
from mip.errors import CheckpointError
from mip.evaluation.benchmarks import load_reference
from mip.evaluation.encoders import version_of
from mip.evaluation.layouts import Layouts
from mip.evaluation.methods import Method
from mip.loading import load_pipeline
from mip.model.maps import RelevanceMaps
from mip.model.pipeline import MIPAdapterXLPipeline, Reference
from mip.tables import Row, atomic, file_hash, fingerprint

_MODEL_CODE = Path(__file__).parents[1] / "model"


@dataclass(frozen=True)
class Job:
    """A batch to draw, and where to."""

    tasks: Sequence[Row]
    scale: float | None
    folder: Path
    has_maps: bool


@dataclass(eq=False)
class Painter:
    """One method with its weights. The pipeline is loaded when the first image has to be drawn."""

    config: Generate
    name: str
    method: Method
    models: Models
    weights: Path | None  # of our adapter; None for the plain IP-Adapter or the base
    layouts: Layouts | None = None  # start from scenes that give the places
    _references: dict[str, Reference] = field(default_factory=dict)

    @cached_property
    def made_from(self) -> dict[str, str]:
        """Hashes of parameters, weights and code that the images depend on (the batch too: it moves the last bits)."""
        settings = self.config.model_dump(
            mode="json", include={"steps", "guidance", "negative_prompt", "precision", "batch", "maps"}
        )
        networks = self.models.model_dump(
            mode="json", exclude={"device"} if self.method.has_references else _UNUSED_BY_BASE
        )
        here = Path(__file__)
        files = [here, here.with_name("layouts.py"), *sorted(_MODEL_CODE.glob("*.py"))]
        code = {path.name: file_hash(path) for path in files}
        start = {} if self.layouts is None else {"layouts": self.layouts.version}
        return {
            **start,
            "params": fingerprint(settings=settings, method=asdict(self.method)),
            "models": version_of(torch, diffusers, transformers, **networks),
            "adapter": file_hash(self._checked_weights()) if self.weights is not None else "",
            "code": fingerprint(**code),
        }

    @property
    def version(self) -> str:
        """All of it in one hash."""
        return fingerprint(method=self.name, **self.made_from)

    def missing(self, tasks: Sequence[Row], *, scale: float | None, folder: Path, maps: int) -> list[Job]:
        """The batches of which something is not yet in `folder`: an image, or the map of one of the first `maps` tasks.

        Batches are always the same ones: one that was interrupted is drawn anew, to the same bits.
        """
        # The tasks with maps have batches of their own in every method, so that methods see equal batches.
        first, rest = tasks[: self.config.maps], tasks[self.config.maps :]
        batches = [*_batches(first, self.config.batch), *_batches(rest, self.config.batch)]
        jobs = [Job(batch, scale, folder, number * self.config.batch < maps) for number, batch in enumerate(batches)]
        return [job for job in jobs if not all(path.exists() for path in _files(job))]

    def draw(self, job: Job) -> None:
        """Write <task_id>.png, where it is missing, and maps/<task_id>.npz."""
        images, maps = self._draw_batch(job.tasks, scale=job.scale, with_maps=job.has_maps)
        for task, image, own_maps in zip(job.tasks, images, maps, strict=True):
            if own_maps is not None:
                _save_map(map_path(job.folder, task), own_maps)
            if not image_path(job.folder, task).exists():
                save_png(image_path(job.folder, task), image, self._metadata(task, job.scale))

    def __getstate__(self) -> dict[str, Any]:
        # Another process loads its own pipeline.
        return {name: value for name, value in vars(self).items() if name != "_pipeline"}

    def _draw_batch(
        self, tasks: Sequence[Row], *, scale: float | None, with_maps: bool
    ) -> tuple[list[Image.Image], Sequence[RelevanceMaps | None]]:
        pipe = self._pipeline
        side = self.models.resolution
        own: dict[str, Any] = {}
        if self.method.has_references:
            own = {
                "references": [self._references_of(task) for task in tasks],
                "scale": scale,
                "merge": self.method.merge,
                "gated": self.method.gated,
                "oracle": self.method.oracle,
                "return_maps": with_maps,
            }
        # One CPU generator per image: its noise does not depend on the batch, nor on the device.
        generators = [torch.Generator().manual_seed(task["seed"]) for task in tasks]
        if self.layouts is not None:
            own["latents"] = self.layouts.latents(pipe, tasks, generators, steps=self.config.steps)
        result = pipe(
            [task["prompt"] for task in tasks],
            negative_prompt=[self.config.negative_prompt] * len(tasks),
            height=side,
            width=side,
            num_inference_steps=self.config.steps,
            guidance_scale=self.config.guidance,
            generator=generators,
            **own,
        )
        return result.images, getattr(result, "maps", None) or [None] * len(tasks)

    def _references_of(self, task: Row) -> list[Reference]:
        references = [self._reference(reference) for reference in task["references"]]
        if not self.method.oracle:
            return references
        assert self.layouts is not None, "only layouts know the true masks"
        regions = self.layouts.regions(task)
        return [replace(reference, region=region) for reference, region in zip(references, regions, strict=True)]

    def _reference(self, reference: Row) -> Reference:
        key = json.dumps(reference)
        if key not in self._references:
            boxes = reference["boxes"] or [[]] * len(reference["images"])
            photos = [load_reference(Path(p), box) for p, box in zip(reference["images"], boxes, strict=True)]
            self._references[key] = Reference(reference["name"], photos)
        return self._references[key]

    @cached_property
    def _pipeline(self) -> MIPAdapterXLPipeline:
        pipe = load_pipeline(self.models, adapter=self.weights, has_references=self.method.has_references)
        if self.layouts is not None:
            pipe.scheduler = self.layouts.late(pipe.scheduler)
        if self.config.precision != "no":
            dtype = torch.float16 if self.config.precision == "fp16" else torch.bfloat16
            # As the adapter was trained. What is kept from step to step stays wide, and so does the autoencoder.
            narrow = torch.autocast(pipe.device.type, dtype)(pipe.unet.forward)
            pipe.unet.forward = convert_outputs_to_fp32(narrow)
        return pipe

    def _checked_weights(self) -> Path:
        assert self.weights is not None
        if not self.weights.is_file():
            raise CheckpointError(f"there are no adapter weights at {self.weights}; run train first")
        return self.weights

    def _metadata(self, task: Row, scale: float | None) -> dict[str, Any]:
        known = {"task": task["task_id"], "prompt": task["prompt"], "seed": task["seed"]}
        return {**known, "method": self.name, "scale": scale, "made_from": self.made_from}


_UNUSED_BY_BASE = {"device", "image_encoder", "image_encoder_subfolder", "ip_adapter", "ip_adapter_weight", "variant"}


def save_png(path: Path, image: Image.Image, metadata: Mapping[str, Any]) -> Path:
    """Write an image, whole or not at all, with the metadata as JSON in its text chunk "mip"; no clock in its bytes."""
    info = PngInfo()
    info.add_text("mip", json.dumps(dict(metadata), sort_keys=True))
    with atomic(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
    return path


def _batches(tasks: Sequence[Row], size: int) -> list[Sequence[Row]]:
    return [tasks[start : start + size] for start in range(0, len(tasks), size)]


def _files(job: Job) -> list[Path]:
    maps = [map_path(job.folder, task) for task in job.tasks if job.has_maps]
    return maps + [image_path(job.folder, task) for task in job.tasks]


def image_path(folder: Path, task: Row) -> Path:
    return folder / f"{task['task_id']}.png"


def map_path(folder: Path, task: Row) -> Path:
    return folder / "maps" / f"{task['task_id']}.npz"


def _save_map(path: Path, maps: RelevanceMaps) -> None:
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez(file, relevance_NHW=maps.mean_NHW.numpy(), names=np.array(maps.names))
