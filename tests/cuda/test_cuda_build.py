"""What can be said of the CUDA kernels without a GPU: that nvcc takes them, what the build says, and the errors."""

import shutil
import subprocess
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import fit, mlp, rand

import pgdfast
from pgdfast import kernels
from pgdfast.kernels import cuda, cuda_library

CORE = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = sorted((CORE / "cuda").glob("*.cu"))


@pytest.mark.skipif(not SOURCES, reason="the source tree is not here")
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc to compile the CUDA kernels with")
def test_every_kernel_compiles_for_sm_90(tmp_path):
    """The GPU's half, not optimised; the emulation compiles the host's."""
    def build(source):
        return subprocess.run(
            ["nvcc", "-std=c++20", "-arch=sm_90", "-Xptxas", "-O0", "-Xcicc", "-O0", "-Werror", "all-warnings", "-cubin", "-o",
             tmp_path / f"{source.stem}.cubin", source, '-DPGDFAST_CUDA_ARCHITECTURES="sm_90"'],
            capture_output=True, text=True, timeout=300,
        )

    with ThreadPoolExecutor(2) as pool:
        for source, done in zip(SOURCES, pool.map(build, SOURCES), strict=True):
            assert done.returncode == 0, f"{source.name}: {done.stderr[-3000:]}"


def test_build_info_says_what_was_built():
    said = pgdfast.build_info()["cuda"]
    if cuda_library.PATH.exists():
        assert said.startswith(("built for sm_80, sm_90 and PTX", "the CUDA kernels do not load"))
    else:
        assert said == "not built"
    assert pgdfast.backends()["native (CUDA)"] == (cuda.available() or "available")


def on_a_gpu(module):
    """The list of implementations as a closure of CUDA tensors would meet it, with CPU tensors in their place."""
    return types.SimpleNamespace(
        available=module.available, LIMITS=module.LIMITS, Kernels=module.Kernels, applies=lambda device, dtype: True
    )


@pytest.mark.parametrize(("state", "message"), [
    ("missing", "the CUDA kernels are not built; install with PGDFAST_CUDA=ON where a CUDA compiler is"),
    ("cpu", "PyTorch is not a CUDA build"),
    ("old", r"the CUDA kernels need compute capability 8.0, and Old card has 7.5"),
    ("no blas", "no cuBLAS of CUDA 77: PyTorch has loaded no library of this name"),
])
def test_what_stands_in_the_way_is_said_once_and_the_next_backend_used(state, message, monkeypatch, emulated, tmp_path):
    monkeypatch.setattr(cuda_library, "_found", None if state == "missing" else emulated)
    monkeypatch.setattr(cuda_library, "PATH", tmp_path / "none.so")
    monkeypatch.setattr(torch.version, "cuda", None if state == "cpu" else "77.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5) if state == "old" else (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old card")
    monkeypatch.setattr(cuda_library, "_blas", {})
    if state == "no blas":
        monkeypatch.setattr(emulated, "load_blas", lambda name: b"PyTorch has loaded no library of this name")
    torch_module = kernels.IMPLEMENTATIONS["torch"]
    monkeypatch.setattr(kernels, "IMPLEMENTATIONS", {"native": on_a_gpu(cuda), "torch": torch_module})
    monkeypatch.setattr(kernels, "_said", set())
    params, closure = fit()
    with pytest.warns(RuntimeWarning, match=message):
        assert pgdfast.linearize(closure, params).kernels().name == "torch"
    assert pgdfast.linearize(closure, params).kernels().name == "torch"   # and not again
    with pytest.raises(RuntimeError, match=message):
        pgdfast.linearize(closure, params, backend="native")


def test_nothing_is_said_of_cuda_where_no_tensor_is_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_library, "_found", None)
    monkeypatch.setattr(cuda_library, "PATH", tmp_path / "none.so")
    monkeypatch.setattr(kernels, "_said", set())
    params, closure = fit()
    pgdfast.linearize(closure, params)   # a warning would be an error


def test_data_on_another_device_than_the_model():
    """Parameters on one device and residuals on another: one clear error, before anything is changed."""
    model = mlp(2, 3, 1)
    params = list(model.parameters())
    before = [p.detach().clone() for p in params]
    x = rand(4, 2)
    with pytest.raises(ValueError, match="parameters are on cpu and the closure's result on meta; move data and model to one"):
        pgdfast.LM(params).step(lambda: model(x).to("meta"))
    assert all(torch.equal(p.detach(), q) for p, q in zip(params, before, strict=True))


def test_constants_on_another_device(emulated):
    model, x = mlp(2, 3, 1), rand(4, 2)
    lin = pgdfast.linearize(lambda: model(x), model.parameters())
    constants = list(lin._constants)
    last = max(k for k, c in enumerate(constants) if isinstance(c, torch.Tensor))
    constants[last] = constants[last].to("meta")
    found = cuda.Kernels(lin._plan.program, torch.float64, library=emulated)
    with pytest.raises(RuntimeError, match="tensors are on cpu and meta; move data and model to one device"):
        found.bind(constants)


def test_a_library_that_does_not_load(monkeypatch, tmp_path):
    broken = tmp_path / "_cuda.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(cuda_library, "PATH", broken)
    monkeypatch.setattr(cuda_library, "_found", None)
    assert "do not load" in cuda_library.unusable() and "rebuild them" in pgdfast.build_info()["cuda"]


def test_misuse_is_told(emulated):
    model, x = mlp(2, 3, 1), rand(4, 2)
    lin = pgdfast.linearize(lambda: model(x), model.parameters())
    found = cuda.Kernels(lin._plan.program, torch.float64, library=emulated)
    found.bind(lin._constants)
    with pytest.raises(ValueError, match="needs a row layout"):
        found.gram()
    factor = found.primal(lin.residual, torch.ones(lin.num_parameters, dtype=torch.float64), None).factor
    with pytest.raises(ValueError, match="no dual vector"):
        _ = factor.dual_vector
    with pytest.raises(RuntimeError, match="another layout"):
        found.bind([c[:1] if isinstance(c, torch.Tensor) else c for c in lin._constants])
