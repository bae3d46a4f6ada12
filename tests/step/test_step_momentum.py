"""SPRING's momentum and the norm constraint: the equation, what is kept of a step, and resuming."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BACKENDS,
    EVERYWHERE,
    SOLVERS,
    TIGHT,
    Uphill,
    fit,
    flat,
    memory_of,
    mlp,
    momentum_of,
    rand,
    relative,
    snapshot,
    through_a_file,
    unchanged,
)

import pgdfast
from pgdfast import reference


def dense_step(ref, mu, prior, D=1.0):
    """The normal equations, written out: (mu D + J^T J) phi = J^T r + mu D p."""
    J = ref.dense()
    D = D * torch.ones(J.shape[1], dtype=J.dtype)
    return torch.linalg.solve(J.T @ J + mu * torch.diag(D), J.T @ ref.residual + mu * D * prior)


def problem(samples, penalty=False, dtype=torch.float64):
    """A tanh network with more or fewer residuals than its 25 parameters."""
    model = mlp(2, 6, 1, dtype=dtype)
    x, y = rand(samples, 2, seed=1, dtype=dtype), rand(samples, 1, seed=2, dtype=dtype)
    params = list(model.parameters())
    return params, lambda: F.mse_loss(model(x), y) + (0.01 * params[0].square().sum() if penalty else 0.0)


@pytest.mark.parametrize("samples", [12, 40])
@pytest.mark.parametrize("penalty", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_solve_with_a_prior_is_the_equation(solver, scaled, penalty, samples):
    params, closure = problem(samples, penalty)
    ref, prior, mu = reference.linearize(closure, params), rand(25, seed=3), 0.05
    scale = torch.logspace(-1, 1, 25, dtype=torch.float64) if scaled else None
    expected = dense_step(ref, mu, prior, 1.0 if scale is None else scale)
    reduction = float(ref.vjp(ref.residual) @ expected - 0.5 * ref.jvp(expected).square().sum())
    found = reference.solve(ref, mu, scale=scale, solver=solver, cg_max_iterations=2000, cg_tolerance=1e-13, prior=prior)
    assert relative(found.step, expected) < 1e-9
    assert found.predicted_reduction == pytest.approx(reduction, rel=1e-9)
    for backend in BACKENDS:
        lin = pgdfast.linearize(closure, params, backend=backend)
        solution = pgdfast.solve(lin, mu, scale=scale, solver=solver, cg=TIGHT, prior=prior)
        assert solution.status == "solved" and relative(solution.step, expected) < 1e-9, backend
        assert solution.predicted_reduction == pytest.approx(reduction, rel=1e-9)
        assert solution.residual_norm < 1e-9


@pytest.mark.parametrize("samples", [12, 40])
def test_damping_zero_projects_the_prior_onto_the_least_squares_solutions(samples):
    params, closure = problem(samples)
    ref, prior = reference.linearize(closure, params), rand(25, seed=3)
    J = ref.dense()
    expected = prior + torch.linalg.pinv(J, rtol=1e-4) @ (ref.residual - J @ prior)
    lin = pgdfast.linearize(closure, params)
    assert relative(pgdfast.solve(lin, 0.0, prior=prior, rcond=1e-8).step, expected) < 1e-7
    assert relative(reference.solve(ref, 0.0, prior=prior, rcond=1e-8).step, expected) < 1e-7


@pytest.mark.parametrize("solver", ["dual", "primal", "cg"])
def test_float32_steps_with_a_prior(solver):
    params, closure = problem(12, dtype=torch.float32)
    ref, prior = reference.linearize(closure, params), rand(25, seed=3)
    for mu in (1e-1, 1e-5):
        lin = pgdfast.linearize(closure, params)
        solution = pgdfast.solve(lin, mu, solver=solver, cg=pgdfast.CG(500, 1e-9), prior=prior.float())
        assert relative(solution.step, dense_step(ref, mu, prior)) < 1e-4


def test_prior_of_the_wrong_shape():
    params, closure = fit()
    with pytest.raises(ValueError, match=r"prior has shape \(3,\); it must be \(25,\)"):
        pgdfast.solve(pgdfast.linearize(closure, params), 0.1, prior=torch.zeros(3))


@pytest.mark.parametrize("scaling", ["identity", "marquardt"])
@pytest.mark.parametrize("backend", EVERYWHERE)
def test_steps_with_momentum_follow_the_recurrence(backend, scaling):
    params, closure = fit()
    groups = [{"params": params[:2], "lr": 0.2}, {"params": params[2:], "lr": 0.5}]
    rates = torch.cat([torch.full((p.numel(),), 0.2 if k < 2 else 0.5, dtype=p.dtype) for k, p in enumerate(params)])
    optimizer = pgdfast.LM(
        groups, damping=0.1, damping_rule="constant", scaling=scaling, momentum=0.9, backend=backend
    )
    phi, D = torch.zeros(25, dtype=torch.float64), 0.0
    for _ in range(4):
        ref, before = reference.linearize(closure, params), flat(params)
        D = torch.maximum(torch.as_tensor(D), ref.diagonal())
        phi = dense_step(ref, 0.1, 0.9 * phi, D if scaling == "marquardt" else 1.0)
        optimizer.step(closure)
        assert relative(before - flat(params), rates * phi) < 1e-9
        assert relative(momentum_of(optimizer), phi) < 1e-9
    assert optimizer.report.momentum == 0.9


@pytest.mark.parametrize("search", [None, "armijo"])
@pytest.mark.parametrize("rule", ["gain-ratio", "delayed", "constant"])
@pytest.mark.parametrize("backend", EVERYWHERE)
def test_report_predicts_along_the_step_that_was_taken(backend, rule, search):
    params, closure = fit()
    groups = [{"params": params[:2], "lr": 0.2}, {"params": params[2:], "lr": 0.5}]
    optimizer = pgdfast.LM(
        groups, damping=0.1, damping_rule=rule, momentum=0.8, norm_constraint=0.01, line_search=search, backend=backend
    )
    for k in range(5):
        ref, before = reference.linearize(closure, params), flat(params)
        optimizer.step(closure)
        d, report = before - flat(params), optimizer.report
        assert report.status == "accepted" and report.momentum == (0.8 if k else 0.0)
        assert float(d.square().sum()) <= 0.01 * (1 + 1e-12)
        if report.predicted_reduction is not None:
            assert report.loss_after < report.loss
            predicted = float(ref.vjp(ref.residual) @ d - 0.5 * ref.jvp(d).square().sum())
            assert report.predicted_reduction == pytest.approx(predicted, rel=1e-9)
            assert report.gain_ratio == pytest.approx((report.loss - report.loss_after) / predicted, rel=1e-6)


def test_norm_constraint_shortens_and_keeps_the_direction():
    params, closure = fit()
    step = reference.solve(reference.linearize(closure, params), 0.1).step
    for square in (1e-3, 1e3):
        params, closure = fit()
        before = flat(params)
        pgdfast.LM(params, lr=0.5, damping=0.1, damping_rule="constant", norm_constraint=square).step(closure)
        longest = min(1.0, square**0.5 / float(0.5 * step.norm()))
        assert relative(before - flat(params), longest * 0.5 * step) < 1e-9


@pytest.mark.parametrize("rule, search", [("gain-ratio", None), ("delayed", None), ("constant", "armijo")])
def test_rejected_momentum_is_dropped_at_the_same_damping(rule, search):
    params, closure = fit()
    optimizer = pgdfast.LM(params, damping=0.1, damping_rule=rule, momentum=0.9, line_search=search)
    optimizer.step(closure)
    mu = optimizer.report.next_damping
    for p in params:
        optimizer.state[p]["momentum"] = -1e3 * optimizer.state[p]["momentum"]   # leads uphill, and far
    before, ref = flat(params), reference.linearize(closure, params)
    optimizer.step(closure)
    report, expected = optimizer.report, reference.solve(ref, mu).step
    assert (report.status, report.attempts, report.momentum, report.damping) == ("accepted", 2, 0.0, mu)
    assert relative(before - flat(params), (report.line_search or 1.0) * expected) < 1e-9
    assert relative(momentum_of(optimizer), expected) < 1e-9


def test_steps_that_are_not_taken_leave_no_momentum():
    closure = Uphill()
    optimizer = pgdfast.LM([closure.w], damping=1.0, momentum=0.9)
    closure.jump = -0.1   # the first step is taken
    optimizer.step(closure)
    assert optimizer.report.status == "accepted" and memory_of(optimizer)["members"][0]["momentum"]
    closure.start, closure.jump = closure.w.detach().clone(), 100.0
    optimizer.step(closure)
    assert optimizer.report.status == "rejected" and torch.equal(closure.w, closure.start)
    assert not memory_of(optimizer)["members"][0]["momentum"]
    closure.jump = 0.0
    step = reference.solve(reference.linearize(closure, [closure.w]), optimizer.report.next_damping).step
    optimizer.step(closure)
    assert optimizer.report.momentum == 0.0 and relative(momentum_of(optimizer), step) < 1e-9


def test_parameters_that_join_begin_without_momentum():
    params, closure = fit()
    optimizer = pgdfast.LM(params[:2], damping=0.1, damping_rule="constant", momentum=0.9)
    optimizer.step(closure)
    prior = torch.cat([0.9 * momentum_of(optimizer), torch.zeros(25 - sum(p.numel() for p in params[:2]), dtype=torch.float64)])
    optimizer.add_param_group({"params": params[2:]})
    before, expected = flat(params), dense_step(reference.linearize(closure, params), 0.1, prior)
    optimizer.step(closure)
    assert relative(before - flat(params), expected) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", ["constant", "gain-ratio", "delayed"])
def test_resuming_with_momentum_is_bit_for_bit(rule, dtype):
    def make(params):
        return pgdfast.LM(params, damping=0.3, damping_rule=rule, momentum=0.9, norm_constraint=0.05, scaling="marquardt")

    params, closure = fit(dtype)
    optimizer = make(params)
    for _ in range(4):
        optimizer.step(closure)
    saved = snapshot(params)
    state = through_a_file(optimizer.state_dict())
    for _ in range(4):
        optimizer.step(closure)
    others, closure = fit(dtype)
    for p, q in zip(others, saved, strict=True):
        p.data.copy_(q)
    resumed = make(others)
    resumed.load_state_dict(state)
    for _ in range(4):
        resumed.step(closure)
    assert unchanged(params, [p.detach() for p in others])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(momentum=1.0), r"momentum is 1.0; it must be a number from 0 to below 1"),
        (dict(momentum=-0.1), r"momentum is -0.1"),
        (dict(momentum="0.9"), r"momentum is '0.9'"),
        (dict(norm_constraint=0.0), r"norm_constraint is 0.0; it must be None or a positive number"),
        (dict(norm_constraint=float("inf")), r"norm_constraint is inf"),
        (dict(momentum=0.9, cg=pgdfast.CG(truncate=True)), r"use truncate=False or momentum=0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match="pgdfast.LM: .*" + message):
        pgdfast.LM(fit()[0], **options)
