"""A Prefect server for the tests that run flows: one for all, on a free port, with a home of its own."""

import os
from collections.abc import Iterator, Mapping

import pytest

from flows.repro import server
from tests.closure import ROOT


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """The environment of a process that runs flows of this checkout against the server."""
    home = tmp_path_factory.mktemp("prefect")
    with server(home) as url:
        yield {**os.environ, "PREFECT_API_URL": url, "PREFECT_HOME": str(home), "PYTHONPATH": str(ROOT)}
