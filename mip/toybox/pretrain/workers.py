"""Two single-threaded processes that average their gradients beat two OpenMP threads on a busy machine."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn


@dataclass(frozen=True)
class Workers:
    """One of `count` processes that train the same model."""

    rank: int
    count: int

    def average_gradients(self, model: nn.Module) -> None:
        """Leave in every worker the mean of all workers' gradients."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self.add_up(gradients)
        for gradient in gradients:
            gradient /= self.count

    def add_up(self, tensors: list[Tensor]) -> None:
        """Leave in every worker the sum of all workers' tensors."""
        if self.count == 1:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()


ALONE = Workers(rank=0, count=1)


def run(function: Callable[[Workers], None], *, count: int, rendezvous: Path) -> None:
    """Call `function(workers)` in `count` processes; it must be importable. Ends when all have ended."""
    if count == 1:
        function(ALONE)
        return
    rendezvous.unlink(missing_ok=True)
    spawn(_start, args=(function, count, rendezvous), nprocs=count)


def _start(rank: int, function: Callable[[Workers], None], count: int, rendezvous: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(message)s")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous.absolute()}", rank=rank, world_size=count)
    function(Workers(rank, count))
    dist.destroy_process_group()
