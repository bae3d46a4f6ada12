"""Momentum, acceleration, the norm constraint and replayed random numbers in one step, and in one state."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers import (
    BACKENDS,
    EVERYWHERE,
    TIGHT,
    Correcting,
    Uphill,
    fit,
    flat,
    memory_of,
    mlp,
    momentum_of,
    rand,
    relative,
    resampled,
    snapshot,
    through_a_file,
    unchanged,
)

import pgdfast
from pgdfast import reference
from pgdfast.linear import Linearizer
from pgdfast.step import Chord, MovedGenerators, Point, RandomReplay
from pgdfast.step.correction import ACCELERATIONS

EVERYTHING = dict(damping=0.3, momentum=0.8, norm_constraint=0.05, scaling="marquardt")


class Round:
    """An acceleration of one's own: one chord round, wherever it leads."""

    def correct(self, model, delta):
        yield delta
        e = delta + model.correction(model.missed())
        return e, (yield e)


BENT = {"geodesic": "geodesic", "own": Round()}


@pytest.mark.parametrize("solver", ["dual", "primal", "eigh", "cg", "lsmr"])
@pytest.mark.parametrize("penalty", [0.0, 0.01])
def test_corrections_leave_the_prior_out(solver, penalty):
    """A step with a prior p solves A delta = g + mu D p; its correction A c = J^T u."""
    params, inner = fit()
    closure = (lambda: inner() + penalty * params[0].square().sum()) if penalty else inner
    D, p = 0.5 + rand(25, seed=3).square(), rand(25, seed=4)
    for backend in BACKENDS:
        lin = pgdfast.linearize(closure, params, backend=backend)
        u = rand(lin.num_residuals, seed=5)
        J = lin.dense()
        A = J.T @ J + torch.diag(0.1 * D + (lin.penalty if penalty else 0.0))
        found = pgdfast.solve(lin, 0.1, scale=D, solver=solver, cg=TIGHT, prior=p)
        assert relative(A @ found.step, lin.gradient() + 0.1 * D * p) < 1e-9
        assert relative(found.solve_with_same_factor(u), torch.linalg.solve(A, J.T @ u)) < 1e-9


def test_a_failed_solve_corrects_nothing():
    params, closure = fit()
    lin = pgdfast.linearize(closure, params)
    found = replace(pgdfast.solve(lin, 0.1), status="not_positive_definite")
    with pytest.raises(RuntimeError, match="ended as 'not_positive_definite' and left no factor; solve at a larger damping"):
        found.solve_with_same_factor(lin.residual)
    empty = pgdfast.linearize(lambda: params[0][:0], params)
    assert torch.equal(pgdfast.solve(empty, 0.1).solve_with_same_factor(empty.residual), torch.zeros(25, dtype=torch.float64))


def test_chord_with_a_prior_ends_where_the_damped_problem_is_solved():
    """Its fixed point has J^T r(theta - e) = mu (e - p): the damping pulls to p, on the true residual."""
    params, closure, _ = resampled()
    torch.manual_seed(0)
    replay = RandomReplay(MovedGenerators(), closure, params[0].device)
    lin, p = Linearizer(params)(closure), 0.05 * rand(25, seed=3)
    replay.linearized()

    def replayed():
        replay.rewind()
        try:
            return closure()
        finally:
            replay.finish()

    step = Correcting(replayed, params, lin, pgdfast.solve(lin, 5.0, prior=p))
    e, _ = step.ended(Chord(rounds=100, factor=1.0))
    step.parameters.go({0: Point(e, displacement=True)})
    residual = replayed().detach().reshape(-1)
    step.parameters.all_back()
    lin.parameters_unchanged()
    assert relative(lin.vjp(residual), 5.0 * (e - p)) < 1e-3
    assert relative(step.delta, e) > 1e-3


