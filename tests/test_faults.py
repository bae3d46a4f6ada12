"""Faults that other Levenberg-Marquardt packages for neural networks have had, one test each."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import SOLVERS, TIGHT, damping_of, mlp, rand, relative, snapshot, unchanged

import pgdfast
from pgdfast import reference


def regression(samples, dtype=torch.float64, seed=0):
    model = mlp(2, 6, 1, dtype=dtype, seed=seed)
    x, y = rand(samples, 2, seed=1, dtype=dtype), rand(samples, 1, seed=2, dtype=dtype)
    return list(model.parameters()), lambda: F.mse_loss(model(x), y)


def test_solver_is_chosen_anew_when_the_batch_grows():
    model = mlp(2, 6, 1)
    params = list(model.parameters())
    optimizer = pgdfast.LM(params, damping=0.1, damping_rule="constant")
    chosen = []
    for samples in (3, 3000, 3):
        x, y = rand(samples, 2, seed=samples), rand(samples, 1, seed=samples + 1)
        closure = lambda: F.mse_loss(model(x), y)  # noqa: E731, B023
        before = snapshot(params)
        delta = (
            reference.solve(reference.linearize(closure, params), 0.1).step
            if samples == 3
            else None
        )
        optimizer.step(closure)
        chosen.append(optimizer.report.solver)
        if delta is not None:
            moved = torch.cat([(q - p).reshape(-1) for p, q in zip(params, before, strict=True)])
            assert relative(moved, delta) < 1e-9
    assert chosen[0] == chosen[2] == "dual" != chosen[1]


def test_uphill_step_is_not_kept_when_the_attempts_run_out():
    w = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    start = w.detach().clone()

    def closure():  # a discontinuity right at the start: every step, however short, lands far above
        return w if torch.equal(w.detach(), start) else w + 1e4

    for rule in ("gain-ratio", "delayed"):
        optimizer = pgdfast.LM([w], damping=1e-3, damping_rule=rule)
        for _ in range(3):
            loss = optimizer.step(closure)
            assert torch.equal(w, start) and float(loss) == 0.125
            assert optimizer.report.status != "accepted" and optimizer.report.advice


def test_no_stale_backup_after_an_outside_change():
    w = rand(4).requires_grad_()
    jump = {"size": 0.0}
    start = {"w": w.detach().clone()}

    def closure():
        extra = 0.0 if torch.equal(w.detach(), start["w"]) else jump["size"]
        return torch.cat([w, torch.tensor([extra], dtype=torch.float64)])

    optimizer = pgdfast.LM([w], damping=1.0)
    optimizer.step(closure)  # accepted, leaves a backup behind if there is one
    state = optimizer.state_dict()
    with torch.no_grad():
        w.copy_(rand(4, seed=5))  # the user loads other parameters
    start["w"], jump["size"] = w.detach().clone(), 1e3
    optimizer.load_state_dict(state)
    optimizer.step(closure)  # rejected: must return to the user's parameters
    assert torch.equal(w, start["w"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropy_at_confident_samples_stays_finite(dtype):
    z = torch.tensor(
        [[60.0, 0.0, -60.0], [0.0, 200.0, 0.0], [1.0, 0.0, 2.0]], dtype=dtype, requires_grad=True
    )
    target = torch.tensor([0, 1, 2])
    for closure in (
        lambda: F.cross_entropy(z, target),
        lambda: F.binary_cross_entropy_with_logits(z, F.one_hot(target, 3).to(dtype)),
    ):
        lin = pgdfast.linearize(closure, [z])
        assert lin.dense().isfinite().all() and lin.residual.isfinite().all()
        gradient = torch.autograd.grad(closure(), z)[0].reshape(-1)
        assert relative(lin.gradient(), gradient) < 1e-5
        for solver in SOLVERS:
            for mu in (1e-2, 1e-6):
                step = pgdfast.solve(lin, mu, solver=solver).step
                assert step.isfinite().all() and float(gradient.double() @ step.double()) > 0
        before = snapshot([z])
        pgdfast.LM([z]).step(closure)
        assert z.isfinite().all()
        with torch.no_grad():
            z.copy_(before[0])


@pytest.mark.parametrize("samples", [5, 60])
def test_scaled_damping_means_one_thing_in_every_solver(samples):
    ends = {}
    for backend in ("native", "torch", "reference"):
        for solver in SOLVERS:
            params, closure = regression(samples)
            optimizer = pgdfast.LM(
                params,
                damping=0.1,
                damping_rule="constant",
                scaling="marquardt",
                solver=solver,
                cg=TIGHT,
                backend=backend,
            )
            for _ in range(2):
                optimizer.step(closure)
            ends[backend, solver] = torch.cat([p.detach().reshape(-1) for p in params])
    expected = ends["reference", "dual"]
    assert all(relative(end, expected) < 1e-9 for end in ends.values())


def test_marquardt_scale_is_the_running_maximum():
    params, closure = regression(8)
    optimizer = pgdfast.LM(params, damping=0.1, damping_rule="constant", scaling="marquardt")
    D = torch.zeros(25, dtype=torch.float64)
    for _ in range(3):
        ref = reference.linearize(closure, params)
        D = torch.maximum(D, ref.diagonal())
        before = torch.cat([p.detach().reshape(-1) for p in params])
        optimizer.step(closure)
        after = torch.cat([p.detach().reshape(-1) for p in params])
        assert relative(before - after, reference.solve(ref, 0.1, scale=D).step) < 1e-9


@pytest.mark.parametrize(
    "error", [MemoryError, torch.OutOfMemoryError, KeyboardInterrupt, ZeroDivisionError]
)
def test_exceptions_are_not_swallowed(error):
    params, closure = regression(8)
    before, calls = snapshot(params), [0]

    def failing():
        calls[0] += 1
        if calls[0] == 2:
            raise error("out of memory")
        return closure()

    with pytest.raises(error):
        pgdfast.LM(params).step(failing)
    assert unchanged(params, before)


@pytest.mark.parametrize(
    "default, dtype", [(torch.float32, torch.float64), (torch.float64, torch.float32)]
)
@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize("scaling", ["identity", "marquardt"])
def test_model_of_another_dtype_than_the_default(default, dtype, backend, scaling):
    params, full = regression(8, dtype)
    torch.set_default_dtype(default)
    try:
        for solver in SOLVERS:
            optimizer = pgdfast.LM(
                params, damping=0.1, solver=solver, backend=backend, scaling=scaling
            )
            for _ in range(2):
                loss = optimizer.step(lambda: full() / 7 + 0.3 * params[0].square().sum() / 0.7)
            assert all(p.dtype == dtype and p.isfinite().all() for p in params)
            assert backend == "reference" or loss.dtype == dtype

        def closure():
            return (full() / 0.3 + 0.1 * F.leaky_relu(params[1], 0.1).square().sum()) / 7

        lin, ref = pgdfast.linearize(closure, params), reference.linearize(closure, params)
        limit = 1e-12 if dtype == torch.float64 else 1e-4
        assert relative(lin.gradient(), ref.vjp(ref.residual)) < limit
        mu = damping_of(ref, 1e2)
        assert relative(pgdfast.solve(lin, mu).step, reference.solve(ref, mu).step) < max(
            limit, 1e-10
        )
    finally:
        torch.set_default_dtype(torch.float32)


def test_rejected_tries_do_not_compound_the_damping_on_the_matrix():
    w = rand(4, seed=1).requires_grad_()
    J, b, calls = rand(6, 4, seed=2), rand(6, seed=3), [0]
    start = w.detach().clone()

    def closure():  # uphill at the first two trials, honest afterwards
        calls[0] += 1
        r = J @ w - b
        return 1e3 * r if calls[0] in (2, 3) else r

    ref = reference.linearize(lambda: J @ w - b, [w])
    optimizer = pgdfast.LM([w], damping=0.1, damping_rule="delayed")
    optimizer.step(closure)
    assert optimizer.report.attempts == 3 and optimizer.report.damping == pytest.approx(0.4)
    assert relative(start - w, reference.solve(ref, 0.4).step) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_undo_is_bit_exact(dtype, size):
    params, closure = regression(8, dtype)
    with torch.no_grad():
        for p in params:
            p.mul_(size)
    before = snapshot(params)

    def uphill():
        if unchanged(params, before):
            return closure()
        return closure() + 1e30 * (params[0] ** 2).sum() + 1e30

    optimizer = pgdfast.LM(params, damping=1e-3)
    for _ in range(3):
        optimizer.step(uphill)
        assert unchanged(params, before) and optimizer.report.status != "accepted"


@pytest.mark.parametrize("rule", ["constant", "gain-ratio", "delayed"])
def test_everything_a_resumed_run_needs_is_in_the_state_dict(rule):
    def make(params):
        return pgdfast.LM(params, damping=0.3, damping_rule=rule, scaling="marquardt", lr=0.7)

    params, closure = regression(8)
    optimizer = make(params)
    for _ in range(4):
        optimizer.step(closure)
    others, other_closure = regression(8, seed=7)
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    resumed = make(others)
    resumed.load_state_dict(optimizer.state_dict())
    for _ in range(4):
        optimizer.step(closure)
        resumed.step(other_closure)
        assert unchanged(others, snapshot(params))
        assert resumed.report.damping == optimizer.report.damping


def test_solve_does_not_wait_for_the_host_at_every_cg_iteration(monkeypatch):
    """The whole solve is one call into the core, however many iterations it takes."""
    params, closure = regression(40)
    lin = pgdfast.linearize(closure, params, backend="native")
    pgdfast.solve(lin, 1e-3, solver="cg")  # lays out the plan
    calls = []
    plan = lin.kernels()._plan

    class Counting:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(plan, name)

    monkeypatch.setattr(lin.kernels(), "_plan", Counting())
    counts = []
    for iterations in (2, 20):
        calls.clear()
        solution = pgdfast.solve(lin, 1e-3, solver="cg", cg=pgdfast.CG(iterations, 1e-15))
        counts.append(list(calls))
        assert solution.iterations == iterations and math.isfinite(solution.residual_norm)
    assert counts[0] == counts[1] and counts[0].count("cg") == 1
