"""CG's preconditioners, starts, stops and path; LSMR; and what both do where there is nothing to solve."""

import copy
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BACKENDS,
    SOLVERS,
    TIGHT,
    Uphill,
    damping_of,
    fit,
    flat,
    mlp,
    rand,
    relative,
    snapshot,
    unchanged,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import pgdfast
from pgdfast import reference

PRECONDITIONERS = (None, "jacobi", "nystrom", pgdfast.Nystrom(rank=3), pgdfast.Nystrom(rank=500))


def regression(dtype=torch.float64, penalty=False, samples=60):
    """A tanh network that CG needs some iterations for: its parameters and closure."""
    model = mlp(2, 8, 8, 1, dtype=dtype)
    x, y = rand(samples, 2, seed=1, dtype=dtype), rand(samples, 1, seed=2, dtype=dtype)
    params = list(model.parameters())
    squares = (lambda: 1e-2 * params[0].square().sum()) if penalty else (lambda: 0.0)
    return params, lambda: F.mse_loss(model(x), y) + squares()


def linear(J, b, dtype=torch.float64):
    """The closure of residuals J w - b at w = 0, whose Jacobian is J."""
    J, b = J.to(dtype), b.to(dtype)
    w = torch.zeros(J.shape[1], dtype=dtype, requires_grad=True)
    return [w], lambda: J @ w - b


def spectrum(M, P, low, seed=0):
    """An M x P matrix with singular values from 1 down to `low`."""
    n = min(M, P)
    U, V = (torch.linalg.qr(rand(k, n, seed=seed + k))[0] for k in (M, P))
    return U @ torch.diag(torch.logspace(0, math.log10(low), n, dtype=torch.float64)) @ V.T


def value(lin, step, mu, scale=1.0):
    """The damped model's reduction by a step: g . step - 1/2 step . (mu D + J^T J) step."""
    step = step.double()
    curvature = float(step.dot(lin.ggn(step).double() + mu * scale * step))
    return float(lin.gradient().double().dot(step)) - 0.5 * curvature


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# --- preconditioners ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS, ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["identity", "scaled"])
@pytest.mark.parametrize("penalty", [False, True], ids=["plain", "penalty"])
def test_preconditioned_cg_finds_the_same_step(penalty, scaled, preconditioner, backend):
    params, closure = regression(penalty=penalty)
    ref = reference.linearize(closure, params)
    scale = None
    if scaled:
        order = torch.randperm(ref.num_parameters, generator=torch.Generator().manual_seed(0))
        scale = torch.logspace(-2, 2, ref.num_parameters, dtype=torch.float64)[order]
    mu = damping_of(ref, 1e4, scale)
    cg = pgdfast.CG(5000, 1e-12, preconditioner=preconditioner)
    lin = pgdfast.linearize(closure, params, backend=backend)
    solution = pgdfast.solve(lin, mu, scale=scale, solver="cg", cg=cg)
    assert solution.status == "solved" and solution.residual_norm <= 1e-12
    assert relative(solution.step, reference.solve(ref, mu, scale=scale).step) < 1e-8


