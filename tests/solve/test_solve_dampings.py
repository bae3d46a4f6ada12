"""Many dampings of one linearization: each as one damping alone gives it."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, SOLVERS, TIGHT, fit, linear_problem, mlp, rand, relative

import pgdfast
from pgdfast import reference

MUS = [3.0, 0.01, 0.1, 40.0, 0.1, 0.7]   # in no order, one twice
CLOSURES = {
    "residuals": lambda model, x, y: model(x) - y,
    "mean": lambda model, x, y: F.mse_loss(model(x), y),
    "penalty": lambda model, x, y: F.mse_loss(model(x), y) + 0.05 * sum(p.square().sum() for p in model.parameters()),
    "bce": lambda model, x, y: F.binary_cross_entropy_with_logits(model(x), torch.sigmoid(y)),
}


def problem(form="residuals", samples=20, dtype=torch.float64, outputs=1):
    """A network of 25 (one output) parameters and more, its closure."""
    model = mlp(2, 6, outputs, dtype=dtype)
    x, y = rand(samples, 2, seed=1, dtype=dtype), rand(samples, outputs, seed=2, dtype=dtype)
    return list(model.parameters()), lambda: CLOSURES[form](model, x, y)


def same(found, alone, tolerance):
    """Compare all that a Solution says."""
    assert relative(found.step, alone.step) < tolerance
    assert found.status == alone.status == "solved" and found.usable and found.advice == ""
    assert found.step.dtype == alone.step.dtype
    assert (found.gain, found.damped) == pytest.approx((alone.gain, alone.damped), rel=10 * tolerance)
    assert found.predicted_reduction == pytest.approx(alone.predicted_reduction, rel=10 * tolerance)
    assert found.residual_norm < tolerance


@pytest.mark.parametrize("scaled", [False, True], ids=["identity", "scaled"])
@pytest.mark.parametrize("prior", [False, True], ids=["", "prior"])
@pytest.mark.parametrize("form", CLOSURES)
@pytest.mark.parametrize("samples", [9, 60])
def test_each_is_what_it_is_alone(form, samples, prior, scaled):
    params, closure = problem(form, samples)
    for backend in BACKENDS if form in ("mean", "penalty") else BACKENDS[:1]:
        lin = pgdfast.linearize(closure, params, backend=backend)
        options = dict(
            scale=0.5 + rand(25, seed=3).square() if scaled else None, prior=rand(25, seed=4) if prior else None, cg=TIGHT
        )
        for solver in SOLVERS:
            found = pgdfast.solve(lin, MUS, solver=solver, **options)
            assert found.damping == tuple(MUS) and len(found) == 6 and found.step.shape == (6, 25)
            assert found.solver == solver or solver == "auto"
            for k, mu in enumerate(MUS):
                alone = pgdfast.solve(lin, mu, solver="dual" if solver == "auto" else solver, **options)
                same(found[k], alone, 1e-8)
                assert torch.equal(found.step[k], found[k].step)
            assert float(found.residual_norm.max()) < 1e-8 and found.residual_norm.shape == (6,)
            assert found.status == ("solved",) * 6 and all(found.usable) and len(found.iterations) == 6
            u = rand(lin.num_residuals, seed=5)
            for k in (0, 1, 3, 0):   # each with its own factor, in any order
                again = found[k].solve_with_same_factor(u)
                expected = pgdfast.solve(lin, MUS[k], solver="primal", scale=options["scale"]).solve_with_same_factor(u)
                assert relative(again, expected) < 1e-8, (backend, solver)


@pytest.mark.parametrize("solver", SOLVERS)
def test_against_the_reference(solver):
    params, closure = problem("mean", 12)
    ref = reference.linearize(closure, params)
    found = pgdfast.solve(pgdfast.linearize(closure, params), torch.tensor(MUS, dtype=torch.float64), solver=solver, cg=TIGHT)
    for mu, one in zip(MUS, found, strict=True):
        assert relative(one.step, reference.solve(ref, mu).step) < 1e-9


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_among_them_is_gauss_newton(backend, solver):
    params, closure = problem("residuals", 9)
    lin = pgdfast.linearize(closure, params, backend=backend)
    for mus in ([0.1, 0.0, 2.0], [0.0]):
        found = pgdfast.solve(lin, mus, solver=solver, cg=TIGHT, rcond=1e-12)
        for mu, one in zip(mus, found, strict=True):
            alone = pgdfast.solve(lin, mu, solver="auto" if solver == "auto" else solver, cg=TIGHT, rcond=1e-12)
            assert relative(one.step, alone.step) < 1e-6 and one.status == alone.status


@pytest.mark.parametrize("backend", BACKENDS)
def test_confident_predictions(backend):
    """At mu = 0, where the residuals of a cross-entropy are huge and their gradient is not."""
    params, inner = problem("residuals", 6, outputs=4)
    labels = torch.arange(6) % 4
    lin = pgdfast.linearize(lambda: F.cross_entropy(60 * inner(), labels), params, backend=backend)
    found = pgdfast.solve(lin, [0.0, 0.1], solver="eigh")
    for mu, one in zip((0.0, 0.1), found, strict=True):
        assert torch.equal(one.step, pgdfast.solve(lin, mu, solver="eigh").step) or relative(
            one.step, pgdfast.solve(lin, mu, solver="eigh").step) < 1e-10


@pytest.mark.parametrize("form", ["mean", "penalty"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("samples", [30, 400])
def test_float32(samples, solver, form):
    """Small and large factors, those that need float64 sums and those that do not."""
    model = mlp(2, 20, 20, 1, dtype=torch.float32)
    x = rand(samples, 2, seed=1, dtype=torch.float32)
    closure = lambda: CLOSURES[form](model, x, torch.sin(3 * x[:, :1]))  # noqa: E731
    params, mus = list(model.parameters()), [10.0, 1e-4, 1e-2, 1.0]
    found = pgdfast.solve(pgdfast.linearize(closure, params), mus, solver=solver, cg=pgdfast.CG(2000, 1e-8))
    ref = reference.linearize(closure, params)
    for mu, one in zip(mus, found, strict=True):
        assert one.step.dtype == torch.float32 and one.usable
        assert relative(one.step, reference.solve(ref, mu).step) < 1e-4
        u = rand(samples, seed=7)
        J = ref.dense()
        A = J.T @ J + mu * torch.eye(J.shape[1], dtype=torch.float64)
        if form == "mean":
            assert relative(one.solve_with_same_factor(u.float()), torch.linalg.solve(A, J.T @ u)) < 1e-2


# --- multi-shift CG ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaled", [False, True], ids=["identity", "scaled"])
def test_multishift_iterates_are_those_of_cg(scaled, backend, dtype):
    """After n iterations each shift stands where CG alone would, whether n ends a panel of the core or not."""
    U, V = (torch.linalg.qr(rand(200, 200, seed=k))[0] for k in (1, 2))
    J = U @ torch.diag(torch.linspace(1, 10, 200, dtype=torch.float64)) @ V.T
    scale = torch.linspace(0.5, 2, 200, dtype=dtype) if scaled else None
    params, closure = linear_problem(J if scale is None else J * scale.double().sqrt(), rand(200, seed=3), dtype)
    lin = pgdfast.linearize(closure, params, backend=backend)
    mus, rounding = [1e-3 * 10 ** (k / 1.2) for k in range(7)], torch.finfo(dtype).eps
    for count in (1, 2, 31, 32, 33, 34, 70):
        cg = pgdfast.CG(count, 1e-6 if dtype == torch.float32 else 1e-13)
        found = pgdfast.solve(lin, mus, scale=scale, solver="cg", cg=cg)
        assert "one Krylov space for 7 dampings" in found.reason and found.solver == "cg"
        for mu, one in zip(mus, found, strict=True):
            alone = pgdfast.solve(lin, mu, scale=scale, solver="cg", cg=cg)
            assert relative(one.step, alone.step) < max(1e4 * rounding, 2e-6 if "solved" in alone.status else 0)
            assert one.gain == pytest.approx(alone.gain, rel=1e3 * rounding)
            assert one.predicted_reduction == pytest.approx(alone.predicted_reduction, rel=1e4 * rounding)
            assert abs(one.iterations - alone.iterations) <= 4 and one.iterations <= count


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-4), (torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaled", [False, True], ids=["identity", "scaled"])
@pytest.mark.parametrize("count", [2, 3, 12])
def test_what_is_solved_has_a_small_true_residual(count, scaled, backend, dtype, tolerance):
    model = mlp(3, 12, 12, 1, dtype=dtype)
    x = rand(90, 3, seed=1, dtype=dtype)
    params = list(model.parameters())
    lin = pgdfast.linearize(lambda: F.mse_loss(model(x), torch.sin(3 * x[:, :1])), params, backend=backend)
    scale = torch.linspace(0.5, 2, lin.num_parameters, dtype=dtype) if scaled else None
    mus = [1e-4 * 1e5 ** (k / (count - 1)) for k in range(count)]
    found = pgdfast.solve(lin, mus, scale=scale, solver="cg", cg=pgdfast.CG(2000, tolerance))
    wide = lin.widened()
    iterations = []
    for mu, one in zip(mus, found, strict=True):
        step, D = one.step.double(), torch.ones(1, dtype=torch.float64) if scale is None else scale.double()
        left = wide.gradient() - wide.ggn(step) - mu * D * step
        true = float(left.norm() / wide.gradient().norm())
        if one.status == "solved":
            assert true <= 1.5 * tolerance and one.residual_norm <= tolerance
        else:
            assert one.status == "stagnated" and dtype == torch.float32
        assert one.residual_norm == pytest.approx(true, abs=0.6 * tolerance)
        iterations.append(one.iterations)
        assert one.slack == pytest.approx(float(left @ step), abs=10 * tolerance * one.gain)
    assert iterations[-1] < iterations[0]   # large shifts stop early
    assert dtype == torch.float32 or found.status == ("solved",) * count


def test_what_rounding_lost_is_finished_alone():
    """Far beyond float32's reach the recurrence parts from the truth; what is returned says so, or is right."""
    singular = torch.logspace(0, -4, 60, dtype=torch.float64)
    U, V = (torch.linalg.qr(rand(60, 60, seed=k))[0] for k in (1, 2))
    A = (U * singular) @ V.T
    w = torch.zeros(60, requires_grad=True)
    target = rand(60, seed=3, dtype=torch.float32)
    for backend in BACKENDS:
        lin = pgdfast.linearize(lambda: A.float() @ w - target, [w], backend=backend)
        mus = [1e-8, 1e-6, 1e-4, 1e-2, 1.0]
        found = pgdfast.solve(lin, mus, solver="cg", cg=pgdfast.CG(500, 1e-6))
        J = A.float().double()
        for mu, one in zip(mus, found, strict=True):
            g = -J.T @ target.double()
            true = float((g - J.T @ (J @ one.step.double()) - mu * one.step.double()).norm() / g.norm())
            assert one.usable and one.residual_norm == pytest.approx(true, rel=0.5, abs=6e-7)
            assert one.status != "solved" or true < 2e-6
        assert found.status[-1] == "solved"


