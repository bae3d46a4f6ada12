"""The sweep: several dampings a step, the best taken, their losses from one run of the closure where it allows that."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    EVERYWHERE,
    SOLVERS,
    Uphill,
    counted,
    fit,
    flat,
    linear_problem,
    mlp,
    rand,
    relative,
    snapshot,
    through_a_file,
    unchanged,
)
from torch import nn

import pgdfast
from pgdfast import Sweep
from pgdfast.step.rules import LARGEST


class Counted:
    """A closure and the number of its runs."""

    def __init__(self, closure):
        self._closure, self.runs = closure, 0

    def __call__(self):
        self.runs += 1
        return self._closure()


def wavy(dtype=torch.float64):
    """A fit whose best damping changes from step to step: model, parameters, closure."""
    model = mlp(2, 12, 12, 1, dtype=dtype)
    x = rand(80, 2, seed=1, dtype=dtype)
    return model, list(model.parameters()), lambda: F.mse_loss(model(x), torch.sin(4 * x[:, :1]))


def losses_at(closure, params, displacements):
    """The closure's loss at theta - e for each e; the parameters return."""
    start, found = snapshot(params), []
    for e in displacements:
        with torch.no_grad():
            for p, q, part in zip(params, start, e.split([p.numel() for p in params]), strict=True):
                p.copy_(q - part.view(p.shape))
        result = closure().detach()
        found.append(float(result if result.dim() == 0 else 0.5 * result.square().sum()))
    with torch.no_grad():
        for p, q in zip(params, start, strict=True):
            p.copy_(q)
    return found


def apart(closure, params, rule, mu, rates=None):
    """(loss, mu, displacement) of the best of separate solves and trials, found without any of the optimizer's parts."""
    lin, rates, mus = pgdfast.linearize(closure, params), rates or [1.0] * len(params), rule.dampings(mu)
    parts = [pgdfast.solve(lin, m, solver="dual").step.split([p.numel() for p in params]) for m in mus]
    steps = [torch.cat([rate * part for rate, part in zip(rates, split, strict=True)]) for split in parts]
    return min(zip(losses_at(closure, params, steps), mus, steps, strict=True), key=lambda point: point[0])


@pytest.mark.parametrize("backend, solver", [
    *(("native", solver) for solver in SOLVERS), ("torch", "dual"), ("torch", "cg"), ("reference", "dual"), ("reference", "cg"),
])
def test_takes_the_best_of_separate_trials(backend, solver):
    _, params, plain = wavy()
    closure, runs = counted(plain)
    cg = pgdfast.CG(3000, 1e-12)
    optimizer = pgdfast.LM(params, damping=0.1, damping_rule="sweep", solver=solver, cg=cg, backend=backend)
    mu, seen = 0.1, set()
    for _ in range(6):
        loss, best, step = apart(plain, params, Sweep(), mu)
        theta = flat(params) - step
        runs.clear()
        optimizer.step(closure)
        report = optimizer.report
        assert report.status == "accepted" and report.damping == report.next_damping == best
        assert report.loss_after == pytest.approx(loss, rel=1e-6) and relative(flat(params), theta) < 1e-6
        assert report.loss_after == float(plain().detach())   # the closure's own, to the bit
        assert report.trials == 2 and len(runs) == 3   # linearized, all five at once, the winner
        seen.add(best / mu)
        mu = best
    assert len(seen) > 1


def test_rates_of_groups_and_weight_decay_and_scaling():
    _, params, closure = wavy()
    groups = [{"params": params[:2], "lr": 0.4}, {"params": params[2:], "weight_decay": 0.01}]
    optimizer = pgdfast.LM(groups, damping=0.1, damping_rule="sweep")
    mu = 0.1
    for _ in range(3):
        loss, best, step = apart(closure, params, Sweep(), mu, [0.4] * 2 + [1.0] * (len(params) - 2))
        theta = flat(params) - step
        decayed = torch.cat([flat(params[:2]) * 0, 0.01 * flat(params[2:])])
        optimizer.step(closure)
        assert optimizer.report.damping == best and optimizer.report.loss_after == pytest.approx(loss, rel=1e-9)
        assert relative(flat(params), theta - decayed) < 1e-9
        mu = best


