"""`mip report compare`: two runs' metrics side by side, or one line that says what is wrong with a file."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mip.evaluation.comparison import compare
from mip.tables import write_json


def _entry(value: float | None, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": 4}


def _write(folder: Path, methods: dict[str, Any], **changes: Any) -> Path:
    made = {"git": "abc", "params": "f00d", "packages": {"torch": "2.14.1"}, "inputs": {}}
    content = {"schema_version": 1, "benchmark": "toys", "variant": "official", "seed": 1, "tasks": 4}
    content |= {"combinations": 2, "methods": methods, "provenance": made}
    write_json(folder / "metrics.json", content | changes)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    one = {"mip": {"clip_t": _entry(0.7, 0.6, 0.8), "confused": _entry(0.5, 0.4, 0.6), "mine": _entry(1.0, 1.0, 1.0)}}
    other = {"mip": {"clip_t": _entry(0.75, 0.7, 0.9), "confused": _entry(0.2, 0.1, 0.3), "leak": _entry(None)}}
    made = {"git": "def", "params": "f00d", "packages": {"torch": "2.15.0"}, "device": "cpu", "inputs": {}}
    return (
        _write(tmp_path / "one", one | {"base": {"leak": _entry(0.1, 0.1, 0.2)}}),
        _write(tmp_path / "other", other | {"base": {"leak": _entry(None)}}, provenance=made, seed=2),
    )


@pytest.fixture
def run(mip):
    """`mip report compare ...`."""
    return partial(mip, "report", "compare")


def test_metrics_of_both_runs_are_compared_in_the_order_of_reports(runs: tuple[Path, Path]):
    found = compare(*runs)
    assert [(x.method, x.metric, x.overlaps) for x in found.lines] == [
        ("base", "leak", None),
        ("mip", "confused", False),
        ("mip", "clip_t", True),
    ]
    assert [x.difference for x in found.lines] == [None, pytest.approx(-0.3), pytest.approx(0.05)]
    assert found.only == (("mip mine",), ("mip leak",))


def test_what_the_runs_were_made_from_is_compared(runs: tuple[Path, Path]):
    assert list(compare(*runs).differing) == [
        ("seed", 1, 2),
        ("git", "abc", "def"),
        ("packages torch", "2.14.1", "2.15.0"),
        ("device", None, "cpu"),
    ]


def test_the_command_prints_one_table_and_what_differs(run, runs: tuple[Path, Path]):
    code, said, _ = run(*runs)
    lines = [line.split() for line in said.splitlines()]
    assert code == 0 and ["mip", "confused", "0.5000", "0.2000", "-0.3000", "no"] in lines
    assert ["mip", "clip_t", "0.7000", "0.7500", "+0.0500", "yes"] in lines
    assert ["base", "leak", "0.1000", "-", "-", "-"] in lines and ["packages", "torch", "2.14.1", "2.15.0"] in lines
    assert f"only in {runs[0]}: mip mine" in said and f"only in {runs[1]}: mip leak" in said


def test_a_run_is_equal_to_itself_by_its_folder_or_its_file(run, runs: tuple[Path, Path]):
    code, said, _ = run(runs[0], runs[0] / "metrics.json")
    assert code == 0 and "Both were made from the same." in said and "only in" not in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no"),
        ("{", "is not JSON"),
        ("[]", "expected 1"),
        ('{"schema_version": 2}', "got schema_version 2"),
        ('{"schema_version": 1}', "lacks benchmark"),
        ({"methods": {"mip": {"clip_t": 0.7}}}, "no metrics with their intervals"),
        ({"methods": {"mip": 3}}, "no metrics with their intervals"),
        ({"methods": []}, "no metrics with their intervals"),
        ({"provenance": "none"}, "no metrics with their intervals"),
    ],
)
def test_a_file_that_is_missing_or_of_another_kind_is_one_line(run, runs: tuple[Path, Path], content, message: str):
    file = runs[1] / "metrics.json"
    if isinstance(content, dict):
        write_json(file, json.loads(file.read_text()) | content)
    else:
        file.unlink()
        if content is not None:
            file.write_text(content)
    code, _, errors = run(*runs)
    assert code == 2 and message in errors and str(file) in errors and errors.count("\n") == 1


def test_a_value_cannot_steer_the_terminal(run, runs: tuple[Path, Path], tmp_path: Path):
    _write(tmp_path / "odd", {}, benchmark="toys\x1b[2J")
    code, said, _ = run(runs[0], tmp_path / "odd")
    assert code == 0 and "toys?[2J" in said and "\x1b" not in said
