"""Factors that solutions own, plans that threads share, switches that are not understood."""

import gc
import os
import subprocess
import sys
import threading

import pytest
import torch
from helpers import gradient, mlp, rand, relative

import pgdfast
from pgdfast.kernels import native, protocol

core = native._C
pytestmark = pytest.mark.skipif(core is None, reason="the C++ core is not built")


def problem(rows=40, dtype=torch.float64, backend="native", seed=0):
    model, x = mlp(2, 8, 2, dtype=dtype, seed=seed), rand(rows, 2, seed=1, dtype=dtype)
    return pgdfast.linearize(lambda: model(x), list(model.parameters()), backend=backend)


def solved(lin, solver, mu):
    """(outcome of the kernels, the matrix that its factor is of)."""
    kernels, J = lin.kernels(), lin.dense()
    if solver == "dual":
        _ = lin.row_layout()
        return kernels.dual(lin.residual, None, mu, None), J @ J.T + mu * torch.eye(len(J), dtype=J.dtype)
    d = torch.full((lin.num_parameters,), mu, dtype=J.dtype)
    return kernels.primal(lin.residual, d, None), J.T @ J + mu * torch.eye(J.shape[1], dtype=J.dtype)


@pytest.mark.parametrize("backend", ["native"])
@pytest.mark.parametrize("solver", ["dual", "primal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("rows", [40, 120])   # 240 residuals: a float32 factor
def test_a_factor_stays_that_of_its_solve(backend, solver, dtype, rows):
    lin = problem(rows, dtype, backend)
    outcomes = [solved(lin, solver, mu) for mu in (10.0, 0.5, 100.0)]
    b = rand(outcomes[0][0].factor.order, seed=5, dtype=dtype)
    for outcome, matrix in outcomes:
        assert isinstance(outcome, protocol.Outcome) and outcome.status == "solved"
        factor = outcome.factor
        assert factor.order == len(matrix) and factor.is_dual == (solver == "dual") and factor.bytes >= 4 * factor.order**2 / 2
        assert relative(factor.solve(b), torch.linalg.solve(matrix, b)) < (1e-11 if dtype == torch.float64 else 1e-3)
        if solver == "dual":
            assert relative(lin.vjp(factor.dual_vector), outcome.step) < (1e-13 if dtype == torch.float64 else 1e-5)
        else:
            with pytest.raises(ValueError, match="no dual vector"):
                _ = factor.dual_vector


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_solve_again_after_another_solve_at_another_damping(solver):
    """It used the newest factor: 79 % off."""
    lin = problem()
    first = pgdfast.solve(lin, 0.1, solver=solver)
    u = rand(lin.num_residuals, seed=3)
    expected = first.solve_with_same_factor(u)
    for mu in (1e-3, 50.0):
        pgdfast.solve(lin, mu, solver=solver)
    other = problem(20)
    pgdfast.solve(other, 1.0, solver=solver)
    assert torch.equal(first.solve_with_same_factor(u), expected)


def test_a_factor_outlives_its_plan_and_its_constants():
    lin = problem()
    outcome, matrix = solved(lin, "dual", 0.3)
    factor, b = outcome.factor, rand(len(matrix), seed=4)
    del lin, outcome
    gc.collect()
    assert relative(factor.solve(b), torch.linalg.solve(matrix, b)) < 1e-11


def test_memory_of_a_factor_is_used_again_once_nobody_holds_it():
    lin = problem()
    _ = lin.row_layout()
    plan, ones = lin.kernels()._plan, torch.ones(4, dtype=torch.float64)
    step = torch.empty(lin.num_parameters, dtype=torch.float64)
    solves = [plan.dual(lin.residual, ones, 1.0, None, step)[-1] for _ in range(2)]
    assert solves[0] is not None and plan.dual(lin.residual, ones, -1e9, None, step)[-1] is None   # not positive definite
    b = rand(lin.num_residuals, seed=2)
    x = [torch.empty_like(b) for _ in solves]
    for factor, out in zip(solves, x, strict=True):
        factor.solve(b, out)
    assert torch.equal(*x)


def pinn(seed):
    model, x = mlp(2, 24, 24, 1, seed=seed), rand(60, 2, seed=1).requires_grad_()
    return pgdfast.linearize(lambda: gradient(gradient(model(x), x)[:, 0].sum(), x)[:, 0], list(model.parameters()))


@pytest.mark.parametrize("what", ["products", "solves", "factor"])
def test_threads_share_a_linearization(what):
    """Half of the products of two threads were wrong, silently: they worked in one arena."""
    lin = pinn(0)
    _ = lin.row_layout()
    factor = solved(lin, "dual", 0.1)[0].factor
    vectors = [rand(lin.num_parameters, seed=k) for k in range(8)]
    cotangents = [rand(lin.num_residuals, seed=k) for k in range(8)]

    def one(k):
        if what == "products":
            return torch.cat([lin.jvp(vectors[k % 8]), lin.vjp(cotangents[k % 8])])
        if what == "factor":
            return factor.solve(cotangents[k % 8])
        return pgdfast.solve(lin, 10.0 ** -(k % 4), solver=("dual", "primal", "cg")[k % 3], cg=pgdfast.CG(20)).step

    expected = [one(k) for k in range(24)]
    wrong, failed = [], []

    def work(first):
        try:
            for k in range(first, first + 200 if what != "solves" else first + 48):
                if not torch.equal(one(k % 24), expected[k % 24]):
                    wrong.append(k)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(7 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and not failed and not wrong


@pytest.mark.parametrize(("name", "value", "message"), [
    ("PGDFAST_ISA", "avx999", "PGDFAST_ISA is 'avx999'; it must be one of .*baseline"),
    ("PGDFAST_BLAS", "foo", "PGDFAST_BLAS is 'foo'; it must be one of mkl, aten"),
    ("PGDFAST_PASS_BYTES", "10MB", "PGDFAST_PASS_BYTES is '10MB'; it must be a number that is not negative"),
])
def test_a_switch_that_is_not_known_is_told(name, value, message, tmp_path):
    done = subprocess.run([sys.executable, "-c", "import pgdfast"], capture_output=True, text=True, timeout=120, cwd=tmp_path,
                          env=os.environ | {name: value})
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: pgdfast: ")
    with pytest.raises(ValueError, match=message):
        raise ValueError(last)


def test_an_unknown_blas_is_refused_and_the_one_in_use_kept():
    used = core.blas()
    with pytest.raises(ValueError, match="one of mkl, aten"):
        core.select_blas("foo")
    assert core.blas() == used
    problem().jvp(rand(problem().num_parameters))


def test_a_plan_whose_binding_failed_refuses_to_work():
    lin = problem()
    v = rand(lin.num_parameters)
    plan, constants = lin.kernels()._plan, list(lin._constants)
    expected = lin.jvp(v)
    broken = [c[:1] if isinstance(c, torch.Tensor) else c for c in constants]
    assert not plan.bind(broken)
    with pytest.raises(ValueError, match="no constants; bind them first"):
        plan.jvp(v, torch.empty_like(expected))
    assert plan.bind(constants)
    assert torch.equal(lin.jvp(v), expected)
