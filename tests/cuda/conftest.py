"""The CUDA sources compiled as plain C++ against csrc/cuda/emulate.h, once per session, and put where pgdfast finds kernels.

What that finds: wrong results, barriers that not all threads reach, results that depend on the order of threads or blocks, and
memory read before it is written. What it does not: misaligned accesses, races within a phase that no order of whole threads
shows, and speed.
"""

import functools
import shutil
import subprocess
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pgdfast import kernels
from pgdfast.kernels import cuda, cuda_library

CORE = Path(__file__).resolve().parents[2] / "csrc"
KERNELS = sorted((CORE / "cuda").glob("*.cu"))
HOST = [*sorted((CORE / "cuda").glob("*.cpp")), *(CORE / "plan" / name for name in ("plan.cpp", "cut.cpp", "read.cpp"))]
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-U_FORTIFY_SOURCE", "-DPGDFAST_EMULATE", "-Wall", "-Wextra", "-Werror",
         "-Wno-unknown-pragmas", "-Wno-clobbered"]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The emulated library, as a cuda_library.Library."""
    compiler = shutil.which("g++")
    if compiler is None or not KERNELS:
        pytest.skip("the emulation needs g++ and the source tree")
    folder = tmp_path_factory.mktemp("emulated")

    def build(source):
        target = folder / f"{source.name}.o"
        done = subprocess.run([compiler, *FLAGS, "-x", "c++", "-c", "-o", target, source], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, KERNELS + HOST))
    done = subprocess.run([compiler, "-shared", "-o", folder / "emulated.so", *objects], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return cuda_library.Library(folder / "emulated.so")


@pytest.fixture
def order(emulated):
    """Sets the order of threads and blocks: 0 theirs, 1 backwards, 2 shuffled."""
    yield emulated._loaded.pgdfast_cuda_order
    emulated._loaded.pgdfast_cuda_order(0)


@pytest.fixture
def on_cuda(emulated, monkeypatch):
    """Lets closures of CPU tensors take the CUDA kernels, with NaN in memory that nothing was written to."""
    chosen = types.SimpleNamespace(
        available=lambda: None, applies=lambda device, dtype: dtype in (torch.float32, torch.float64), LIMITS="in tests",
        Kernels=functools.partial(cuda.Kernels, library=emulated),
    )
    monkeypatch.setattr(kernels, "IMPLEMENTATIONS", {"native": chosen})
    torch.use_deterministic_algorithms(True)
    yield emulated
    torch.use_deterministic_algorithms(False)
