"""Prints the figures after the tests, in words and units that pytest-benchmark's own table does not have."""

import pytest

import pgdfast

from .tables import RESULTS, results, setting


@pytest.fixture(scope="session", autouse=True)
def native_core():
    """Nothing is timed without the C++ core."""
    state = pgdfast.backends()["native"]
    if state != "available":
        pytest.exit(f"the benchmarks need pgdfast's native backend, but {state}; install it: pip install '.[bench]'", 1)


@pytest.fixture(scope="module")
def lines(request):
    """A list of lines that are printed at the end of the run."""
    found = []
    results(request.config).notes.append(found)
    return found


def pytest_terminal_summary(terminalreporter, config):
    found = config.stash.get(RESULTS, None)
    if found is None:
        return
    terminalreporter.section("pgdfast benchmarks")
    for line in found.lines():
        terminalreporter.write_line(line)


def pytest_sessionfinish(session):
    found = session.config.stash.get(RESULTS, None)
    if found is not None and setting("OUTPUT"):
        found.write(setting("OUTPUT"))
