"""In which part of the denoising steps references act."""

from dataclasses import dataclass
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from mip.errors import ReferencesError


@dataclass(frozen=True)
class Window:
    """References act in the steps whose number, from 0, is at least `start` and less than `end` of all steps.

    Raises:
        ReferencesError: not 0 <= start < end <= 1.
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise ReferencesError(
                f"got reference_start={self.start} and reference_end={self.end}; give shares of the steps, "
                "0 <= start < end <= 1"
            )

    def apply(self, arguments: dict[str, Any], *, resting: dict[str, Any] | None) -> None:
        """Swap the parent's `cross_attention_kwargs` for `resting` in the steps outside, by its callback.

        `arguments` are those of the parent's call; they hold what is to be used inside. A callback that is there
        already runs first, with the tensors that it asks for.
        """
        acting, own = arguments["cross_attention_kwargs"], arguments["callback_on_step_end"]
        if isinstance(own, PipelineCallback | MultiPipelineCallbacks):
            # The parent asks only these two for what they read, and will see a plain function.
            arguments["callback_on_step_end_tensor_inputs"] = own.tensor_inputs

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            changed = tensors if own is None else own(pipe, step, timestep, tensors)
            # The parent reads this attribute at every step.
            pipe._cross_attention_kwargs = acting if self._includes(step + 1, pipe.num_timesteps) else resting
            return changed

        if (self.start, self.end) != (0, 1):
            arguments["callback_on_step_end"] = after_step
            arguments["cross_attention_kwargs"] = acting if self._includes(0, 1) else resting

    def _includes(self, step: int, steps: int) -> bool:
        # A quotient, for .7 * 10 is more than 7.
        return self.start <= step / steps < self.end
