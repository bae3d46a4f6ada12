"""Memory that runs out: MemoryError, parameters unchanged, no thread left waiting."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pgdfast.kernels import native

core = native._C
SCRIPT = Path(__file__).with_name("memory_limits.py")
CORE = Path(__file__).resolve().parents[2] / "csrc"
pytestmark = [
    pytest.mark.skipif(core is None, reason="the C++ core is not built"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of address space are Linux's"),
]
STEP = {"dual": 1_500_000, "cg": 600_000, "lsmr": 600_000}   # bytes; 25 of them are more than a step takes


@pytest.mark.parametrize("kind", ["items", "parts", "steps"])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_an_exception_in_a_thread_reaches_the_caller(kind, threads):
    for failing in (0, 1, 31, 63):
        with pytest.raises(MemoryError):
            core.fail_in_parallel(kind, threads, failing)
    core.fail_in_parallel(kind, threads, 64)   # the threads are whole


@pytest.mark.skipif(not CORE.exists(), reason="the source tree is not here")
def test_parallel_regions_stand_in_one_file():
    found = [p.name for p in CORE.rglob("*.*") if p.suffix != ".md" and "#pragma omp parallel" in p.read_text()]
    assert found == ["parallel.h"]


def steps_at(cases):
    """What a step by each (solver, limit) ended with."""
    # Memory goes back to the system when it is freed: what one step has left is not there for the next.
    trim = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *(f"{solver}:{limit}" for solver, limit in cases)], capture_output=True, text=True,
        timeout=120, env=os.environ | trim, cwd=SCRIPT.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = [line.split(" ", 1)[1] for line in done.stdout.splitlines()]
    assert len(found) == len(cases)
    return found


def test_a_step_at_limits_of_memory():
    cases = [(solver, STEP[solver] * k) for k in (0, 5, 9, 60) for solver in ("dual", "cg")]
    found = steps_at(cases)
    assert found[:2] == ["MemoryError unchanged"] * 2 and found[-2:] == ["done"] * 2
    assert set(found) == {"MemoryError unchanged", "done"}


@pytest.mark.slow
@pytest.mark.parametrize("solver", STEP)
def test_a_step_at_many_limits_of_memory(solver):
    assert set(steps_at([(solver, STEP[solver] * k) for k in range(25)])) == {"MemoryError unchanged", "done"}