@pytest.mark.parametrize("backend", BACKENDS)
def test_limits_of_cg(backend):
    params, closure = problem("residuals", 60)
    lin = pgdfast.linearize(closure, params, backend=backend)
    norm = float(lin.gradient().norm())
    at_once = pgdfast.solve(lin, MUS, solver="cg", cg=pgdfast.CG(absolute=2 * norm))
    assert at_once.iterations == (0,) * 6 and not at_once.step.any() and at_once.status == ("solved",) * 6
    short = pgdfast.solve(lin, MUS, solver="cg", cg=pgdfast.CG(3, 1e-12))
    assert short.status == ("max_iterations",) * 6 and "iteration limit" in short[0].advice
    exact = pgdfast.linearize(lambda: closure() * 0.0, params, backend=backend)
    assert not pgdfast.solve(exact, MUS, solver="cg").step.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("extra",
    [{"preconditioner": "jacobi"}, {"preconditioner": "nystrom"}, {"truncate": True}, {"progress": 1e-9}],
)
def test_what_shifts_do_not_share_is_solved_in_turn(extra, backend):
    params, closure = problem("residuals", 60)
    lin = pgdfast.linearize(closure, params, backend=backend)
    cg = pgdfast.CG(500, 1e-10, **extra)
    found = pgdfast.solve(lin, MUS, solver="cg", cg=cg)
    assert "one after another" in found.reason and ("from the last one" in found.reason) == ("preconditioner" in extra)
    for mu, one in zip(MUS, found, strict=True):
        alone = pgdfast.solve(lin, mu, solver="cg", cg=cg)
        assert one.status == alone.status and "start" not in one.keep
        assert relative(one.step, alone.step) < (1e-8 if "preconditioner" in extra else 1e-14)
    if "truncate" in extra:
        assert found[1].shortened().status == "truncated"
    if extra.get("preconditioner") == "nystrom":
        sketch = found[1].keep["sketch"]
        assert all(one.keep["sketch"] is sketch for one in found)   # made once
        again = pgdfast.solve(lin, MUS, solver="cg", cg=cg, keep=found[0].keep)
        assert again[0].keep["sketch"] is sketch


