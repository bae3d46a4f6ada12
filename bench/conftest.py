"""Prints the figures after the tests, in words and units that pytest-benchmark's own table does not have."""

import platform

import pytest
import torch

import pgdfast

from .tables import TABLES, report


@pytest.fixture(scope="session", autouse=True)
def native_core():
    """Nothing is timed without the C++ core."""
    state = pgdfast.backends()["native"]
    if state != "available":
        pytest.exit(f"the benchmarks need pgdfast's native backend, but {state}; install it: pip install '.[bench]'", 1)


@pytest.fixture(scope="module")
def lines(request):
    """A list of lines that are printed at the end of the run."""
    return report(request.config, [])


def pytest_terminal_summary(terminalreporter, config):
    tables = [lines for lines in config.stash.get(TABLES, []) if lines]
    if not tables:
        return
    write = terminalreporter.write_line
    terminalreporter.section("pgdfast benchmarks")
    write(f"{_processor()}; Python {platform.python_version()}; PyTorch {torch.__version__}; "
          + ", ".join(f"{key} {value}" for key, value in pgdfast.build_info().items() if "torch" not in key))
    for lines in tables:
        write("")
        for line in lines:
            write(line)


def _processor():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
