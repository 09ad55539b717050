"""The examples of the README run as written; every documented command has the options it is given."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

from mip.cli import app
from tests.closure import ROOT

PAGES = ("README.md", "docs/generate.md", "docs/reports.md", "docs/training.md")


def _commands(page: str) -> list[list[str]]:
    """The lines that start with `mip`, with what a backslash joins to them."""
    joined = (ROOT / page).read_text().replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in joined.splitlines() if re.match(r" {4}mip ", line)]


def _run(*command: str, folder: Path) -> None:
    for name in ("data", "docs", "params.yaml"):
        (folder / name).symlink_to(ROOT / name)
    subprocess.run([sys.executable, *command], cwd=folder, check=True, capture_output=True, timeout=600)


def test_the_python_example_draws_two_objects_and_where_they_act(tmp_path: Path):
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "example.py").write_text(script)
    _run("example.py", folder=tmp_path)
    image, fish = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("fish-and-car", "fish-and-car-fish"))
    assert image.shape == fish.shape == (64, 64, 3)
    assert image.std() > 20 and fish[..., 1].std() > 10  # neither is blank


def test_the_command_line_example_draws_in_the_embedded_world(tmp_path: Path):
    (command,) = [words for words in _commands("README.md") if "generate" in words]
    _run("-m", "mip.cli", *command[1:], folder=tmp_path)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "000420-maps.png",
        "000420.json",
        "000420.png",
    ]


@pytest.mark.parametrize("page", PAGES)
def test_documented_commands_have_the_options_they_are_given(page: str):
    commands = _commands(page)
    assert commands
    for _, *words in commands:
        command: Any = typer.main.get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        # Refuses what the command does not know; runs nothing.
        command.make_context(command.name, words)
