"""How a run says where it is: a bar on a terminal, else lines in the log; and its values to the trackers asked for."""

import logging
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import (
    LOGGER_TYPE_TO_CLASS,
    GeneralTracker,
    TensorBoardTracker,
    get_available_trackers,
)
from accelerate.utils import LoggerType
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mip.config import Train
from mip.errors import ConfigError
from mip.training.progress import Progress

log = logging.getLogger(__name__)
PAUSE = 30.0  # seconds between two lines where there is no bar
_COLUMNS = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))


def check_trackers(names: Sequence[str]) -> list[str | LoggerType | GeneralTracker]:
    """The names, as accelerate takes them. Raises ConfigError for one that is unknown or not installed."""
    usable = {str(one) for one in get_available_trackers()} | (set(LOGGER_TYPE_TO_CLASS) - set(LoggerType.list()))
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(f"got tracker {name!r}; expected some of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in usable:
            raise ConfigError(
                f"got tracker {name!r}, which is not installed; run `pip install {name}`, or leave it out"
            )
    return list(names)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on the device so far, or on a CPU this process."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.accelerator.max_memory_allocated(device)


class Reporter:
    """Open it around the steps. Only the main process says anything.

    Local trackers write to `logs`; their files are complete when the reporter is closed. A run that is taken up
    again adds files.
    """

    def __init__(self, accelerator: Accelerator, *, config: Train, logs: Path) -> None:
        self.accelerator, self.batch, self.said_at = accelerator, config.batch, time.monotonic()
        console = Console(stderr=True)
        has_bar = accelerator.is_main_process and console.is_terminal
        self.bar = Bar(*_COLUMNS, console=console, disable=not has_bar)
        self.task = self.bar.add_task("", total=config.steps)
        if config.trackers:
            accelerator.project_configuration.logging_dir = str(logs)
            plain = {
                name: value if isinstance(value, int | float | str) else str(value)
                for name, value in config.model_dump(mode="json").items()
            }
            accelerator.init_trackers("mip", config=plain)

    def __enter__(self) -> "Reporter":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        # Not end_training(), which also ends the talk between the processes.
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def step(self, progress: Progress) -> None:
        """Say where the run is after a step."""
        speed = progress.step * self.batch / progress.seconds
        waits, memory = progress.waited_s / progress.seconds, peak_memory(self.accelerator.device) / 2**30
        last = progress.curve[-1]
        values = {name: last[name] for name in ("loss", "validation_loss", "learning_rate") if last[name] is not None}
        self.accelerator.log(
            {**values, "samples_per_s": speed, "data_wait_share": waits, "peak_memory_gib": memory}, step=progress.step
        )
        said = f"loss {last['loss']:.4f}, {speed:.1f} samples/s, {waits:.0%} waiting for data, {memory:.1f} GiB"
        self.bar.update(self.task, completed=progress.step, description=said)
        is_due = time.monotonic() - self.said_at >= PAUSE
        if self.bar.disable and is_due and self.accelerator.is_main_process:
            self.said_at = time.monotonic()
            log.info("step %d of %d: %s", progress.step, self.bar.tasks[0].total, said)

    def show(self, picture: Image.Image, *, step: int) -> None:
        """Hand drawn samples to the trackers that take images."""
        for tracker in self.accelerator.trackers:
            if isinstance(tracker, TensorBoardTracker):
                tracker.log_images({"samples": np.asarray(picture)[None]}, step=step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({"samples": [picture]}, step=step)  # pyright: ignore[reportAttributeAccessIssue]
