"""Memory of exact steps on G, whose J alone would be 1.6 GB, and on E, whose J would be 110 MB.

Allocation is counted where all of it meets. tracemalloc sees Python's part alone and torch.profiler PyTorch's, but the core's
workspaces are C++ vectors. All three allocate on the C heap, and their peaks show in resident memory.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import pgdfast

PROBED = ("G", "E")


def probe(name):
    """What memory_probe.py prints about a problem, and the seconds it took.

    It runs in a process of its own, away from the source folder, with the same pgdfast as this process.
    """
    start = perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(Path(pgdfast.__file__).resolve().parent.parent)}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, str(Path(__file__).with_name("memory_probe.py")), name],
                              capture_output=True, text=True, timeout=300, cwd=folder, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"memory_probe.py ended with code {done.returncode}: {done.stderr.strip()[-2000:]}")
    found = json.loads(done.stdout)
    state = found["native"], found["solver"], found["status"]
    if state != ("available", "dual", "accepted"):
        raise RuntimeError(f"the step of {name} was to be native, dual and accepted, and is {', '.join(map(str, state))}")
    return {**found, "problem": name, "seconds": perf_counter() - start}


def lines(probed):
    """The figures of one problem, in words."""
    heaps, peaks, baseline = probed["heaps"], probed["peaks"], probed["baseline"]
    above = "" if baseline is None else f", {(peaks[1] - baseline) / 1e6:.1f} of them by the step"
    yield (f"{probed['problem']}: peak resident memory {probed['after_import'] / 1e6:.0f} MB after import, "
           f"{peaks[1] / 1e6:.0f} MB with one dual step{above}, {peaks[-1] / 1e6:.0f} MB with {len(peaks) - 1}")
    yield f"  peak growth by step, kB: {_growth(peaks)}"
    if heaps[0] is not None:
        yield f"  heap growth by step, kB: {_growth(heaps)}"


def _growth(sizes):
    return " ".join(f"{(b - a) / 1e3:.0f}" for a, b in zip(sizes, sizes[1:], strict=False))