def test_norm_constraint_binds_every_candidate():
    _, params, closure = wavy()
    optimizer = pgdfast.LM(params, damping=1e-3, damping_rule="sweep", norm_constraint=0.01)
    mu = 1e-3
    for _ in range(4):
        before = flat(params)
        steps = [s.step for s in pgdfast.solve(pgdfast.linearize(closure, params), Sweep().dampings(mu))]
        ends = losses_at(closure, params, [d * min(1.0, 0.1 / float(d.norm())) for d in steps])
        optimizer.step(closure)
        mu = optimizer.report.next_damping
        assert float((before - flat(params)).square().sum()) <= 0.01 * (1 + 1e-12)
        assert optimizer.report.loss_after == pytest.approx(min(ends), rel=1e-9) and min(ends) < optimizer.report.loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [
    {}, {"momentum": 0.8}, {"scaling": "marquardt"}, {"lr": 0.5}, {"weight_decay": 0.0, "norm_constraint": 0.1},
    {"solver": "cg", "cg": pgdfast.CG(30, 1e-4, truncate=True)}, {"solver": "cg", "cg": pgdfast.CG(preconditioner="nystrom")},
])
@pytest.mark.parametrize("backend", EVERYWHERE)
def test_never_uphill(backend, options, dtype):
    if backend != "native" and "solver" not in options and dtype == torch.float32:
        pytest.skip("one precision will do")
    _, params, closure = wavy(dtype)
    optimizer = pgdfast.LM(params, damping=1e-6, damping_rule="sweep", backend=backend, **options)
    first = None
    for _ in range(8):
        before, start = float(closure().detach()), [p.detach().clone() for p in params]
        first = before if first is None else first
        loss = float(optimizer.step(closure))
        report, after = optimizer.report, float(closure().detach())
        assert loss == pytest.approx(before, rel=1e-6) and after <= before and report.damping > 0
        moved = not all(map(torch.equal, start, params))
        assert moved or report.status != "accepted"
        reached = report.loss_after if moved else before   # the reference sums in float64, whatever the closure does
        assert after == (pytest.approx(reached, rel=1e-6) if backend == "reference" else reached)
    assert after < 0.7 * first


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_uphill_everywhere_is_undone_and_raises_mu_beyond_all(backend):
    closure = Uphill()
    optimizer = pgdfast.LM([closure.w], damping=1.0, damping_rule="sweep", backend=backend)
    optimizer.step(closure)
    report = optimizer.report
    assert torch.equal(closure.w, closure.start) and report.status == "rejected" and report.attempts == 12
    assert report.next_damping == 10.0   # ten times that of the step's beginning
    assert Sweep().dampings(Sweep().rejected(10.0, {}, -1.0, lambda: 1.0)[0])[0] > 10.0


def test_gauss_newton_is_tried_alone():
    params, closure = linear_problem(rand(9, 5), rand(9, seed=1))
    optimizer = pgdfast.LM(params, damping=0.0, damping_rule="sweep")
    optimizer.step(closure)
    report = optimizer.report
    assert (report.solver, report.damping, report.attempts, report.trials) == ("eigh", 0.0, 1, 1)
    assert report.loss_after < report.loss
    assert Sweep().dampings(0.0) == [0.0]


# --- closures that do not run for many points at once -------------------------------------------------


def item(model, x):
    return lambda: (model(x) - torch.sin(3 * x[:, :1])) * (1.0 if model[0].bias.sum().item() > 1e9 else 0.5)


def branch(model, x):
    return lambda: model(x) if model[0].bias.abs().max() > 1e9 else model(x) - torch.sin(3 * x[:, :1])


