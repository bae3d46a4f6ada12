"""Run by memory.py in a process of its own: takes LM steps on a problem and prints what they took, as a line of JSON.

Resident memory is that of this process alone. On Linux its peak is VmHWM; ru_maxrss, the fallback, would there start at
the size of the process that started this one.
"""

import ctypes
import importlib.util
import json
import resource
import sys
from pathlib import Path

import torch

import pgdfast

STEPS = 6


def problems():
    spec = importlib.util.spec_from_file_location("problems", Path(__file__).with_name("problems.py"))
    module = sys.modules["problems"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peak():
    """Bytes that were resident at most."""
    try:
        return _status("VmHWM")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _resident():
    """Bytes that are resident now."""
    return _status("VmRSS")


def _status(field):
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    )]


def heap():
    """Bytes in use on the C heap, where PyTorch, the C++ core and Python all allocate; None without glibc 2.33."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def forget_peak():
    """Let the peak start anew at what is resident now; False where the system cannot."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True


def warm_up():
    """One dual step on a small network with what every step needs once: code, BLAS buffers, threads."""
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    x, y = torch.randn(64, 16), torch.randn(64, 4)
    optimizer = pgdfast.LM(model.parameters(), damping_rule="constant", solver="dual")
    optimizer.step(lambda: torch.nn.functional.mse_loss(model(x), y))


def main():
    after_import = peak()
    warm_up()
    problem = problems().PROBLEMS[sys.argv[1]]
    model = problem.model()
    closure = problem.closure(model)
    optimizer = pgdfast.LM(
        model.parameters(), lr=1e-2, damping=problem.damping, damping_rule="constant", solver="dual"
    )
    closure()
    baseline = _resident() if forget_peak() else None
    heaps, peaks = [heap()], [peak()]
    for _ in range(STEPS):
        optimizer.step(closure)
        heaps.append(heap())
        peaks.append(peak())
    print(json.dumps({
        "after_import": after_import, "baseline": baseline, "heaps": heaps, "peaks": peaks, "solver": optimizer.report.solver,
        "status": optimizer.report.status, "residuals": problem.residuals, "activations": problem.activations,
        "native": pgdfast.backends()["native"],
    }))


if __name__ == "__main__":
    main()
