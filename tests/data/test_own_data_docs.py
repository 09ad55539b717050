"""docs/own-data.md: its blocks run in their order, and say what it says they say."""

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from mip.config import Construct
from mip.data.coco import Coco
from mip.data.own import COLUMNS, TABLES, Own
from mip.data.subject_dataset import SubjectDataset
from tests.closure import ROOT

PAGE = (ROOT / "docs" / "own-data.md").read_text()
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
SOURCES = {"own": Own, "coco": Coco, "subject10k": SubjectDataset}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """One in which `mip` and python are those of this checkout."""
    command = tmp_path / "bin" / "mip"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mip.cli "$@"\n')
    command.chmod(0o755)
    return {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def test_every_block_runs_and_prints_what_is_shown(tmp_path: Path, environment: dict[str, str]):
    folder = tmp_path / "work"
    folder.mkdir()
    for (kind, text), (following, shown) in pairwise([*BLOCKS, ("", "")]):
        if kind not in ("python", "sh"):
            continue
        command = [sys.executable, "-c", text] if kind == "python" else ["sh", "-c", text]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
        assert "Traceback" not in done.stderr, done.stderr
        assert done.stdout + done.stderr == (shown if following == "text" else ""), text


def test_the_parameters_shown_are_valid():
    shown = [YAML(typ="safe").load(text) for kind, text in BLOCKS if kind == "yaml"]
    ingests = [block for block in shown if "source" in block]
    assert {block["source"] for block in ingests} == set(SOURCES)
    for block in ingests:
        SOURCES[block["source"]].Options.model_validate(block["options"])
    (labels,) = [block for block in shown if "source" not in block]
    assert labels.keys() <= Construct.model_fields.keys() and labels["labels"] == {"kind": "given", "path": None}


def test_every_column_and_table_is_told():
    assert all(f"`{column}`" in PAGE for column in COLUMNS)
    assert all(table in PAGE for table in TABLES)
