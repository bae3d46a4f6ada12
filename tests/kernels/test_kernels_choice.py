"""Which implementation runs where, and every instruction set of the native one."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import fit, mlp, rand, relative

import pgdfast
from pgdfast import kernels

TESTS = Path(__file__).resolve().parent.parent


def test_backends_say_what_can_be_used():
    status = pgdfast.backends()
    assert status["native"] == status["torch"] == status["reference"] == "available"


def test_requested(monkeypatch):
    monkeypatch.delenv("PGDFAST_BACKEND", raising=False)
    assert kernels.requested("auto") == "auto" and kernels.requested("torch") == "torch"
    monkeypatch.setenv("PGDFAST_BACKEND", "torch")
    assert kernels.requested("auto") == "torch" and kernels.requested("native") == "native"
    monkeypatch.setenv("PGDFAST_BACKEND", "cuda")
    with pytest.raises(
        ValueError,
        match="unknown backend 'cuda'; use one of auto, native, triton, torch, reference",
    ):
        kernels.requested("auto")


def test_native_refuses_other_dtypes_and_auto_takes_another():
    w = rand(3).to(torch.bfloat16).requires_grad_()
    with pytest.raises(
        RuntimeError, match="asked for but runs only on the CPU in float32 and float64.*bfloat16"
    ):
        pgdfast.linearize(lambda: 2 * w, [w], backend="native")
    lin = pgdfast.linearize(lambda: 2 * w, [w])
    assert relative(lin.dense(), 2 * torch.eye(3)) < 1e-2


DTYPES = (torch.float32, torch.float64)


LIMITS = [1e-5] * 6 + [1e-4] * 4 + [1e-12] * 4 + [1e-9] * 2 + [1e-5] * 4


def results(backend):
    """Products and steps of a network with odd sizes, in both dtypes."""
    found = []
    for dtype in DTYPES:
        model = mlp(3, 17, 9, 2, dtype=dtype)
        x, y = rand(37, 3, dtype=dtype), rand(37, 2, seed=1, dtype=dtype)
        closure = lambda: F.mse_loss(model(x), y)  # noqa: E731, B023
        lin = pgdfast.linearize(closure, model.parameters(), backend=backend)
        found += [lin.gram(), lin.dense(), lin.diagonal(), lin.gradient()]
        found += [
            pgdfast.solve(lin, 0.1, solver=solver, cg=cg).step
            for solver, cg in [
                ("dual", None),
                ("primal", None),
                ("cg", None),
                ("cg", pgdfast.CG(preconditioner="jacobi")),
                ("cg", pgdfast.CG(preconditioner="nystrom")),
                ("lsmr", pgdfast.CG(tolerance=1e-8)),
            ]
        ]
    return found


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_instruction_sets_agree(name, tmp_path):
    out = tmp_path / "out.pt"
    code = (
        "import sys, torch; sys.path[:0] = sys.argv[1:3]; from test_kernels_choice import *; "
        "torch.save(results('native'), sys.argv[3]); "
        "print(pgdfast.build_info()['instruction set'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(TESTS), str(TESTS / "kernels"), str(out)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PGDFAST_ISA": name},
        cwd=tmp_path,   # not the source folder, whose package has no core
    )
    if "which this processor does not run" in done.stderr:
        pytest.skip(f"this processor has no {name}")
    assert done.returncode == 0, done.stderr
    assert name in done.stdout
    limits = LIMITS
    for a, b, limit in zip(torch.load(out), results("torch"), limits, strict=True):
        assert relative(a, b) < limit


def test_every_blas_agrees():
    """The table filled from the vendor BLAS and from ATen gives the same steps."""
    core = importlib.import_module("pgdfast._C")
    used = core.blas()
    try:
        assert core.select_blas("aten") == "aten"
        limits = LIMITS
        for a, b, limit in zip(results("native"), results("torch"), limits, strict=True):
            assert relative(a, b) < limit
    finally:
        assert core.select_blas(used) == used


def test_a_missing_core_is_said_once(monkeypatch):
    params, closure = fit()
    monkeypatch.setattr(kernels.native, "_C", None)
    monkeypatch.setattr(kernels, "_said", set())
    with pytest.warns(RuntimeWarning, match="C\\+\\+ core is not built; run pip install"):
        assert pgdfast.linearize(closure, params).kernels().name == "torch"
    assert pgdfast.linearize(closure, params).kernels().name == "torch"
