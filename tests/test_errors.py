"""What a user can put right ends a command with one line on stderr and exit code 2, never with a traceback."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from mip import errors
from tests.closure import ROOT

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def _run(
    module: str, *arguments: str, folder: Path, environment: Mapping[str, str] = ENVIRONMENT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=180,
    )


def _parameters(folder: Path, *, change: tuple[str, str] = ("", "")) -> Path:
    text = (ROOT / "params.yaml").read_text()
    assert change[0] in text
    (folder / "params.yaml").write_text(text.replace(*change, 1))
    return folder


def _assert_one_line(done: subprocess.CompletedProcess[str], *, says: str) -> None:
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert says in lines[0]


def test_a_misspelt_parameter_is_named(tmp_path: Path):
    _parameters(tmp_path, change=("top_k: 600", "topk: 600"))
    done = _run("flows.manifest", folder=tmp_path)
    _assert_one_line(done, says="toybox.manifest.topk: unknown parameter")
    assert "toybox.manifest.top_k: missing" in done.stderr


def test_a_wrong_profile_is_answered_with_those_there_are(tmp_path: Path):
    _parameters(tmp_path, change=("profile: toybox", "profile: toybux"))
    done = _run("flows.manifest", folder=tmp_path)
    _assert_one_line(done, says="got profile 'toybux'; expected one of toybox, smoke")


def test_a_wrong_profile_ends_make_repro_before_it_starts_anything(tmp_path: Path):
    _parameters(tmp_path)
    _assert_one_line(_run("flows.repro", "toybux", folder=tmp_path), says="got profile 'toybux'")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "params.yaml"]


def test_a_missing_parameter_file_is_named(tmp_path: Path):
    _assert_one_line(_run("flows.ingest", folder=tmp_path), says="there is no parameter file params.yaml")


def test_an_error_inside_a_task_is_one_line_too(tmp_path: Path, engine: Mapping[str, str]):
    done = _run("flows.manifest", folder=_parameters(tmp_path), environment=engine)
    _assert_one_line(done, says="data/toybox")


def test_an_error_inside_a_flow_is_one_line_too(tmp_path: Path, engine: Mapping[str, str]):
    done = _run("flows.extract", folder=_parameters(tmp_path), environment=engine)
    _assert_one_line(done, says="data/toybox/index")


@pytest.mark.parametrize("name", [name for name in vars(errors) if name.endswith("Error")])
def test_every_error_is_in_the_tree(name: str):
    assert issubclass(getattr(errors, name), errors.MipError)
    assert name in (errors.__doc__ or "")
