"""Memory of exact steps on G, whose J alone would be 1.6 GB, and on E, whose J would be 110 MB."""

import json
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import pytest

from .bounds import memory_bound
from .interleave import Recorded
from .tables import chosen, judge, results

LIMIT = 600e6
SLACK = 64 * 1024   # what a step may leave on the heap: counters and caches of Python's; a parameter vector is 795 kB

recorded = Recorded()
pytestmark = pytest.mark.benchmark(timer=recorded, group="memory")
PROBED = chosen(["memory"]) and ["G", "E"]


@pytest.fixture
def probed(request, lines, tmp_path_factory):
    """What memory_probe.py prints about a problem."""
    found = results(request.config)
    return found.once(found.memory, request.param, lambda: _probe(request.param, lines, tmp_path_factory.mktemp("probe")))


def _probe(name, lines, folder):
    """Run memory_probe.py away from the source folder, so that it meets the installed package."""
    start = perf_counter()
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("memory_probe.py")), name],
        capture_output=True, text=True, timeout=300, cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["native"], found["solver"], found["status"]) == ("available", "dual", "accepted")
    first, last = found["peaks"][1], found["peaks"][-1]
    above = "" if found["baseline"] is None else f", {(first - found['baseline']) / 1e6:.1f} of them by the step"
    lines.append(f"{name}: peak resident memory {found['after_import'] / 1e6:.0f} MB after import, "
                 f"{first / 1e6:.0f} MB with one dual step{above}, {last / 1e6:.0f} MB with {len(found['peaks']) - 1}")
    return {**found, "problem": name, "seconds": perf_counter() - start}


def over(names):
    return pytest.mark.parametrize("probed", [name for name in names if name in PROBED], indirect=True)


@over("GE")
def test_peak_above_the_closure(request, benchmark, probed):
    recorded.hand_over(benchmark, [probed["seconds"]])
    if probed["baseline"] is None:
        pytest.skip("this system does not let a process reset its peak memory")
    bound = memory_bound(probed["problem"], probed["residuals"], probed["activations"])
    judge(request.config, bound, (probed["peaks"][1] - probed["baseline"]) / 1e6)


@over("G")
def test_peak_of_one_step(benchmark, probed):
    recorded.hand_over(benchmark, [probed["seconds"]])
    benchmark.extra_info.update(after_import=probed["after_import"], peaks=probed["peaks"])
    assert probed["peaks"][1] <= LIMIT


@over("G")
def test_later_steps_allocate_no_more_than_the_first(benchmark, probed, lines):
    """Allocation is counted where all of it meets.

    tracemalloc sees Python's part alone and torch.profiler PyTorch's, but the core's workspaces are C++ vectors. All
    three allocate on the C heap: what is in use there after a step must be what was in use before it. What a step
    allocates and frees again shows in the peak of resident memory, which the first step must have set but for pages
    of the allocator: less than one M x M matrix more in all the later steps.
    """
    heaps, peaks = probed["heaps"], probed["peaks"]
    grown = [b - a for a, b in zip(peaks, peaks[1:], strict=False)]
    recorded.hand_over(benchmark, [probed["seconds"]])
    benchmark.extra_info.update(heaps=heaps, peak_growth=grown)
    lines.append(f"  peak growth by step, kB: {' '.join(f'{g / 1e3:.0f}' for g in grown)}")
    assert sum(grown[1:]) < 4 * probed["residuals"] ** 2
    if heaps[0] is not None:
        kept = [b - a for a, b in zip(heaps, heaps[1:], strict=False)]
        lines.append(f"  heap growth by step, kB: {' '.join(f'{k / 1e3:.0f}' for k in kept)}")
        assert all(k <= SLACK for k in kept[1:])
