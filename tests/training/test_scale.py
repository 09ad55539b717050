"""Several processes: each takes its part of the same batch, and accelerate reads the documented commands."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

from mip.config import Models
from mip.errors import ConfigError
from mip.training import loop

Maker = Callable[..., Any]
PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_see_what_one_sees(
    models: Models, features: Path, make_train_config: Maker, tmp_path: Path, processes: int
):
    config = make_train_config(batch=8, micro_batch=2)
    run = loop._Run(config, models=models, features=features, work=tmp_path)
    whole = run.load(3)
    run.local_batch = 8 // processes
    parts = []
    for index in range(processes):
        run.accelerator = SimpleNamespace(process_index=index)  # pyright: ignore[reportAttributeAccessIssue]
        parts += run.load(3)
    assert len(whole) == len(parts) == 4
    for (batch, draws), (own, own_draws) in zip(whole, parts, strict=True):
        assert batch.sample_ids == own.sample_ids
        assert torch.equal(draws.noise_BCHW, own_draws.noise_BCHW)
        assert torch.equal(draws.timestep_B, own_draws.timestep_B)
        assert torch.equal(draws.drops_text_B, own_draws.drops_text_B)


def test_a_batch_that_cannot_be_shared_out_is_an_error(make_train_config: Maker):
    assert loop._share(make_train_config(batch=8), 4) == 2
    with pytest.raises(ConfigError, match="batch 8 for 3 processes"):
        loop._share(make_train_config(batch=8), 3)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_ways_to_share_out_weights_are_refused(kind: DistributedType):
    with pytest.raises(ConfigError, match=f"{kind.value}.*--multi_gpu"):
        loop._check_kind(kind)
    loop._check_kind(DistributedType.MULTI_GPU)


def test_accelerate_reads_the_documented_commands():
    text = PAGE.read_text().replace("\\\n", " ")
    commands = [shlex.split(line) for line in text.splitlines() if re.match(r" {4}accelerate launch ", line)]
    parsed = [launch_command_parser().parse_args(command[2:]) for command in commands]
    assert [(one.num_machines, one.num_processes, one.multi_gpu) for one in parsed] == [(1, 8, True), (2, 16, True)]
    assert all(one.training_script == "train_alone.py" for one in parsed)
