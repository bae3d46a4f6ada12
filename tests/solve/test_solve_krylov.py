"""CG: preconditioners, warm starts, stops, and the path that answers rejected steps."""

import io
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BACKENDS,
    Uphill,
    damping_of,
    fit,
    linear_problem,
    mlp,
    model_value,
    rand,
    relative,
    snapshot,
    spectrum,
    tanh_fit,
    unchanged,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import pgdfast
from pgdfast import reference

PRECONDITIONERS = (None, "jacobi", "nystrom", pgdfast.Nystrom(rank=3), pgdfast.Nystrom(rank=500))


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
    params, closure = tanh_fit(penalty=penalty)
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
    params, closure = linear_problem(spectrum(80, 60, 1e-4), rand(80, seed=3))
    lin = pgdfast.linearize(closure, params, backend=backend)
    counts = [
        pgdfast.solve(lin, 1e-8, solver="cg", cg=pgdfast.CG(2000, 1e-8, preconditioner=p)).iterations
        for p in (None, pgdfast.Nystrom(rank=20), pgdfast.Nystrom(rank=60))
    ]
    assert counts[1] < 0.8 * counts[0] and counts[2] < 0.2 * counts[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sketch_repeats_bit_for_bit_and_ages(dtype):
    params, closure = tanh_fit(dtype)
    lin = pgdfast.linearize(closure, params)
    cg = pgdfast.CG(preconditioner=pgdfast.Nystrom(rank=5, refresh=3))
    first, again = (pgdfast.solve(lin, 0.01, solver="cg", cg=cg) for _ in range(2))
    assert torch.equal(first.step, again.step)
    rows = first.keep["sketch"]["rows"]
    assert rows.shape == (5, lin.num_parameters) and rows.dtype == dtype
    for time, kept in ((0, True), (2, True), (3, False)):
        later = pgdfast.solve(lin, 0.02, solver="cg", cg=cg, keep=first.keep, time=time)
        assert (later.keep["sketch"]["rows"] is rows) == kept
    other, closure = linear_problem(spectrum(9, 7, 0.1), rand(9))
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
    seed=st.integers(0, 1000), size=st.sampled_from([0.0, 1e-8, 1.0, -1.0, 1e8, math.inf, math.nan]),
    damping=st.sampled_from([1e-6, 1e-2, 1.0]), exact=st.booleans(), native=st.booleans(),
)
def test_warm_start_is_never_worse_than_zero(seed, size, damping, exact, native):
    params, closure = linear_problem(spectrum(12, 9, 1e-2, seed), rand(12, seed=seed))
    lin = pgdfast.linearize(closure, params, backend=BACKENDS[not native])
    start = size * (lin.gradient() if exact else rand(9, seed=seed + 1))
    cold = pgdfast.solve(lin, damping, solver="cg", cg=pgdfast.CG(1, 1e-12))
    warm = pgdfast.solve(
        lin, damping, solver="cg", cg=pgdfast.CG(1, 1e-12, warm_start=True), keep={"start": start}
    )
    assert model_value(lin, warm.step, damping) > 0
    if math.isfinite(size):   # nor than the best multiple of the start
        along, curvature = lin.gradient() @ start, start @ (lin.ggn(start) + damping * start)
        alone = float(0.5 * along**2 / curvature.clamp_min(1e-300))
        assert model_value(lin, warm.step, damping) >= (1 - 1e-9) * alone
    if size == 0 or not math.isfinite(size):
        assert relative(warm.step, cold.step) < 1e-12
    # The prediction is that of the model, although the residual is not orthogonal to the step.
    undamped = model_value(lin, warm.step, 0.0)
    assert warm.predicted_reduction == pytest.approx(undamped, rel=1e-9)
    tight = pgdfast.CG(500, 1e-12, warm_start=True)
    found = pgdfast.solve(lin, damping, solver="cg", cg=tight, keep={"start": start})
    assert relative(found.step, pgdfast.solve(lin, damping, solver="dual").step) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_warm_start_from_the_solution_is_at_once_there(backend):
    params, closure = tanh_fit()
    lin = pgdfast.linearize(closure, params, backend=backend)
    cg = pgdfast.CG(500, 1e-8, warm_start=True)
    first = pgdfast.solve(lin, 0.01, solver="cg", cg=cg)
    again = pgdfast.solve(lin, 0.01, solver="cg", cg=cg, keep=first.keep)
    assert again.iterations == 0 and again.status == "solved" and relative(again.step, first.step) < 1e-6
    fewer = pgdfast.solve(lin, 0.011, solver="cg", cg=cg, keep=first.keep)
    assert fewer.iterations < first.iterations
    other, closure = linear_problem(spectrum(9, 7, 0.1), rand(9))
    lin = pgdfast.linearize(closure, other)   # another P: the start does not apply
    assert pgdfast.solve(lin, 0.1, solver="cg", cg=cg, keep=first.keep).status == "solved"


# --- stops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_progress_stop(backend):
    params, closure = linear_problem(spectrum(80, 60, 1e-4), rand(80, seed=3))
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
            model_value(lin, pgdfast.solve(lin, 1e-8, solver="cg", cg=pgdfast.CG(n, 1e-10)).step, 1e-8)
            for n in (i - k - 1, i - 1, i - k, i)
        ]
        assert values[3] - values[2] < k * progress * values[3]
        if i - 1 > k == max(10, (i - 1) // 10):   # and not an iteration earlier
            assert values[1] - values[0] >= k * progress * values[1]
        last = found.iterations


@pytest.mark.parametrize("backend", BACKENDS)
def test_absolute_stop(backend):
    params, closure = tanh_fit()
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
    params, closure = linear_problem(spectrum(120, 100, 1e-6), rand(120, seed=5), torch.float32)
    lin = pgdfast.linearize(closure, params, backend=backend)
    reached = 0.0
    for count in (50, 100, 400, 1600):
        cg = pgdfast.CG(count, 1e-6, preconditioner=pgdfast.Nystrom(rank=rank))
        found = pgdfast.solve(lin, 1e-12, solver="cg", cg=cg)
        assert found.usable and model_value(lin, found.step, 1e-12) >= 0.99 * reached
        reached = max(reached, model_value(lin, found.step, 1e-12))


# --- Steihaug's truncation ------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaled", [False, True], ids=["identity", "scaled"])
def test_path(scaled, backend):
    params, closure = tanh_fit()
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
        assert shorter.predicted_reduction == pytest.approx(model_value(lin, shorter.step, 0.0), rel=1e-7)
        length, previous = float(shorter.step.norm()), shorter
    assert previous is not solution


def test_path_is_bounded():
    params, closure = linear_problem(spectrum(400, 350, 1e-5), rand(400, seed=1))
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
