"""Processes that share the batches of a painter, one a GPU.

On two CPU cores there is nothing to gain: two processes drew 96 images in the time of one with two threads, and took
eight seconds more to start.
"""

import multiprocessing
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType

import torch

from mip.evaluation.painting import Job, Painter
from mip.tables import Row


class Crew:
    """A context that draws; with one process it is this one. Workers keep their pipelines until it ends."""

    def __init__(self, processes: int) -> None:
        self._pool = None if processes == 1 else _pool(processes)

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def draw(self, painter: Painter, tasks: Sequence[Row], *, scale: float | None, folder: Path, maps: int) -> None:
        """Draw what is not yet in `folder`: <task_id>.png, and maps/<task_id>.npz of the first `maps` tasks.

        The same images for any number of processes, but for the last bits of their arithmetic.
        """
        jobs = painter.missing(tasks, scale=scale, folder=folder, maps=maps)
        if self._pool is None:
            for job in jobs:
                painter.draw(job)
            return
        for _ in self._pool.map(partial(_draw, painter), jobs):
            pass


def _pool(processes: int) -> ProcessPoolExecutor:
    # Never forked: a process that has used CUDA or threads cannot be.
    context = multiprocessing.get_context("spawn")
    ranks = context.SimpleQueue()
    for rank in range(processes):
        ranks.put(rank)
    return ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(ranks, processes))


def _start(ranks: "multiprocessing.SimpleQueue[int]", processes: int) -> None:
    rank = ranks.get()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    # A stage that is killed must not leave its workers behind.
    threading.Thread(target=end_with_parent, daemon=True).start()
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))


_painters: dict[str, Painter] = {}  # of this worker


def _draw(painter: Painter, job: Job) -> None:
    _painters.setdefault(painter.version, painter).draw(job)