def test_warm_start_is_handed_on():
    params, closure = problem("residuals", 60)
    lin = pgdfast.linearize(closure, params)
    cg = pgdfast.CG(500, 1e-10, warm_start=True)
    found = pgdfast.solve(lin, MUS, solver="cg", cg=cg)
    assert relative(found[0].keep["start"], found[1].step) < 1e-12   # that of the least mu
    assert pgdfast.solve(lin, 0.01, solver="cg", cg=cg, keep=found[0].keep).iterations <= 1 < found[1].iterations


# --- the choice, and what is refused ------------------------------------------------------------------


def test_auto_takes_one_decomposition_where_factors_would_cost_more():
    params, closure = problem("mean", 12)
    lin = pgdfast.linearize(closure, params)
    few, many = pgdfast.solve(lin, [0.1, 1.0]), pgdfast.solve(lin, [0.1 * 1.1**k for k in range(100)])
    assert few.solver == "dual" and "2 dampings" in few.reason
    assert many.solver == "eigh" and "100 dampings" in many.reason
    assert pgdfast.solve(lin, [0.1, 0.1]).solver == pgdfast.solve(lin, 0.1).solver == "dual"


def test_one_matrix_serves_all(monkeypatch):
    """The core's Gram matrix is built once: further dampings cost a factor each, in either precision."""
    model = mlp(2, 30, 30, 1, dtype=torch.float32)
    x = rand(300, 2, dtype=torch.float32)
    lin = pgdfast.linearize(lambda: model(x) - torch.sin(3 * x[:, :1]), list(model.parameters()))
    wide = lin.widened()
    assert wide is lin.widened()
    bound = []
    for one in (lin, wide):
        kernels = one._plan.kernels
        monkeypatch.setattr(kernels, "bind", lambda constants, bind=kernels.bind: (bound.append(1), bind(constants)))
    pgdfast.solve(lin, [1e-3, 1e-2, 1.0, 10.0], solver="dual")
    assert len(bound) <= 2


