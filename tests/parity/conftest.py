"""Gives each test the recorded cases of its kind, and says at the end what was compared."""

from collections import Counter
from collections.abc import Generator, Iterator

import pytest
import torch

from tests.parity.golden import GOLDEN, HERE, KINDS, LEDGER, NOT_RUN, Case, Ledger, Run, cases, manifest, of_kind


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEDGER], config.stash[NOT_RUN] = Ledger(), []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per case, or one that is skipped and says why."""
    for fixture in KINDS.keys() & metafunc.fixturenames:
        found = of_kind(KINDS[fixture])
        reason = f"no case of this kind in {GOLDEN}" if cases() else f"no golden data in {GOLDEN}; set MIP_GOLDEN"
        nothing = [pytest.param(None, id="none", marks=pytest.mark.skip(reason=reason))]
        metafunc.parametrize(fixture, [pytest.param(one, id=one.id) for one in found] or nothing)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What checks the ledger comes last of all."""
    items.sort(key=lambda item: item.path == HERE / "test_coverage.py")


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE:
            item.config.stash[NOT_RUN].append(item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and not report.skipped and isinstance(item, pytest.Function) and hasattr(item, "callspec"):
        for value in item.callspec.params.values():
            if isinstance(value, Case | Run):
                item.config.stash[LEDGER].cases |= set(value.cases)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    ledger = config.stash[LEDGER]
    if not ledger.cases:
        return
    terminalreporter.section(f"compared with {GOLDEN} (set {manifest().get('set')}, seed {manifest().get('seed')})")
    known, done = Counter(case.kind for case in cases()), Counter(case.kind for case in ledger.cases)
    for kind, count in known.items():
        terminalreporter.write_line(f"{kind:16} {done[kind]:3} of {count:3} cases")
        differences = {name: values for (of, name), values in ledger.largest.items() if of == kind and values[0] > 0}
        for name, (found, allowed) in sorted(differences.items(), key=lambda item: -item[1][0] / item[1][1]):
            terminalreporter.write_line(f"{'':20} {name} within {found:.2g} of {allowed:.2g}")


@pytest.fixture
def ledger(pytestconfig: pytest.Config) -> Ledger:
    """Compares, and remembers what it has compared."""
    return pytestconfig.stash[LEDGER]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As the golden data were recorded: more threads add up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
