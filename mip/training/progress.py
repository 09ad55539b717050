"""How far a run is: what it keeps in its state beside weights and optimizer, and what it says of itself at the end."""

from dataclasses import dataclass, field
from typing import Any

from mip.tables import Row


@dataclass
class Progress:
    """All that a state holds beside weights and optimizer."""

    step: int = 0  # optimizer steps done; decides samples, draws and learning rate of the next one
    curve: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # "step: samples" of the steps without a finite loss
    failures: int = 0  # of these, in a row
    validation_before: float | None = None
    seconds: float = 0.0  # in steps
    waited_s: float = 0.0  # of these, for data

    def record(self, loss: float, *, rate: float, batch: int) -> None:
        """Count a step of `batch` samples over all processes, and append it to the curve."""
        self.step += 1
        self.curve.append(
            {
                "step": self.step,
                "loss": loss,
                "validation_loss": None,
                "learning_rate": rate,
                "samples": self.step * batch,
            }
        )

    def summary(self, *, batch: int) -> dict[str, Any]:
        """Totals for training.json."""
        return {
            "steps": self.step,
            "samples": self.step * batch,
            "samples_per_s": self.step * batch / self.seconds,
            "data_wait_share": self.waited_s / self.seconds,
            "validation_loss_before": self.validation_before,
            "validation_loss": self.curve[-1]["validation_loss"],
            "skipped_steps": self.skipped,
        }
