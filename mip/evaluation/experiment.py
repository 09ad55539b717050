"""The experiment that tests the paper's claim: its parameters, and what its numbers say.

Methods see the same tasks and the same noise; each has a scale of its own, chosen on validation tasks by one rule.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt

from mip.config import Engine, Generate, Ingest, Manifest, Profile, Section, Train, checked, load_profile, read_yaml

NAME = "experiment"


class Control(Section):
    """An adapter trained beside the profile's own, for as long and from the same start."""

    merge: Literal["weighted", "concat"]
    gated: bool
    is_selected: bool  # by the quality score; False takes as many samples at random


class Given(Section):
    """Tasks whose layout is given."""

    set: str  # whose source brings the layouts, and whose scales are used
    level: NonNegativeInt  # timestep at which sampling starts
    methods: tuple[str, ...]


class Experiment(Section):
    """experiment/params.yaml."""

    profile: str  # whose networks, samples and adapter are examined
    sets: Mapping[str, Ingest]  # benchmarks, by name
    methods: tuple[str, ...]  # that draw every set
    layouts: Given
    generate: Generate
    controls: Mapping[str, Control]  # by the name of the method that draws with them


@dataclass(frozen=True)
class Plan:
    """The experiment with the profile that it examines."""

    experiment: Experiment
    profile: Profile

    @property
    def engine(self) -> Engine:
        """Where tasks run: as the profile says."""
        return self.profile.engine

    @property
    def unselected(self) -> Manifest:
        """The profile's manifest with as many samples, taken at random."""
        return self.profile.manifest.model_copy(update={"order": "random", "threshold": None})

    def train(self, method: str) -> Train:
        """How a control is trained."""
        control = self.experiment.controls[method]
        return self.profile.train.model_copy(update={"merge": control.merge, "gated": control.gated})


def load_plan(parameters: Path, file: Path) -> Plan:
    """The experiment of `file` on a profile of `parameters`. Raises ConfigError."""
    experiment = checked(Experiment, read_yaml(file), file=file, place=NAME)
    return Plan(experiment, load_profile(parameters, experiment.profile)[1])
