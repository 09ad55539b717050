"""Nothing recorded may go without a comparison; these tests run after all others."""

import pytest

from tests.parity.golden import GOLDEN, HERE, NOT_RUN, Ledger, cases


@pytest.fixture
def whole_suite(request: pytest.FixtureRequest) -> None:
    """Skips where a part of the suite was not asked for."""
    if not cases():
        pytest.skip(f"no golden data in {GOLDEN}; set MIP_GOLDEN")
    asked = {item.path for item in request.session.items}
    absent = [path.name for path in sorted(HERE.glob("test_*.py")) if path not in asked]
    if absent or request.config.stash[NOT_RUN]:
        pytest.skip(f"only a part of the parity suite runs; ask for all of {HERE.name}")


def test_every_recorded_case_was_compared(whole_suite: None, ledger: Ledger):
    assert ledger.missing_cases() == []


def test_every_recorded_result_was_compared(whole_suite: None, ledger: Ledger):
    assert ledger.missing_outputs() == []