@pytest.mark.parametrize("backend", BACKENDS)
def test_nystrom_takes_fewer_iterations(backend):
    params, closure = linear(spectrum(80, 60, 1e-4), rand(80, seed=3))
    lin = pgdfast.linearize(closure, params, backend=backend)
    counts = [
        pgdfast.solve(lin, 1e-8, solver="cg", cg=pgdfast.CG(2000, 1e-8, preconditioner=p)).iterations
        for p in (None, pgdfast.Nystrom(rank=20), pgdfast.Nystrom(rank=60))
    ]
    assert counts[1] < 0.8 * counts[0] and counts[2] < 0.2 * counts[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sketch_repeats_bit_for_bit_and_ages(dtype):
    params, closure = regression(dtype)
    lin = pgdfast.linearize(closure, params)
    cg = pgdfast.CG(preconditioner=pgdfast.Nystrom(rank=5, refresh=3))
    first, again = (pgdfast.solve(lin, 0.01, solver="cg", cg=cg) for _ in range(2))
    assert torch.equal(first.step, again.step)
    rows = first.keep["sketch"]["rows"]
    assert rows.shape == (5, lin.num_parameters) and rows.dtype == dtype
    for time, kept in ((0, True), (2, True), (3, False)):
        later = pgdfast.solve(lin, 0.02, solver="cg", cg=cg, keep=first.keep, time=time)
        assert (later.keep["sketch"]["rows"] is rows) == kept
    other, closure = linear(spectrum(9, 7, 0.1), rand(9))
    found = pgdfast.solve(pgdfast.linearize(closure, other), 0.1, solver="cg", cg=cg, keep=first.keep)
    assert found.keep["sketch"]["rows"].shape == (5, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scaling", ["identity", "marquardt"])
def test_resuming_with_what_cg_keeps_repeats_the_run(scaling, dtype):
    cg = pgdfast.CG(12, 1e-6, preconditioner=pgdfast.Nystrom(rank=4, refresh=4), warm_start=True)

    def make(params):
        return pgdfast.LM(params, damping=0.1, solver="cg", scaling=scaling, cg=cg)

    params, closure = fit(dtype)
    optimizer = make(params)
    for _ in range(6):   # in the middle of a sketch's life
        optimizer.step(closure)
    saved, state = snapshot(params), through_a_file(optimizer.state_dict())
    others, closure_of_others = fit(dtype)
    with torch.no_grad():
        for p, q in zip(others, saved, strict=True):
            p.copy_(q)
    resumed = make(others)
    resumed.load_state_dict(state)
    for _ in range(5):
        optimizer.step(closure)
        resumed.step(closure_of_others)
        assert unchanged(params, [p.detach() for p in others])
        assert optimizer.report.iterations == resumed.report.iterations


# --- warm starts ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000), size=st.sampled_from([0.0, 1e-8, 1.0, -1.0, 1e8]),
    damping=st.sampled_from([1e-6, 1e-2, 1.0]), exact=st.booleans(), native=st.booleans(),
)
def test_warm_start_is_never_worse_than_zero(seed, size, damping, exact, native):
    params, closure = linear(spectrum(12, 9, 1e-2, seed), rand(12, seed=seed))
    lin = pgdfast.linearize(closure, params, backend=BACKENDS[not native])
    start = size * (lin.gradient() if exact else rand(9, seed=seed + 1))
    cold = pgdfast.solve(lin, damping, solver="cg", cg=pgdfast.CG(1, 1e-12))
    warm = pgdfast.solve(
        lin, damping, solver="cg", cg=pgdfast.CG(1, 1e-12, warm_start=True), keep={"start": start}
    )
    assert value(lin, warm.step, damping) > 0
    alone = value(lin, start * float(lin.gradient() @ start) / max(
        float(start @ (lin.ggn(start) + damping * start)), 1e-300), damping)
    assert value(lin, warm.step, damping) >= (1 - 1e-9) * max(alone, 0)
    if size <= 0:
        assert size < 0 and not exact or relative(warm.step, cold.step) < 1e-12
    # The prediction is that of the model, although the residual is not orthogonal to the step.
    undamped = value(lin, warm.step, 0.0)
    assert warm.predicted_reduction == pytest.approx(undamped, rel=1e-9)
    tight = pgdfast.CG(500, 1e-12, warm_start=True)
    found = pgdfast.solve(lin, damping, solver="cg", cg=tight, keep={"start": start})
    assert relative(found.step, pgdfast.solve(lin, damping, solver="dual").step) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_warm_start_from_the_solution_is_at_once_there(backend):
    params, closure = regression()
    lin = pgdfast.linearize(closure, params, backend=backend)
    cg = pgdfast.CG(500, 1e-8, warm_start=True)
    first = pgdfast.solve(lin, 0.01, solver="cg", cg=cg)
    again = pgdfast.solve(lin, 0.01, solver="cg", cg=cg, keep=first.keep)
    assert again.iterations == 0 and again.status == "solved" and relative(again.step, first.step) < 1e-6
    fewer = pgdfast.solve(lin, 0.011, solver="cg", cg=cg, keep=first.keep)
    assert fewer.iterations < first.iterations
    other, closure = linear(spectrum(9, 7, 0.1), rand(9))
    lin = pgdfast.linearize(closure, other)   # another P: the start does not apply
    assert pgdfast.solve(lin, 0.1, solver="cg", cg=cg, keep=first.keep).status == "solved"


# --- stops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_progress_stop(backend):
    params, closure = linear(spectrum(80, 60, 1e-4), rand(80, seed=3))
    lin = pgdfast.linearize(closure, params, backend=backend)
    full = pgdfast.solve(lin, 1e-8, solver="cg", cg=pgdfast.CG(2000, 1e-10))
    last = full.iterations
    for progress in (1e-4, 1e-3, 1e-2):
        cg = pgdfast.CG(2000, 1e-10, progress=progress)
        found = pgdfast.solve(lin, 1e-8, solver="cg", cg=cg)
        assert found.status == "progress" and found.usable and "progress" in found.advice
        assert 10 < found.iterations < last
        i, k = found.iterations, max(10, found.iterations // 10)
        values = [
            value(lin, pgdfast.solve(lin, 1e-8, solver="cg", cg=pgdfast.CG(n, 1e-10)).step, 1e-8)
            for n in (i - k - 1, i - 1, i - k, i)
        ]
        assert values[3] - values[2] < k * progress * values[3]
        if i - 1 > k == max(10, (i - 1) // 10):   # and not an iteration earlier
            assert values[1] - values[0] >= k * progress * values[1]
        last = found.iterations


@pytest.mark.parametrize("backend", BACKENDS)
def test_absolute_stop(backend):
    params, closure = regression()
    lin = pgdfast.linearize(closure, params, backend=backend)
    norm = float(lin.gradient().norm())
    found = pgdfast.solve(lin, 0.01, solver="cg", cg=pgdfast.CG(500, 1e-12, absolute=1e-3 * norm))
    same = pgdfast.solve(lin, 0.01, solver="cg", cg=pgdfast.CG(500, 1e-3))
    assert found.status == "solved" and found.iterations == same.iterations
    found = pgdfast.solve(lin, 0.01, solver="cg", cg=pgdfast.CG(500, 1e-12, absolute=2 * norm))
    assert found.iterations == 0 and not found.step.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [20, 60])
def test_rounding_never_makes_the_model_worse(rank, backend):
    """Far beyond what float32 can resolve, CG may drift away; what it returns then is what it had."""
    params, closure = linear(spectrum(120, 100, 1e-6), rand(120, seed=5), torch.float32)
    lin = pgdfast.linearize(closure, params, backend=backend)
    reached = 0.0
    for count in (50, 100, 400, 1600):
        cg = pgdfast.CG(count, 1e-6, preconditioner=pgdfast.Nystrom(rank=rank))
        found = pgdfast.solve(lin, 1e-12, solver="cg", cg=cg)
        assert found.usable and value(lin, found.step, 1e-12) >= 0.99 * reached
        reached = max(reached, value(lin, found.step, 1e-12))


# --- Steihaug's truncation ------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaled", [False, True], ids=["identity", "scaled"])
def test_path(scaled, backend):
    params, closure = regression()
    lin = pgdfast.linearize(closure, params, backend=backend)
    scale = torch.linspace(0.5, 2, lin.num_parameters, dtype=torch.float64) if scaled else None
    mu = 1e-4
    cg = pgdfast.CG(300, 1e-10, truncate=True)
    solution = pgdfast.solve(lin, mu, scale=scale, solver="cg", cg=cg)
    numbers = [k for k, *_ in solution.path]
    assert numbers == [2**k for k in range(len(numbers))][-8:] and numbers[-1] <= solution.iterations
    D = torch.ones(()) if scale is None else scale
    norms = [float((D * step * step).sum()) for _, step, *_ in solution.path]
    assert all(a < b for a, b in zip(norms, norms[1:], strict=False))   # Steihaug's theorem, in D's norm
    for k, step, gain, square, slack in solution.path:
        cut = pgdfast.solve(lin, mu, scale=scale, solver="cg", cg=pgdfast.CG(k, 1e-12))
        assert relative(step, cut.step) < 1e-10
        assert (gain, square) == pytest.approx((cut.gain, float(cut.step.square().sum())), rel=1e-9)
        error = lin.gradient() - lin.ggn(step) - mu * D * step
        assert slack == pytest.approx(float(error @ step), abs=1e-7 * gain)
    length, previous = float(solution.step.norm()), solution
    while (shorter := previous.shortened()) is not None:
        assert float(shorter.step.norm()) <= 0.5 * length and shorter.status == "truncated"
        assert shorter.usable and shorter.reason.startswith("truncated at iteration ")
        assert shorter.predicted_reduction == pytest.approx(value(lin, shorter.step, 0.0), rel=1e-7)
        length, previous = float(shorter.step.norm()), shorter
    assert previous is not solution


def test_path_is_bounded():
    params, closure = linear(spectrum(400, 350, 1e-5), rand(400, seed=1))
    for backend in BACKENDS:
        lin = pgdfast.linearize(closure, params, backend=backend)
        cg = pgdfast.CG(1100, 1e-13, truncate=True)
        solution = pgdfast.solve(lin, 1e-10, solver="cg", cg=cg)
        assert [k for k, *_ in solution.path] == [8, 16, 32, 64, 128, 256, 512, 1024]
        for k, step, *_ in solution.path[:3]:
            cut = pgdfast.solve(lin, 1e-10, solver="cg", cg=pgdfast.CG(k, 1e-13))
            assert relative(step, cut.step) < 1e-8


def wavy(truncate, rule="gain-ratio", dtype=torch.float64):
    """A fit whose first Gauss-Newton steps overshoot."""
    model = mlp(2, 12, 12, 1, dtype=dtype)
    x = rand(80, 2, seed=1, dtype=dtype)
    params, y = list(model.parameters()), torch.sin(6 * x[:, :1])
    closure = lambda: F.mse_loss(model(x), y)  # noqa: E731
    cg = pgdfast.CG(100, 1e-8, truncate=truncate)
    return params, closure, pgdfast.LM(params, damping=1e-7, damping_rule=rule, solver="cg", cg=cg)


@pytest.mark.parametrize("rule", ["gain-ratio", "delayed"])
def test_rejected_steps_are_shortened(rule):
    params, closure, optimizer = wavy(True, rule)
    mus, losses, truncated = [1e-7], [], 0
    for _ in range(12):
        losses.append(float(optimizer.step(closure)))
        report = optimizer.report
        assert report.status == "accepted" and report.loss_after < report.loss
        if report.solve_status == "truncated":
            truncated += 1
            assert report.attempts > 1 and "earlier, shorter CG iterate" in report.advice
            assert f"cg ({report.reason})" in str(report) and "truncated at iteration" in str(report)
            assert report.damping == report.next_damping > mus[-1]   # risen as for any rejection
            assert report.gain_ratio == pytest.approx(
                (report.loss - report.loss_after) / report.predicted_reduction, rel=1e-9
            )
        mus.append(report.next_damping)
    assert truncated > 0 and losses == sorted(losses, reverse=True)
    for _ in range(2):   # and bit for bit the same again
        again, closure, optimizer = wavy(True, rule)
        for _ in range(12):
            optimizer.step(closure)
        assert unchanged(params, snapshot(again))


def test_every_kept_iterate_is_tried_before_another_solve_and_undone():
    closure = Uphill()
    cg = pgdfast.CG(50, 1e-10, truncate=True)
    optimizer = pgdfast.LM([closure.w], damping=1e-3, solver="cg", cg=cg)
    optimizer.step(closure)
    assert optimizer.report.status == "rejected" and torch.equal(closure.w, closure.start)


# --- LSMR -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("M, P", [(40, 60), (60, 40)])
def test_lsmr_keeps_float32_digits_where_the_normal_equations_lose_them(M, P, backend):
    """Condition 1e8 of J^T J + mu I, hence 1e4 of what LSMR sees."""
    J = spectrum(M, P, 1e-4).float()
    b = (J @ rand(P, seed=4, dtype=torch.float32))   # compatible, so that the residual adds nothing
    params, closure = linear(J, b, torch.float32)
    ref = reference.linearize(closure, params)
    expected = reference.solve(ref, 1e-8, solver="lsmr").step
    assert relative(expected, reference.solve(ref, 1e-8).step) < 1e-6
    lin = pgdfast.linearize(closure, params, backend=backend)
    problem = pgdfast.solve.__globals__["Problem"].of(lin, 1e-8, None)
    lsmr, cg = (pgdfast.solve.__globals__[name] for name in ("lsmr", "run_cg"))
    ours = relative(lsmr(problem, pgdfast.CG(3000, 1e-12)).step, expected)
    theirs = relative(cg(problem, pgdfast.CG(3000, 1e-12))[0].step, expected)
    assert ours < 3e-3 and ours < 0.3 * theirs


@pytest.mark.parametrize("backend", BACKENDS)
def test_lsmr_reports_its_work(backend):
    params, closure = regression(penalty=True)
    lin = pgdfast.linearize(closure, params, backend=backend)
    short = pgdfast.solve(lin, 1e-3, solver="lsmr", cg=pgdfast.CG(4, 1e-12))
    assert (short.status, short.iterations, short.usable) == ("max_iterations", 4, True)
    assert "iteration limit" in short.advice
    for solution in (short, pgdfast.solve(lin, 1e-3, solver="lsmr", cg=TIGHT)):
        error = lin.gradient() - lin.ggn(solution.step) - 1e-3 * solution.step
        assert solution.residual_norm == pytest.approx(
            float(error.norm() / lin.gradient().norm()), rel=1e-3, abs=1e-12
        )
        assert solution.predicted_reduction == pytest.approx(value(lin, solution.step, 0.0), rel=1e-9)
    assert solution.status == "solved" and solution.residual_norm < 1e-11


def test_lsmr_without_damping():
    J = spectrum(30, 20, 1e-2)
    J[:, 0] = 0   # a direction that no residual sees stays still
    params, closure = linear(J, rand(30, seed=7))
    lin = pgdfast.linearize(closure, params)
    solution = pgdfast.solve(lin, 0.0, solver="lsmr", cg=TIGHT)
    expected = torch.linalg.pinv(J) @ closure().detach()
    assert solution.solver == "lsmr" and relative(solution.step, expected) < 1e-8
    params, closure = regression(penalty=True)
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
    params, closure = linear(spectrum(M, P, low, seed), rand(M, seed=seed))
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
    params, closure = linear(SINGULAR[name], rand(len(SINGULAR[name]), seed=1), dtype)
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
    assert not solution.usable and not solution.step.any() and solution.advice
    before = w.detach().clone()
    optimizer = pgdfast.LM([w], solver=solver, backend=backend)
    optimizer.step(lambda: torch.sqrt(w) - 3)
    assert torch.equal(w, before) and optimizer.report.status == "failed" and optimizer.report.advice


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


# --- memory ---------------------------------------------------------------------------------------


def test_reason_names_what_was_left_out_for_memory(monkeypatch):
    model = mlp(2, 3, 1)
    x = rand(400, 2, seed=1)
    lin = pgdfast.linearize(lambda: model(x), model.parameters())
    names = pgdfast.solve.__globals__   # the name `solve` is the function's, not its package's
    needed = names["predicted_bytes"](names["Problem"].of(lin, 0.1, None), pgdfast.CG())
    assert needed["cg"] < needed["dual"]
    monkeypatch.setitem(names, "memory_limit", lambda: 0.5 * (needed["dual"] + needed["primal"]))
    assert "dual (0.0 GB) left out for memory" in pgdfast.solve(lin, 0.1).reason
    for limit in (needed["cg"], 0.0):
        monkeypatch.setitem(names, "memory_limit", lambda: limit)  # noqa: B023
        solution = pgdfast.solve(lin, 0.1)
        assert solution.solver == "cg" and "dual (0.0 GB) and primal (0.0 GB) left out" in solution.reason


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's counters of memory")
@pytest.mark.parametrize("solver", ["dual", "cg"])
def test_predicted_memory_is_within_a_factor_of_two(solver, tmp_path):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("memory_of_solve.py")), solver],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,   # away from the source folder, which has no core
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["status"] == "solved"
    assert 0.5 < found["predicted"] / found["measured"] < 2, found
