"""Processes that are killed, and several that train together: the result is that of one that is left alone."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mip.config import Models
from mip.model.checkpoint import read_adapter
from mip.tables import read_rows
from mip.training.loop import train
from tests.closure import ROOT

Maker = Callable[..., Any]
STEPS, EVERY = 80, 4
# Kill after the first state at or after this step, and so many seconds later: in a step, in a save, in a start.
_DRAW = random.Random(5)
MOMENTS = sorted((_DRAW.randrange(1, 50), _DRAW.uniform(0, 0.1)) for _ in range(5))

_HEADER = """
import json, os, signal, sys, time, traceback
from pathlib import Path
import torch
from mip.config import Models, Train
from mip.training.loop import train

torch.set_num_threads(1)
config, models = Train.model_validate_json(sys.argv[1]), Models.model_validate_json(sys.argv[2])
features, out, work = map(Path, sys.argv[3:6])
"""

_LAUNCHED = f"{_HEADER}train(config, models=models, features=features, out=out, work=work)\n"

# Forks before anything has run: a process that trains costs no import.
_KILLED = f"""{_HEADER}
def start():
    child = os.fork()
    if child:
        return child
    try:
        train(config, models=models, features=features, out=out, work=work)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def saved():
    return max((int(path.name[5:13]) for path in work.rglob("step-*.pt")), default=0)

ends = []
for step, delay in json.loads(sys.argv[6]):
    child = start()
    while saved() < step:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            sys.exit("it ended by itself")
        time.sleep(0.005)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    ends.append((os.WTERMSIG(os.waitpid(child, 0)[1]), saved()))
print(json.dumps({{"ends": ends, "last": os.waitstatus_to_exitcode(os.waitpid(start(), 0)[1])}}))
"""


@pytest.fixture
def launch(models: Models, features: Path, tmp_path: Path) -> Callable[..., str]:
    """Run a script on a configuration, with the results in the folder `name`; gives what it prints."""

    def launched(script: str, config: Any, *more: str, name: str, launcher: tuple[str, ...] = ()) -> str:
        file = tmp_path / f"{name}.py"
        file.write_text(script)
        values = [
            config.model_dump_json(),
            models.model_dump_json(),
            features,
            tmp_path / name,
            tmp_path / f"{name}-work",
        ]
        command = [sys.executable, *launcher, str(file), *map(str, values), *more]
        done = subprocess.run(command, cwd=ROOT, timeout=300, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return launched


def test_a_process_killed_five_times_ends_with_the_same_bytes(
    launch: Callable[..., str], models: Models, features: Path, make_train_config: Maker, tmp_path: Path
):
    config = make_train_config(steps=STEPS, checkpoint_every=EVERY, validation_every=20, ema=0.9)
    train(config, models=models, features=features, out=tmp_path / "whole", work=tmp_path / "whole-work")
    said = json.loads(launch(_KILLED, config, json.dumps(MOMENTS), name="killed"))
    assert [signal for signal, _ in said["ends"]] == [9] * 5
    assert len({step for _, step in said["ends"]}) >= 3 and max(step for _, step in said["ends"]) < STEPS
    assert said["last"] == 0
    for file in ("adapter.safetensors", "adapter-raw.safetensors", "curve.parquet"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()


def test_two_processes_train_the_same_adapter(
    launch: Callable[..., str], models: Models, features: Path, make_train_config: Maker, tmp_path: Path
):
    config = make_train_config(steps=6, ema=0.5)
    train(config, models=models, features=features, out=tmp_path / "one", work=tmp_path / "one-work")
    # On GPUs `accelerate launch` starts this very launcher; on CPUs the processes talk by gloo.
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    launch(_LAUNCHED, config, name="two", launcher=launcher)
    assert json.loads((tmp_path / "two" / "training.json").read_text())["processes"] == 2
    for name in ("adapter", "adapter-raw"):
        alone, together = (read_adapter(tmp_path / n / f"{name}.safetensors").layers for n in ("one", "two"))
        for key, tensor in alone.items():
            assert float((tensor - together[key]).abs().mean()) < 1e-5
    for column in ("loss", "validation_loss"):
        alone, together = (
            [row[column] for row in read_rows(tmp_path / n / "curve.parquet", "curve") if row[column] is not None]
            for n in ("one", "two")
        )
        assert alone == pytest.approx(together, abs=1e-5)
