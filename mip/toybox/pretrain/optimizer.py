"""Muon for matrices, AdamW for the rest: the base trains clearly faster with it than with AdamW alone."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from mip.toybox.pretrain.workers import ALONE, Workers

_STEPS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic Newton-Schulz iteration, Jordan et al. 2024


def orthogonalised(update: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix to `update` (rows x columns), approximately."""
    a, b, c = _COEFFICIENTS
    wide = update.T if update.shape[0] > update.shape[1] else update
    x = wide.bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if update.shape[0] > update.shape[1] else x).to(update.dtype)


class Muon(Optimizer):
    """Momentum whose update is orthogonalised; convolution kernels count as (out, in * h * w) matrices.

    Each worker orthogonalises every n-th matrix, and all gather the updates.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        workers: Workers = ALONE,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.workers = workers

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            updates = [torch.zeros_like(p) for p in parameters]
            for place, (parameter, update) in enumerate(zip(parameters, updates, strict=True)):
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                if place % self.workers.count == self.workers.rank:
                    matrix = parameter.grad.lerp(momentum, group["momentum"]).flatten(1)
                    update.copy_(orthogonalised(matrix).view_as(parameter))
            self.workers.add_up(updates)
            for parameter, update in zip(parameters, updates, strict=True):
                # Equal root-mean-square over shapes, at the size of a typical AdamW update.
                scale = 0.2 * math.sqrt(max(parameter.flatten(1).shape))
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def optimizers(model: nn.Module, lr: float, workers: Workers = ALONE) -> list[Optimizer]:
    """Muon for hidden matrices and kernels; AdamW for embeddings, biases, norms and the first and last layers."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim < 2 or "embedding" in name or "conv_in" in name or "conv_out" in name
        (rest if plain else matrices).append(parameter)
    chosen: list[Optimizer] = [AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]
    return [*chosen, Muon(matrices, lr=lr, workers=workers)] if matrices else chosen


def scheduled(step: int, steps: int, warm_up: int = 100) -> float:
    """Warm-up, constant to 35 %, then cosine to zero: the decay made the largest difference in the prototype."""
    if step < warm_up:
        return (step + 1) / warm_up
    start = 0.35 * steps
    return 1.0 if step < start else 0.5 * (1 + math.cos(math.pi * min(1.0, (step - start) / (steps - start))))