def numpy(model, x):
    return lambda: (model(x) - torch.sin(3 * x[:, :1])) / (1 + 1e-3 * float(model[0].bias.detach().numpy().std()))


def by_views(model, x):
    """Reaches a parameter by a tensor of its own: vmap sees it at the start only."""
    view = model[2].weight.detach().view(-1)
    return lambda: torch.cat([(model(x) - torch.sin(3 * x[:, :1])).reshape(-1), 0.2 * view.sum().reshape(1)])


def by_gradients(model, x):
    def closure():
        z = x.clone().requires_grad_()
        slope, = torch.autograd.grad(model(z).sum(), z, create_graph=True)
        return slope - torch.cos(3 * x)

    return closure


ALONE = {f.__name__: f for f in (item, branch, numpy, by_views, by_gradients)}


@pytest.mark.parametrize("name", ALONE)
def test_closures_that_need_it_run_point_by_point(name):
    model, x = mlp(2, 6, 1), rand(12, 2, seed=1)
    params, plain = list(model.parameters()), ALONE[name](model, x)
    closure, runs = counted(plain)
    optimizer = pgdfast.LM(params, damping=0.1, damping_rule="sweep")
    for k in range(4):
        mu = optimizer.report.next_damping if k else 0.1
        steps = [s.step for s in pgdfast.solve(pgdfast.linearize(plain, params), Sweep().dampings(mu))]
        ends = losses_at(plain, params, steps)
        runs.clear()
        optimizer.step(closure)
        report = optimizer.report
        assert report.loss_after == pytest.approx(min(ends), rel=1e-9) and report.loss_after < report.loss
        assert report.damping == Sweep().dampings(mu)[ends.index(min(ends))]
        if k:   # once it is known, each point has one run, and the winner no second one
            assert len(runs) == 6 and report.trials == 5


@pytest.mark.parametrize("kind", ["dropout", "points"])
@pytest.mark.parametrize("backend", EVERYWHERE)
def test_all_points_see_the_batch_of_the_linearization(kind, backend):
    model, seen = mlp(2, 6, 1), []
    drop = nn.Dropout(0.3)

    def closure():
        x = torch.rand(12, 2, dtype=torch.float64) if kind == "points" else rand(12, 2)
        seen.append(x)
        y = model[2](drop(torch.tanh(model[0](x)))) if kind == "dropout" else model(x)
        return y - torch.sin(3 * x[:, :1])

    optimizer = pgdfast.LM(model.parameters(), damping=0.1, damping_rule="sweep", backend=backend)
    torch.manual_seed(0)
    for _ in range(3):
        before, _ = torch.get_rng_state(), seen.clear()
        optimizer.step(closure)
        after, report = torch.get_rng_state(), optimizer.report
        assert all(torch.equal(x, seen[0]) for x in seen) and len(seen) == 1 + report.trials >= 3
        torch.set_rng_state(before)
        assert 0.5 * float(closure().detach().square().sum()) == pytest.approx(report.loss_after, rel=1e-12)
        assert torch.equal(torch.get_rng_state(), after)   # as one evaluation leaves it


def test_tuples_and_lists_and_keywords():
    """Parameters that an operation takes in a list or by keyword are replaced as well."""
    params = [rand(3, 2, seed=k).requires_grad_() for k in range(2)]
    x = rand(7, 3)

    def plain():
        return torch.tanh(x @ torch.cat(params, dim=1)) - 0.3, F.linear(input=x, weight=params[0].T) + torch.stack(params).sum()

    closure, runs = counted(plain)
    optimizer = pgdfast.LM(params, damping=0.1, damping_rule="sweep")
    for _ in range(3):
        runs.clear()
        optimizer.step(closure)
        assert len(runs) == 3 and optimizer.report.status == "accepted"