@pytest.mark.parametrize("name", BENT)
@pytest.mark.parametrize("backend", EVERYWHERE)
def test_momentum_keeps_the_step_without_its_correction(backend, name):
    params, closure = fit()
    optimizer = pgdfast.LM(
        params, lr=0.5, damping=0.1, damping_rule="constant", momentum=0.9, acceleration=BENT[name], backend=backend
    )
    phi = torch.zeros(25, dtype=torch.float64)
    for _ in range(3):
        J = (ref := reference.linearize(closure, params)).dense()
        before, A = flat(params), J.T @ J + 0.1 * torch.eye(25, dtype=torch.float64)
        phi = torch.linalg.solve(A, J.T @ ref.residual + 0.1 * 0.9 * phi)
        optimizer.step(closure)
        report = optimizer.report
        assert relative(momentum_of(optimizer), phi) < 1e-9
        assert report.correction > 1e-5
        assert relative(before - flat(params), 0.5 * phi) == pytest.approx(report.correction, rel=1e-6)
        assert report.loss_after == pytest.approx(float(reference.linearize(closure, params).loss), rel=1e-12)
    assert report.momentum == 0.9


@pytest.mark.parametrize("name", BENT)
@pytest.mark.parametrize("rule", ["constant", "gain-ratio", "delayed"])
def test_corrected_moves_obey_the_norm_constraint(rule, name):
    params, closure = fit()
    groups = [{"params": params[:2], "lr": 0.4}, {"params": params[2:]}]
    optimizer = pgdfast.LM(groups, damping=0.1, damping_rule=rule, acceleration=BENT[name], momentum=0.5, norm_constraint=0.01)
    bent = []
    for _ in range(6):
        before = flat(params)
        optimizer.step(closure)
        assert float((before - flat(params)).square().sum()) <= 0.01 * (1 + 1e-12)
        bent.append(optimizer.report.correction)
    assert max(bent) > 1e-3


@pytest.mark.parametrize("name", BENT)
@pytest.mark.parametrize("backend", EVERYWHERE)
def test_a_group_of_rate_zero_stays(backend, name):
    params, closure = fit()
    still, before = snapshot(params[2:]), flat(params)
    groups = [{"params": params[:2], "lr": 0.5}, {"params": params[2:], "lr": 0.0}]
    optimizer = pgdfast.LM(groups, damping=0.1, acceleration=BENT[name], momentum=0.5, backend=backend)
    for _ in range(3):
        optimizer.step(closure)
        assert optimizer.report.status == "accepted" and optimizer.report.correction > 0
    assert unchanged(params[2:], still) and not torch.equal(flat(params), before)


