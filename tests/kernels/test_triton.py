"""The Triton backend where there is no GPU: when it is offered, its tests under the interpreter, its kernels compiled."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import fit

import pgdfast
from pgdfast import kernels
from pgdfast.kernels import triton_kernels

ROOT, HERE = Path(__file__).resolve().parents[2], Path(__file__).resolve().parent
INSTALLED = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")


@pytest.fixture
def fresh(monkeypatch):
    """Availability found anew, without the interpreter, and again after the test."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("PGDFAST_BACKEND", raising=False)
    monkeypatch.setattr(kernels, "_said", set())
    triton_kernels.available.cache_clear()
    yield monkeypatch
    triton_kernels.available.cache_clear()


def without(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest))


def test_a_missing_triton_is_one_clear_error(fresh):
    without(fresh)
    assert pgdfast.backends()["triton"] == "Triton is not installed; pip install triton"
    params, closure = fit()
    with pytest.raises(RuntimeError, match="'triton' cannot be used: Triton is not installed; pip install triton; use one of "):
        pgdfast.LM(params, backend="triton").step(closure)


@pytest.mark.parametrize("version, reason", [((3, 3), r"too old \(3.3 < 3.4\)"), (None, "version .* cannot be told")])
def test_an_old_triton_is_one_clear_error(fresh, version, reason):
    fresh.setattr(importlib.util, "find_spec", lambda name: object())
    fresh.setattr(triton_kernels, "_version", lambda: version)
    with pytest.raises(RuntimeError, match=f"backend 'triton' cannot be used: .*{reason}.*; use one of "):
        kernels.requested("triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@needs_triton
def test_a_triton_without_a_gpu_says_so(fresh):
    assert "no CUDA device" in pgdfast.backends()["triton"]


def test_a_gpu_without_triton_hears_of_it_once_and_a_cpu_never(fresh):
    without(fresh)
    params, closure = fit()
    program = pgdfast.linearize(closure, params, backend="torch")._plan.program
    for module in (kernels.native, kernels.cuda):
        fresh.setattr(module, "applies", lambda device, dtype: False)
    fresh.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert kernels.kernels_for(program, torch.device("cpu"), "auto").name == "torch"   # warnings are errors
    with pytest.warns(RuntimeWarning, match="Triton is not installed; pip install triton; the next backend is used"):
        made = kernels.kernels_for(program, torch.device("cuda"), "auto")
    assert made.name == kernels.kernels_for(program, torch.device("cuda"), "auto").name == "torch"


def test_capabilities_and_dtypes(fresh):
    fresh.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device.index == 1 else (7, 5))
    new, old = torch.device("cuda", 1), torch.device("cuda", 0)
    assert triton_kernels.applies(new, torch.float32) and triton_kernels.applies(new, torch.float64)
    assert not triton_kernels.applies(new, torch.bfloat16) and not triton_kernels.applies(old, torch.float32)
    assert not triton_kernels.applies(torch.device("cpu"), torch.float32)
    fresh.setenv("TRITON_INTERPRET", "1")
    assert triton_kernels.applies(torch.device("cpu"), torch.float32)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="these tests have run on the GPU")
@pytest.mark.parametrize("name", ["kernels", "backend"])
def test_under_the_interpreter(name, tmp_path):
    """In a process of its own: Triton reads TRITON_INTERPRET when it is first imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"),
         str(HERE / f"test_triton_{name}.py"), "--rootdir", str(ROOT)],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]


# Every kernel with the constants of one use, and what its pointers point to.
KERNELS = {
    "muladd._muladd": {"OUTER": 2, "HAS_C": True, "OVERWRITE": False, "BLOCK": 1024},
    "muladd._muladd_sum": {"KEPT_DIMS": 1, "SUMMED_DIMS": 2, "HAS_C": True, "KEPT": 32, "SUMMED": 32},
    "muladd._add_partials": {"DIMS": 1, "BLOCK": 1024},
    "epilogue._forward": {"HAS_C": True, "KEEP_Y": True, "OVERWRITE": False, "BLOCK": 1024},
    "epilogue._adjoint": {"HAS_C": True, "OVERWRITE": False, "ROWS": 64, "COLUMNS": 32},
    "gather._forward": {"OVERWRITE": False, "BLOCK": 1024},
    "gather._adjoint": {"MEMBERS": 16, "BLOCK": 128},
    "project._project": {"OUTER": 1, "PRE": True, "POST": False, "LEFT0": True, "RIGHT0": True, "LEFT1": False,
                         "RIGHT1": True, "TERMS": 2, "ROWS": 4, "BLOCK": 512},
    "gram._gram": {"SHARED": False, "DEPTH": 16},
    "cg._dots": {"PROGRAMS": 256, "BLOCK": 1024},
    "cg._update": {"HAS_M": True, "PATH": True, "PROGRAMS": 256, "BLOCK": 1024},
    "cg._dot": {"BLOCK": 1024},
    "cg._turn": {"HAS_M": True, "GIVEN": False, "PATH": True, "PROGRAMS": 256, "BLOCK": 1024},
}
INTEGERS = {"geometry", "owner", "ranges", "positions", "order", "starts"}
SCALARS = {"number", "numbers", "first", "second", "state", "new", "values", "kept", "progress"}
VECTORS = {
    "y", "x", "c", "z", "b", "K", "A", "B", "p", "w", "r", "d", "m", "Aw", "safe", "path", "partial", "pre", "post", "left0",
    "right0", "left1", "right1",
}


@needs_triton
def test_every_kernel_compiles(tmp_path):
    """By Triton's own compiler, which needs no GPU: types that the interpreter lets pass; no TF32, no atomics."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; from test_triton import *; compiled('fp32', 90); compiled('fp64', 80)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(HERE.parent), str(HERE)], capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env=environment,
    )
    if "ptxas" in done.stderr and "Cannot find" in done.stderr:
        pytest.skip("this Triton has no ptxas")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == 2 * list(KERNELS)


def compiled(element: str, capability: int) -> None:
    """Compile every kernel and print its name."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for name, constants in KERNELS.items():
        module, function = name.split(".")
        module = importlib.import_module(f"pgdfast.kernels.triton_kernels.{module}")
        kernel = getattr(module, function)
        if function == "_gram":
            constants = constants | {"T": module.TILE[4 if element == "fp32" else 8]}
        signature = {}
        for argument in kernel.arg_names:
            if argument in constants:
                signature[argument] = "constexpr"
            elif argument in INTEGERS:
                signature[argument] = "*i64"
            elif argument in SCALARS or (function == "_dot" and argument == "partial"):
                signature[argument] = "*fp64"
            else:
                signature[argument] = f"*{element}" if argument in VECTORS else "i32"
        made = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))
        assert "tf32" not in made.asm["ptx"] and "atom." not in made.asm["ptx"] and len(made.asm["cubin"]) > 0, name
        print(name)
