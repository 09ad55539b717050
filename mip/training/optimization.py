"""How the weights move: the optimizer, its learning rate, and the weights' moving average."""

import importlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mip.config import Train
from mip.errors import ConfigError


def make_optimizer(config: Train, parameters: Iterable[nn.Parameter], *, device: torch.device) -> torch.optim.Optimizer:
    """AdamW in the implementation asked for. Betas and epsilon are those of the paper's code, which are torch's own.

    Raises:
        ConfigError: 8 bits on a CPU, or without bitsandbytes.
    """
    kind = torch.optim.AdamW
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw_fused":
        return kind(parameters, **options, fused=True)
    if config.optimizer == "adamw_8bit":
        if device.type == "cpu":
            raise ConfigError("got optimizer adamw_8bit on a CPU; set it to adamw or adamw_fused")
        try:
            kind = importlib.import_module("bitsandbytes.optim").AdamW8bit
        except ImportError as error:
            raise ConfigError(
                f"got optimizer adamw_8bit without a usable bitsandbytes ({error}); run `pip install bitsandbytes`, or "
                "set it to adamw or adamw_fused"
            ) from None
    return kind(parameters, **options)


def learning_rate(step: int, *, config: Train) -> float:
    """Of the step after `step` ones: a linear warm-up, then constant or half a cosine down to 0."""
    if step < config.warm_up:
        return config.learning_rate * (step + 1) / config.warm_up
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warm_up) / max(1, config.steps - config.warm_up)
    return config.learning_rate * (1 + math.cos(math.pi * done)) / 2


class Average:
    """Exponential moving average of a module's weights, in float32; it starts from the weights as they are.

    `decay` lies between 0 and 1, both exclusive: how much of the average a step leaves.
    """

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        self.module, self.decay = module, decay
        self.weights = _copied(module)

    def update(self) -> None:
        """Take in the present weights: average <- decay * average + (1 - decay) * weights."""
        present = self.module.state_dict()
        for key, average in self.weights.items():
            average.lerp_(present[key].float(), 1 - self.decay)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from a saved average."""
        for key, average in self.weights.items():
            average.copy_(weights[key])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the module holds the average; afterwards its own weights again, bit for bit."""
        own = _copied(self.module)
        self.module.load_state_dict(self.weights)
        try:
            yield
        finally:
            self.module.load_state_dict(own)


def in_place(average: Average | None) -> AbstractContextManager[None]:
    """The average in place of the weights, where there is one."""
    return nullcontext() if average is None else average.in_place()


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.detach().float().clone() for key, tensor in module.state_dict().items()}
