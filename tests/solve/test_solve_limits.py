"""LSMR; and what iterative solvers do where there is little or nothing to solve."""

import copy
import math

import pytest
import torch
from helpers import (
    BACKENDS,
    SOLVERS,
    TIGHT,
    fit,
    flat,
    linear_problem,
    model_value,
    rand,
    relative,
    spectrum,
    tanh_fit,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import pgdfast
from pgdfast import reference
from pgdfast.solve.krylov import cg
from pgdfast.solve.lsmr import lsmr
from pgdfast.solve.problem import Problem

PRECONDITIONERS = (None, "jacobi", "nystrom", pgdfast.Nystrom(rank=3), pgdfast.Nystrom(rank=500))


# --- LSMR -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("M, P", [(40, 60), (60, 40)])
def test_lsmr_keeps_float32_digits_where_the_normal_equations_lose_them(M, P, backend):
    """Condition 1e8 of J^T J + mu I, hence 1e4 of what LSMR sees."""
    J = spectrum(M, P, 1e-4).float()
    b = (J @ rand(P, seed=4, dtype=torch.float32))   # compatible, so that the residual adds nothing
    params, closure = linear_problem(J, b, torch.float32)
    ref = reference.linearize(closure, params)
    expected = reference.solve(ref, 1e-8, solver="lsmr").step
    assert relative(expected, reference.solve(ref, 1e-8).step) < 1e-6
    lin = pgdfast.linearize(closure, params, backend=backend)
    problem = Problem.of(lin, 1e-8)
    ours = relative(lsmr(problem, pgdfast.CG(3000, 1e-12)).outcome.step, expected)
    theirs = relative(cg(problem, pgdfast.CG(3000, 1e-12)).outcome.step, expected)
    assert ours < 3e-3 and ours < 0.3 * theirs


@pytest.mark.parametrize("backend", BACKENDS)
def test_lsmr_reports_its_work(backend):
    params, closure = tanh_fit(penalty=True)
    lin = pgdfast.linearize(closure, params, backend=backend)
    short = pgdfast.solve(lin, 1e-3, solver="lsmr", cg=pgdfast.CG(4, 1e-12))
    assert (short.status, short.iterations, short.usable) == ("max_iterations", 4, True)
    assert "iteration limit" in short.advice
    for solution in (short, pgdfast.solve(lin, 1e-3, solver="lsmr", cg=TIGHT)):
        error = lin.gradient() - lin.ggn(solution.step) - 1e-3 * solution.step
        assert solution.residual_norm == pytest.approx(
            float(error.norm() / lin.gradient().norm()), rel=1e-3, abs=1e-12
        )
        assert solution.predicted_reduction == pytest.approx(model_value(lin, solution.step, 0.0), rel=1e-9)
    assert solution.status == "solved" and solution.residual_norm < 1e-11


def test_lsmr_without_damping():
    J = spectrum(30, 20, 1e-2)
    J[:, 0] = 0   # a direction that no residual sees stays still
    params, closure = linear_problem(J, rand(30, seed=7))
    lin = pgdfast.linearize(closure, params)
    solution = pgdfast.solve(lin, 0.0, solver="lsmr", cg=TIGHT)
    expected = torch.linalg.pinv(J) @ closure().detach()
    assert solution.solver == "lsmr" and relative(solution.step, expected) < 1e-8
    params, closure = tanh_fit(penalty=True)
    solution = pgdfast.solve(pgdfast.linearize(closure, params), 0.0, solver="lsmr")
    assert solution.solver == "eigh" and "positive diagonal" in solution.reason


# --- one answer from all, or an honest status -----------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    M=st.integers(1, 12), P=st.integers(1, 12), low=st.sampled_from([1.0, 1e-1, 1e-2]),
    damping=st.sampled_from([1e-4, 1e-2, 1.0, 1e12]), seed=st.integers(0, 100), native=st.booleans(),
    preconditioner=st.sampled_from(PRECONDITIONERS),
)
def test_all_solvers_agree(M, P, low, damping, seed, native, preconditioner):
    params, closure = linear_problem(spectrum(M, P, low, seed), rand(M, seed=seed))
    lin = pgdfast.linearize(closure, params, backend=BACKENDS[not native])
    g = lin.gradient()
    A = lin.dense().T @ lin.dense() + damping * torch.eye(P, dtype=torch.float64)
    expected = torch.linalg.solve(A, g)
    cg = pgdfast.CG(2000, 1e-13, preconditioner=preconditioner)
    for solver in SOLVERS:
        step = pgdfast.solve(lin, damping, solver=solver, cg=cg).step
        assert relative(step, expected) < 1e-7, solver
        if damping == 1e12:
            assert relative(step, g / damping) < 1e-9, solver


