"""`make repro`: a Prefect server for the whole run, `dvc repro`, then the time of each stage and the report's path.

`python -m flows.repro PROFILE` runs another profile than the active one: params.yaml names it while the run lasts.
A server makes a stage's start three to five times shorter; a bare `dvc repro` does without.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from ruamel.yaml import YAML

from flows import ROOT
from mip.config import STAGES, Paths, load_profile
from mip.errors import ConfigError, DataError, MipError
from mip.tables import write_text

PARAMETERS, GRAPH, LOCK = Path("params.yaml"), Path("dvc.yaml"), Path("dvc.lock")
_DVC = [sys.executable, "-m", "dvc"]
_UP_TO_DATE = "up to date"


def main(profile: str | None = None) -> int:
    """Run the pipeline; the exit code is DVC's, or 2 for parameters that cannot be."""
    try:
        name, _ = load_profile(PARAMETERS, profile)
        with active(name, file=PARAMETERS):
            return run(Paths(name))
    except MipError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(paths: Paths) -> int:
    """`dvc repro` with a server, where there is anything to do, and what to know afterwards."""
    began, before = time.time(), _outputs()
    if _UP_TO_DATE in _dvc("status", GRAPH.name).stdout:
        code = 0
    else:
        with server(ROOT / ".prefect") as url:
            code = dvc_repro(GRAPH.name, url=url)
    if code == 0:
        print(_times(paths.timings, since=began, total=time.time() - began))
        print(_changes(before))
        print(f"report: {(paths.reports / 'report.html').resolve()}")
    return code


def dvc_repro(*targets: str, url: str) -> int:
    """`dvc repro` of these targets with the Prefect server at `url`; its exit code."""
    environment = {**os.environ, "PREFECT_API_URL": url, "PATH": _path()}
    return subprocess.run([*_DVC, "repro", *targets], env=environment, check=False).returncode


@contextlib.contextmanager
def active(profile: str, *, file: Path) -> Iterator[None]:
    """The parameter file with this profile as the active one; its line is put back at the end."""
    text = file.read_text()
    line = re.search(r"^profile:.*$", text, re.MULTILINE)
    if line is None:
        raise ConfigError(f"{file} has no line `profile: NAME`; add one")
    wanted = re.sub(r"^(profile:\s*)[^\s#]+", rf"\g<1>{profile}", line[0])
    if wanted == line[0]:
        yield
        return
    write_text(file, text.replace(line[0], wanted, 1))
    try:
        yield
    finally:
        write_text(file, file.read_text().replace(wanted, line[0], 1))


@contextlib.contextmanager
def server(home: Path, *, patience: float = 90) -> Iterator[str]:
    """A Prefect server of our own on a free port of the loopback; yields its API's URL and stops it at the end.

    Raises DataError where it does not answer within `patience` seconds.
    """
    home.mkdir(parents=True, exist_ok=True)
    port, log = _free_port(), home / "server.log"
    url = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "PREFECT_HOME": str(home), "PREFECT_SERVER_UI_API_URL": url}
    environment.pop("PREFECT_API_URL", None)
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _await(url, process=process, patience=patience, log=log)
            yield url
        finally:
            _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _await(url: str, *, process: subprocess.Popen[bytes], patience: float, log: Path) -> None:
    end = time.monotonic() + patience
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(0.2)
    raise DataError(f"Prefect's server did not answer at {url}; {log} says why")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and the processes it started: they are a session of their own."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
            return


def _path() -> str:
    """PATH with the interpreter that runs this first: the commands in dvc.yaml say `python`."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _dvc(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*_DVC, *arguments], capture_output=True, text=True, check=False)


def _times(folder: Path, *, since: float, total: float) -> str:
    """One line a stage, in the order of the graph; those that did not run this time are marked."""
    lines = [f"{'stage':<28}{'wall s':>9}{'cpu s':>9}{'rows':>9}"]
    for stage in STAGES:
        for file in sorted([*folder.glob(f"{stage}.json"), *folder.glob(f"{stage}@*.json")]):
            timing = json.loads(file.read_text())
            note = "" if file.stat().st_mtime >= since else "  (unchanged)"
            lines.append(f"{file.stem:<28}{timing['wall_s']:>9.1f}{timing['cpu_s']:>9.1f}{timing['rows']:>9}{note}")
    return "\n".join([*lines, f"{'in all':<28}{total:>9.1f}"])


def _outputs() -> dict[str, object]:
    """What dvc.lock says of each stage's outputs."""
    if not LOCK.exists():
        return {}
    stages = (YAML(typ="safe").load(LOCK.read_text()) or {}).get("stages", {})
    return {name: stage.get("outs") for name, stage in stages.items()}


def _changes(before: dict[str, object]) -> str:
    """Why git is not clean afterwards, if it is not."""
    status = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=False).stdout
    if LOCK.name not in {line[3:] for line in status.splitlines()}:
        return f"git: {LOCK} is as committed"
    changed = [name for name, outputs in _outputs().items() if outputs != before.get(name)]
    reason = f"the outputs of {', '.join(changed)} are new" if changed else "it has been since before this run"
    return f"git: {LOCK} differs from the commit: {reason}; commit it, or `git checkout {LOCK}`"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
