"""What the benchmarks of this folder ask for."""

import pytest

import pgdfast


@pytest.fixture(scope="session", autouse=True)
def native_core():
    """Nothing is timed without the C++ core."""
    state = pgdfast.backends()["native"]
    if state != "available":
        pytest.exit(f"the benchmarks need pgdfast's native backend, but {state}; install it: pip install '.[bench]'", 1)
