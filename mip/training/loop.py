"""Trains the adapter's own weights on cached features; goes on bit for bit where it was stopped.

One process, or several under `accelerate launch`: samples, noise and dropped conditions are the same for any number.
"""

import logging
import math
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mip.config import Models, Train
from mip.errors import ConfigError, DataError, TrainingError
from mip.model.checkpoint import find_adapter
from mip.tables import file_hash, fingerprint
from mip.training.checkpoints import load_state, save_state
from mip.training.dataset import Batch, FeatureSet, Loaded, Sampler
from mip.training.live import Live
from mip.training.networks import base_weights, device_named
from mip.training.objective import Draws, Dropout, NoiseSchedule, losses, with_dropout
from mip.training.optimization import Average, in_place, learning_rate, make_optimizer
from mip.training.progress import Progress
from mip.training.reporting import Reporter, check_trackers, peak_memory
from mip.training.results import write_results
from mip.training.samples import Painter, grid_file, write_grid
from mip.training.start import load_unet, start_adapter

log = logging.getLogger(__name__)
# Parameters that may change between the parts of a run: they have no influence on the weights.
_HARMLESS = {
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_checkpoints",
    "on_bad_loss",
    "patience",
    "samples",
    "trackers",
}

Micro = list[tuple[Loaded, Draws]]  # the micro-batches of one step, of this process


def train(config: Train, *, models: Models, features: Path, out: Path, work: Path) -> Path:
    """Write adapter.safetensors, curve.parquet (kind curve), training.json, README.md and curve.png into `out`.

    With `ema` the adapter is the average, and adapter-raw.safetensors holds the weights of the last step.
    With `samples`, out/samples holds what was drawn, a PNG a time.

    `work` holds the states of an unfinished run; the same call takes them up again. What local trackers write lies in
    work/logs, a folder a run, and stays there: it holds times, so it would make every result another one.

    Raises:
        ConfigError: parameters that contradict one another or the machine.
        DataError: features without a training sample.
        CheckpointError: an IP-Adapter that does not fit the base.
        TrainingError: the loss was no number for several steps in a row.
    """
    run = _Run(config, models=models, features=features, work=work)
    if run.progress.step == 0:
        run.progress.validation_before = run.validate()
    reporter = Reporter(run.accelerator, config=config, logs=work / "logs" / run.states.name)
    with reporter, ThreadPoolExecutor(1) as background:
        ahead = background.submit(run.load, run.progress.step)
        while run.progress.step < config.steps:
            started = time.monotonic()
            micro = ahead.result()
            waited = time.monotonic() - started
            if run.progress.step + 1 < config.steps:
                ahead = background.submit(run.load, run.progress.step + 1)
            run.step(micro)
            run.progress.waited_s += waited
            run.progress.seconds += time.monotonic() - started
            picture = run.draw()
            run.after_step()
            reporter.step(run.progress)
            if picture is not None:
                reporter.show(picture, step=run.progress.step)
    run.finish(out)
    return out