@pytest.mark.parametrize("form", ["laplacian", "cross-entropy"])
def test_other_losses(form):
    model, x = mlp(2, 8, 3 if form == "cross-entropy" else 1), rand(20, 2)
    labels = torch.arange(20) % 3
    closure = {
        "laplacian": lambda: pgdfast.pde.laplacian(model, x).laplacian - 1.0,
        "cross-entropy": lambda: F.cross_entropy(model(x), labels),
    }[form]
    optimizer = pgdfast.LM(model.parameters(), damping=0.1, damping_rule="sweep")
    for _ in range(5):
        optimizer.step(closure)
        assert optimizer.report.status == "accepted" and optimizer.report.loss_after < optimizer.report.loss


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, KeyboardInterrupt])
def test_what_the_closure_raises_reaches_the_user(error):
    params, inner = fit()
    before, calls = snapshot(params), []

    def closure():
        calls.append(1)
        if len(calls) > 1:
            raise error("out of luck")
        return inner()

    optimizer = pgdfast.LM(params, damping_rule="sweep")
    with pytest.raises(error, match="out of luck"):
        optimizer.step(closure)
    assert unchanged(params, before) and all(p.requires_grad for p in params)


def test_closures_without_code_run_point_by_point():
    params, inner = fit()

    class Opaque:
        __call__ = staticmethod(inner)

    optimizer = pgdfast.LM(params, damping_rule="sweep")
    optimizer.step(Opaque())
    assert optimizer.report.status == "accepted"
    counter = Counted(inner)
    optimizer.step(counter)
    assert counter.runs == 1 + optimizer.report.trials


# --- state and misuse ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resumes_bit_for_bit(dtype):
    def make(model):
        return pgdfast.LM(model.parameters(), damping=0.1, damping_rule="sweep", momentum=0.5, scaling="marquardt", lr=0.7)

    def steps(model, optimizer):
        def closure():
            x = torch.rand(20, 2).to(dtype)
            return model(x) - torch.sin(3 * x[:, :1])

        return [*(optimizer.step(closure) for _ in range(4)), flat(model.parameters())]

    model = mlp(2, 6, 1, dtype=dtype)
    optimizer = make(model)
    torch.manual_seed(1)
    steps(model, optimizer)
    state = through_a_file(optimizer.state_dict())
    twin, generator = copy.deepcopy(model), torch.get_rng_state()
    resumed = make(twin)
    resumed.load_state_dict(state)
    pair = copy.deepcopy((model, optimizer))
    expected = steps(model, optimizer)
    for again in ((twin, resumed), pair):
        torch.set_rng_state(generator)
        assert all(torch.equal(a, b) for a, b in zip(steps(*again), expected, strict=True))


def test_options():
    assert Sweep(factors=[2, 0.5]).dampings(1.0) == [0.5, 2.0]
    assert Sweep(factors=[0.1, 1], smallest=0.5).dampings(0.5) == [0.5]
    assert Sweep().dampings(LARGEST)[-1] == LARGEST
    for bad in ((), (0.0,), (1.0, math.inf), ("a",)):
        with pytest.raises(ValueError, match="factors are .*; they must be positive numbers, at least one"):
            Sweep(factors=bad)
    params, closure = fit()
    for other in ({"line_search": "armijo"}, {"acceleration": "chord"}):
        with pytest.raises(ValueError, match="'sweep' compares plain steps .* use line_search=None and acceleration=None"):
            pgdfast.LM(params, damping_rule="sweep", **other)
    with pytest.raises(ValueError, match="damping is a schedule"):
        pgdfast.LM(params, damping=lambda step: 1.0, damping_rule="sweep")
    optimizer = pgdfast.LM(params, damping=1e-2, damping_rule=Sweep(factors=(0.5, 2.0)))
    optimizer.step(closure)
    tried = [0.005, 0.02]
    for _ in range(optimizer.report.attempts - 1):
        tried = [4 * tried[1] * 0.5, 4 * tried[1] * 2.0]   # beyond all of the last ones
    assert optimizer.report.damping in tried