def test_shapes_and_kinds():
    params, closure = fit()
    lin = pgdfast.linearize(closure, params)
    for mus in ([0.1], (0.1,), torch.tensor([0.1]), torch.tensor([1, 2]), [1, 2.5]):
        found = pgdfast.solve(lin, mus)
        assert isinstance(found, pgdfast.Solutions) and len(found) == len(mus) == len(list(found))
    assert isinstance(pgdfast.solve(lin, 0.1), pgdfast.Solution)
    empty = pgdfast.linearize(lambda: params[0][:0], params)
    found = pgdfast.solve(empty, [0.1, 0.2])
    assert not found.step.any() and found.status == ("solved", "solved")
    with pytest.raises(IndexError):
        found[2]


@pytest.mark.parametrize("mus", [[], (), torch.tensor([])])
def test_no_damping_at_all(mus):
    params, closure = fit()
    with pytest.raises(ValueError, match="damping is .* 1-D tensor of such numbers, at least one"):
        pgdfast.solve(pgdfast.linearize(closure, params), mus)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, "1", None])
def test_one_bad_damping(bad):
    params, closure = fit()
    with pytest.raises(ValueError, match="damping holds .*; every one must be a finite number that is not negative"):
        pgdfast.solve(pgdfast.linearize(closure, params), [1.0, bad])


def test_failures_stay_apart():
    """A mu too small for a float32 factor fails alone."""
    A = torch.diag(torch.tensor([1e3, 1e3, 1.0])) @ torch.ones(3, 3)
    w = torch.zeros(3, requires_grad=True)
    lin = pgdfast.linearize(lambda: A @ w - 1.0, [w], backend="native")
    found = pgdfast.solve(lin, [1e-30, 1.0], solver="primal")
    alone = pgdfast.solve(lin, 1e-30, solver="primal")
    assert found[0].status == alone.status and found[1].status == "solved"
    if not found[0].usable:
        with pytest.raises(RuntimeError, match="left no factor"):
            found[0].solve_with_same_factor(lin.residual)
    assert found[1].solve_with_same_factor(lin.residual).isfinite().all()
