"""Processes that the tests of this folder share."""

import pytest
from parts.ranks import Pool


@pytest.fixture(scope="session")
def pool():
    """Four gloo processes, started when first asked for."""
    processes = Pool(4)
    yield processes
    processes.stop()