class _Run:
    def __init__(self, config: Train, *, models: Models, features: Path, work: Path) -> None:
        self.config, self.models = config, models
        device = device_named(models.device)
        if config.precision == "fp16" and device.type == "cpu":
            raise ConfigError("got precision fp16 on a CPU; set it to bf16 or no")
        self.accelerator = Accelerator(
            mixed_precision=config.precision,
            cpu=device.type == "cpu",
            log_with=check_trackers(config.trackers) or None,
            project_dir=work,
        )
        _check_kind(self.accelerator.distributed_type)
        self.local_batch = _share(config, self.accelerator.num_processes)
        self.dropout = Dropout(image=config.drop_image, text=config.drop_text, both=config.drop_both)
        live = Live.of(features, models=models)
        self.data, self.held_out = (FeatureSet(features, split=split, live=live) for split in ("train", "val"))
        if len(self.data) == 0:
            raise DataError(f"got no training sample in {features}; loosen the manifest's thresholds")
        self.sampler = Sampler(self.data.weights, batch=config.batch, seed=config.seed)
        self.schedule = NoiseSchedule.of(models, config)
        self.absence = self.data.absence().to(self.accelerator.device)
        self.is_gated = config.gated and config.merge == "weighted"

        unet = load_unet(models, precision=config.precision)
        self.start = find_adapter(models.ip_adapter, models.ip_adapter_weight)
        self.adapter = start_adapter(self.start, unet, config=config, models=models)
        self.adapter.install(unet)
        self.parameters = self.adapter.trainable_parameters()
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        optimizer = make_optimizer(config, self.parameters, device=self.accelerator.device)
        self.unet, self.optimizer = self.accelerator.prepare(unet, optimizer)
        self.adapter.projection.to(self.accelerator.device)
        self.painter = self._painter()
        self.average = None if config.ema is None else Average(self.adapter.layers, decay=config.ema)

        self.inputs = {
            "features": file_hash(features / "index.parquet"),
            "start": file_hash(self.start),
            "base": base_weights(models).identity("unet"),
        }
        decisive = config.model_dump(mode="json", exclude=_HARMLESS)
        self.states = work / fingerprint(config=decisive, models=models, **self.inputs, torch=torch.__version__)
        self.progress = self._resume()
        self.saved_at = time.monotonic()

    def load(self, step: int) -> Micro:
        """This process's part of a step's samples."""
        first = self.accelerator.process_index * self.local_batch
        places = self.sampler.places(step)[first : first + self.local_batch]
        return list(self._micro(places, [(step, first + i) for i in range(self.local_batch)]))

    def _micro(self, places: list[int], keys: list[tuple[int, int]]) -> Iterator[tuple[Loaded, Draws]]:
        for start in range(0, len(places), self.config.micro_batch):
            loaded = self.data.read(places[start : start + self.config.micro_batch])
            chosen = keys[start : start + self.config.micro_batch]
            options: dict[str, Any] = {"seed": self.config.seed, "offset": self.config.noise_offset}
            yield loaded, self.schedule.draw(loaded.latent_shape, keys=chosen, dropout=self.dropout, **options)

    def step(self, micro: Micro) -> None:
        """One optimizer step; without a finite loss or gradient the weights stay as they are."""
        parts = []
        for number, (loaded, draws) in enumerate(micro, start=1):
            batch = loaded.encode()  # here: what networks give depends on the way attention is computed below
            # Gradients are exchanged once a step, with those of the last micro-batch.
            exchange = nullcontext() if number == len(micro) else self.accelerator.no_sync(self.unet)
            with exchange, self._attention():
                loss_B = self._weighted(self._losses(batch, draws), draws)
                self.accelerator.backward(loss_B.sum() / self.local_batch)
            parts.append(loss_B.detach())
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf)
        assert norm is not None
        loss_B = torch.cat(parts)
        # The one value a step that is read back: the guard cannot do without it.
        loss = float(self.accelerator.reduce(loss_B.mean(), reduction="mean"))  # pyright: ignore[reportArgumentType]
        # In half precision an infinite gradient is the scaler's affair, and so is the step then.
        is_scaled = self.accelerator.scaler is not None
        is_sound = math.isfinite(loss) and (is_scaled or bool(norm.isfinite()))
        rate = learning_rate(self.progress.step, config=self.config)
        if is_sound or is_scaled:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None and is_sound and bool(norm.isfinite()):
            self.average.update()
        self.progress.record(loss, rate=rate, batch=self.config.batch)
        self._guard(is_sound, [name for loaded, _ in micro for name in loaded.sample_ids], loss_B)

    def draw(self) -> Image.Image | None:
        """Draw and keep the held-out samples where it is due, before the step's state is saved; the main process alone.

        Of the averaged weights where there are any, like the validation loss.
        """
        step, config = self.progress.step, self.config.samples
        if self.painter is None or config is None or (step % config.every and step != self.config.steps):
            return None
        with in_place(self.average):
            picture = self.painter.draw()
        write_grid(grid_file(self.states / "samples", step), picture)
        return picture

    def after_step(self) -> None:
        """Validate and save the state where it is due."""
        step = self.progress.step
        if step % self.config.validation_every == 0 or step == self.config.steps:
            self.progress.curve[-1]["validation_loss"] = value = self.validate()
            log.info("step %d: loss %.4f, validation %s", step, self.progress.curve[-1]["loss"], value)
        minutes = (time.monotonic() - self.saved_at) / 60
        is_old = self.config.checkpoint_minutes is not None and minutes >= self.config.checkpoint_minutes
        if is_old or step % self.config.checkpoint_every == 0 or step == self.config.steps:
            self._save()

    def validate(self) -> float | None:
        """Mean loss over the first validation samples, on noise that is always the same; None without samples.

        It is the plain error, of the averaged weights where there are any: those that will be used.
        """
        count = min(len(self.held_out), self.config.validation_batches * self.config.batch)
        if count == 0:
            return None
        total = torch.zeros((), device=self.accelerator.device)
        mine = list(range(self.accelerator.process_index, count, self.accelerator.num_processes))
        with torch.no_grad(), in_place(self.average):
            for start in range(0, len(mine), self.config.micro_batch):
                places = mine[start : start + self.config.micro_batch]
                batch = self.held_out.batch(places)
                shape = batch.mean_BCHW.shape[1:]
                draws = self.schedule.spread(shape, places=places, count=count, seed=self.config.seed)
                with self._attention():
                    total += self._losses(batch, draws).sum()
        return float(self.accelerator.reduce(total, reduction="sum")) / count  # pyright: ignore[reportArgumentType]

    def finish(self, out: Path) -> None:
        """Write the results, then remove the states."""
        if self.accelerator.is_main_process:
            # Copied: a process that is killed in here ends the run once more.
            shutil.rmtree(out / "samples", ignore_errors=True)
            if (self.states / "samples").is_dir():
                shutil.copytree(self.states / "samples", out / "samples")
            write_results(
                out,
                config=self.config,
                models=self.models,
                adapter=self.adapter,
                average=self.average,
                progress=self.progress,
                inputs=self.inputs,
                features_from=self.data.made_from,
                machine={
                    "processes": self.accelerator.num_processes,
                    "device": self.accelerator.device.type,
                    "peak_memory_bytes": peak_memory(self.accelerator.device),
                },
            )
            shutil.rmtree(self.states)
        self.accelerator.wait_for_everyone()

    def _painter(self) -> Painter | None:
        if self.config.samples is None or len(self.held_out) == 0 or not self.accelerator.is_main_process:
            return None
        return Painter(
            self.config,
            self.config.samples,
            models=self.models,
            held_out=self.held_out,
            unet=self.accelerator.unwrap_model(self.unet),
            adapter=self.adapter,
        )

    def _losses(self, batch: Batch, draws: Draws) -> Tensor:
        device = self.accelerator.device
        batch, draws = batch.to(device), draws.to(device)
        batch = with_dropout(batch, draws, self.absence)
        return losses(
            self.unet, self.adapter, self.schedule, batch, draws, merge=self.config.merge, is_gated=self.is_gated
        )

    def _weighted(self, loss_B: Tensor, draws: Draws) -> Tensor:
        if self.config.snr_gamma is None:
            return loss_B
        return loss_B * self.schedule.min_snr(draws.timestep_B, gamma=self.config.snr_gamma).to(loss_B)

    def _attention(self) -> AbstractContextManager[object]:
        # On CPUs the backward pass of the fused kernel takes a third of a step at these numbers of positions.
        return sdpa_kernel(SDPBackend.MATH) if self.accelerator.device.type == "cpu" else nullcontext()

    def _guard(self, is_sound: bool, sample_ids: list[str], loss_B: Tensor) -> None:
        if is_sound:
            self.progress.failures = 0
            return
        self.progress.failures += 1
        named = [name for name, loss in zip(sample_ids, loss_B.tolist(), strict=True) if not math.isfinite(loss)]
        culprits = ", ".join(named or sample_ids)
        log.warning(
            "step %d: no finite loss or gradient, weights left as they are; samples: %s", self.progress.step, culprits
        )
        self.progress.skipped.append(f"{self.progress.step}: {culprits}")
        if self.config.on_bad_loss == "stop" and self.progress.failures >= self.config.patience:
            raise TrainingError(
                f"got no finite loss in {self.progress.failures} steps in a row, up to step {self.progress.step}, "
                f"the last with samples {culprits}; lower the learning rate, or leave these samples out"
            )

    def _save(self) -> None:
        self.saved_at = time.monotonic()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "layers": self.adapter.layers.state_dict(),
                "average": None if self.average is None else self.average.weights,
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "progress": vars(self.progress),
            }
            save_state(self.states, state, step=self.progress.step, keep=self.config.keep_checkpoints)

    def _resume(self) -> Progress:
        state = load_state(self.states, device=self.accelerator.device)
        if state is None:
            return Progress()
        self.adapter.layers.load_state_dict(state["layers"])
        if self.average is not None:
            self.average.load(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        progress = Progress(**state["progress"])
        log.info("going on after step %d", progress.step)
        return progress


def _share(config: Train, processes: int) -> int:
    if config.batch % processes:
        raise ConfigError(f"got batch {config.batch} for {processes} processes; give a multiple")
    return config.batch // processes


def _check_kind(kind: DistributedType) -> None:
    # The adapter's weights are read and written as a whole, by one process: never by parts of it.
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"got {kind.value} from accelerate's launcher; the adapter and a frozen UNet fit one GPU: launch with "
            "--multi_gpu, and without a configuration file that says otherwise"
        )