SINGULAR = {
    "zero": torch.zeros(4, 3),
    "rank one": torch.ones(4, 3),
    "one by one": torch.full((1, 1), 2.0),
    "one residual": torch.arange(1.0, 6.0)[None],
    "one parameter": torch.arange(1.0, 6.0)[:, None],
    "wide": torch.cat([torch.ones(2, 4), torch.zeros(2, 3)], 1),
    "tiny": torch.full((3, 2), 1e-30),
    "huge": torch.full((3, 2), 1e15),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ["cg", "lsmr"])
@pytest.mark.parametrize("name", SINGULAR)
def test_singular_jacobians(name, solver, backend, dtype):
    params, closure = linear_problem(SINGULAR[name], rand(len(SINGULAR[name]), seed=1), dtype)
    lin = pgdfast.linearize(closure, params, backend=backend)
    ref = reference.linearize(closure, params)
    for mu in (1.0, 0.0):
        expected = reference.solve(ref, mu, solver="eigh").step   # whose factor never fails
        for preconditioner in PRECONDITIONERS if solver == "cg" else (None,):
            cg = pgdfast.CG(100, 1e-6, preconditioner=preconditioner)
            solution = pgdfast.solve(lin, mu, solver=solver, cg=cg)
            assert solution.step.isfinite().all()
            if solution.status == "solved" and cg.preconditioner is None:
                assert relative(solution.step, expected) < 1e-3
            elif solution.usable:   # without damping a solution, but not the shortest
                assert relative(ref.ggn(solution.step.double()), ref.ggn(expected)) < 1e-3
            else:
                assert not solution.step.any() and solution.advice
            if mu > 0 and name not in ("tiny", "huge"):
                assert solution.status == "solved"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_coefficients_that_are_not_finite(solver, backend, dtype):
    """A finite loss with an infinite derivative, as of sqrt at 0."""
    w = torch.tensor([0.0, 1.0, 4.0], dtype=dtype, requires_grad=True)
    lin = pgdfast.linearize(lambda: torch.sqrt(w) - 3, [w], backend=backend)
    solution = pgdfast.solve(lin, 0.1, solver=solver)
    assert solution.status == "not_finite" and not solution.usable and not solution.step.any()
    assert "NaN or infinity in the rows of 1 of 3 residuals (0)" in solution.advice
    with pytest.raises(RuntimeError, match="ended as 'not_finite' and left no factor"):
        solution.solve_with_same_factor(lin.residual)
    before = w.detach().clone()
    optimizer = pgdfast.LM([w], solver=solver, backend=backend)
    optimizer.step(lambda: torch.sqrt(w) - 3)
    assert torch.equal(w, before) and optimizer.report.status == "failed" and "NaN" in optimizer.report.advice


@pytest.mark.parametrize("solver", ["cg", "lsmr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_and_scaling(dtype, solver):
    params, closure = fit(dtype)
    cg = pgdfast.CG(500, 1e-10, preconditioner="nystrom", warm_start=True, truncate=True)
    groups = [{"params": params[:2], "lr": 0.2}, {"params": params[2:], "lr": 0.7}]
    optimizer = pgdfast.LM(groups, damping=0.1, scaling="marquardt", solver=solver, cg=cg)
    others, closure_of_others = fit(torch.float64)
    groups = [{"params": others[:2], "lr": 0.2}, {"params": others[2:], "lr": 0.7}]
    truth = pgdfast.LM(groups, damping=0.1, scaling="marquardt", solver=solver, backend="reference")
    for _ in range(5):
        optimizer.step(closure)
        truth.step(closure_of_others)
    assert relative(flat(params), flat(others)) < (1e-6 if dtype == torch.float64 else 1e-3)
    copied = copy.deepcopy(optimizer)
    assert copied.state_dict()["state"][0].keys() == optimizer.state_dict()["state"][0].keys()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(preconditioner="ilu"), "unknown preconditioner 'ilu'; use None, 'jacobi', 'nystrom'"),
        (dict(preconditioner=3), "unknown preconditioner 3"),
        (dict(progress=-1.0), "progress is -1.0; it must be a finite number"),
        (dict(absolute=math.nan), "absolute is nan; it must be a finite number"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        pgdfast.CG(**options)


@pytest.mark.parametrize("options", [dict(rank=0), dict(rank=2.5), dict(refresh=0)])
def test_bad_sketch(options):
    with pytest.raises(ValueError, match="pgdfast.Nystrom: (rank|refresh) is .* positive integer"):
        pgdfast.Nystrom(**options)