@pytest.mark.parametrize("rule", ["gain-ratio", "delayed"])
def test_a_promised_rise_is_no_convergence(rule):
    """Half of a step may lead uphill in the model too: damping turns it, until it descends."""
    w = torch.tensor([0.0, 0.0], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    J = torch.tensor([[3.0, 0.0, 1.0], [0.0, 1e-3, 1.0]], dtype=torch.float64)
    target = torch.tensor([1.0, -2.0], dtype=torch.float64)

    def closure():
        return J @ torch.cat([w, v]) - target

    optimizer = pgdfast.LM([{"params": [w], "lr": 1e-12}, {"params": [v]}], damping=1e-6, damping_rule=rule)
    for _ in range(6):
        optimizer.step(closure)
        assert "converged" not in optimizer.report.advice and float(w.detach().abs().max()) < 1e-8
    assert optimizer.report.status == "accepted" and optimizer.report.loss_after < 2.41


@pytest.mark.parametrize("rule", ["constant", "gain-ratio"])
@pytest.mark.parametrize("name", ACCELERATIONS)
@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("form", ["residuals", "mean"])
def test_corrections_see_the_batch_of_the_linearization(form, backend, name, rule):
    params, inner, seen = resampled()
    closure = inner if form == "residuals" else lambda: inner().square().mean()
    optimizer = pgdfast.LM(params, damping=0.01, damping_rule=rule, acceleration=name, backend=backend)
    torch.manual_seed(0)
    for _ in range(3):
        before, _ = torch.get_rng_state(), seen.clear()
        optimizer.step(closure)
        after = torch.get_rng_state()
        assert len(seen) == 1 + optimizer.report.trials >= 2
        assert all(torch.equal(x, seen[0]) for x in seen)
        torch.set_rng_state(before)
        closure()
        assert torch.equal(torch.get_rng_state(), after)   # as one evaluation leaves it


@pytest.mark.parametrize("name", ACCELERATIONS)
@pytest.mark.parametrize("rule", ["constant", "gain-ratio", "delayed"])
def test_backends_agree_on_all_of_it(rule, name):
    ends = []
    for backend in EVERYWHERE:
        params, closure, _ = resampled()
        groups = [{"params": params[:2], "lr": 0.3}, {"params": params[2:], "lr": 0.6}]
        optimizer = pgdfast.LM(groups, damping_rule=rule, acceleration=name, backend=backend, solver="dual", **EVERYTHING)
        torch.manual_seed(1)
        losses = [float(optimizer.step(closure)) for _ in range(5)]
        ends.append(torch.cat([flat(params), torch.tensor(losses, dtype=torch.float64)]))
    assert relative(ends[0], ends[2]) < 1e-8 and relative(ends[1], ends[2]) < 1e-8


@pytest.mark.parametrize("name", BENT)
def test_rejected_momentum_is_dropped_and_the_step_corrected_at_the_same_damping(name):
    params, closure = fit()
    optimizer = pgdfast.LM(params, damping=0.1, momentum=0.9, acceleration=BENT[name])
    optimizer.step(closure)
    mu = optimizer.report.next_damping
    for p in params:
        optimizer.state[p]["momentum"] = -1e3 * optimizer.state[p]["momentum"]   # leads uphill, and far
    plain = reference.solve(reference.linearize(closure, params), mu).step
    optimizer.step(closure)
    report = optimizer.report
    assert (report.status, report.attempts, report.momentum, report.damping) == ("accepted", 2, 0.0, mu)
    assert report.correction > 0 and relative(momentum_of(optimizer), plain) < 1e-9


@pytest.mark.parametrize("name", ACCELERATIONS)
def test_uphill_is_undone_and_leaves_no_momentum(name):
    closure = Uphill()
    optimizer = pgdfast.LM([closure.w], damping=1.0, momentum=0.9, acceleration=name, norm_constraint=1.0)
    optimizer.step(closure)
    assert torch.equal(closure.w, closure.start) and not memory_of(optimizer)["members"][0]["momentum"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", ["constant", "gain-ratio", "delayed"])
@pytest.mark.parametrize("how", ["state_dict", "copy"])
def test_runs_go_on_bit_for_bit(how, rule, dtype):
    """Saved to a file and loaded, or copied with the model; on batches that go on from the same generator."""

    def make(model):
        return pgdfast.LM(model.parameters(), damping_rule=rule, acceleration="chord", **EVERYTHING)

    def steps(model, optimizer):
        def closure():
            x = torch.rand(12, 2).to(dtype)
            return model(x) - torch.sin(3 * x[:, :1])

        return [*(optimizer.step(closure) for _ in range(4)), flat(model.parameters())]

    model = mlp(2, 6, 1, dtype=dtype)
    optimizer = make(model)
    torch.manual_seed(2)
    steps(model, optimizer)
    generator = torch.get_rng_state()
    if how == "copy":
        twin, resumed = copy.deepcopy((model, optimizer))
    else:
        twin = copy.deepcopy(model)
        resumed = make(twin)
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    expected = steps(model, optimizer)
    torch.set_rng_state(generator)
    assert all(torch.equal(a, b) for a, b in zip(steps(twin, resumed), expected, strict=True))
