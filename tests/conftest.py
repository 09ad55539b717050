"""What several folders of tests need: a Prefect server for all that run flows, and the command line."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping

import pytest

from flows.repro import server
from mip.cli import main
from tests.closure import ROOT


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """The environment of a process that runs flows of this checkout against the server."""
    home = tmp_path_factory.mktemp("prefect")
    with server(home) as url:
        yield {**os.environ, "PREFECT_API_URL": url, "PREFECT_HOME": str(home), "PYTHONPATH": str(ROOT)}


@pytest.fixture
def mip(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `mip ...` in this process; gives exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mip", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call
