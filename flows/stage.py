"""What the process of every stage does around its flow: parameters in, times out, one clear line for an error."""

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import Flow
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows import STARTED
from mip.config import Engine, Paths, Profile, load_profile
from mip.errors import MipError
from mip.tables import write_json

PARAMETERS = Path("params.yaml")


def never(_: Any) -> bool:
    """The stage's tasks run no network."""
    return False


def always(_: Any) -> bool:
    """The stage's tasks run networks, whatever the profile."""
    return True


def active_profile() -> tuple[str, Profile]:
    """The active profile of params.yaml, with its name."""
    return load_profile(PARAMETERS)


def run_stage(
    stage: Flow[..., int],
    *options: str,
    runs_torch: Callable[[Any], bool] = never,
    load: Callable[[], tuple[str, Any]] = active_profile,
) -> None:
    """Run a flow(name, profile, *options) -> rows, as DVC's command; `load` gives the first two.

    Writes data/<name>/timings/<stage>.json. A MipError ends the process with one line on stderr and exit code 2.
    """
    _show_log()
    try:
        name, profile = load()
        runner = task_runner(profile.engine, runs_torch=runs_torch(profile))
        rows = stage.with_options(task_runner=runner)(name, profile, *options)
    except MipError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    timing = {
        "wall_s": round(time.perf_counter() - STARTED, 2),
        "cpu_s": round(sum(os.times()[:4]), 2),  # with the processes that ran shards
        "rows": rows,
    }
    write_json(Paths(name).timings / f"{'@'.join((stage.name, *options))}.json", timing)


def task_runner(engine: Engine, *, runs_torch: bool) -> TaskRunner[Any]:
    """Where the tasks of a flow run: the tasks themselves do not know.

    On one machine, shards are spread over processes; networks use all cores, or a device, by themselves and stay in
    this one.
    """
    if engine.runner == "dask":
        return _dask(engine)
    if runs_torch or engine.workers == 1:
        return ThreadPoolTaskRunner(max_workers=1)
    from prefect.task_runners import ProcessPoolTaskRunner

    return ProcessPoolTaskRunner(max_workers=engine.workers)


def _dask(engine: Engine) -> TaskRunner[Any]:
    from prefect_dask.task_runners import DaskTaskRunner  # a second to import, which local runs need not pay

    if engine.address is not None:
        return DaskTaskRunner(address=engine.address)
    return DaskTaskRunner(cluster_kwargs={"n_workers": engine.workers, "threads_per_worker": 1, "host": "127.0.0.1"})


def _show_log() -> None:
    """The library's log on stderr as plain lines."""
    log = logging.getLogger("mip")
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler())
