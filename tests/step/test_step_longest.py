"""The longest acceptable step: the least mu of those tried whose gain ratio reaches the target."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import EVERYWHERE, SOLVERS, flat, mlp, rand, snapshot, through_a_file

import pgdfast
from pgdfast import Longest


def wavy(dtype=torch.float64, **options):
    """A fit whose best damping changes from step to step: model, optimizer, closure."""
    model, x = mlp(2, 12, 12, 1, dtype=dtype), rand(80, 2, seed=1, dtype=dtype)
    options = {"damping_rule": "longest"} | options
    return model, pgdfast.LM(model.parameters(), **options), lambda: F.mse_loss(model(x), torch.sin(4 * x[:, :1]))


def ratio_at(closure, params, mu):
    """(gain ratio, loss) of the step of one damping, by a solve and a trial of its own; the parameters return."""
    solution, start = pgdfast.solve(pgdfast.linearize(closure, params), mu, solver="dual"), snapshot(params)
    before = float(closure().detach())
    with torch.no_grad():
        for p, part in zip(params, solution.step.split([p.numel() for p in params]), strict=True):
            p.sub_(part.view(p.shape))
        after = float(closure().detach())
        for p, q in zip(params, start, strict=True):
            p.copy_(q)
    return (before - after) / solution.predicted_reduction, after


@pytest.mark.parametrize("target", [0.075, 0.5, 0.9])
@pytest.mark.parametrize("backend, solver", [
    *(("native", solver) for solver in SOLVERS), ("torch", "dual"), ("reference", "cg"),
])
def test_takes_the_least_acceptable_of_separate_trials(backend, solver, target):
    model, optimizer, closure = wavy(
        damping=1e-4, damping_rule=Longest(target), solver=solver, cg=pgdfast.CG(3000, 1e-12), backend=backend
    )
    params, mu, undone = list(model.parameters()), 1e-4, 0
    for _ in range(6):
        before, candidates = float(closure().detach()), []
        while not candidates or candidates[-1][0] < target:
            candidates.append((*ratio_at(closure, params, mu * 4 ** len(candidates)), mu * 4 ** len(candidates)))
        undone += any(loss < before for _, loss, _ in candidates[:-1])
        ratio, loss, least = candidates[-1]
        optimizer.step(closure)
        report = optimizer.report
        assert (report.status, report.attempts) == ("accepted", len(candidates))
        assert report.damping == pytest.approx(least, rel=1e-12) and report.gain_ratio == pytest.approx(ratio, rel=1e-5)
        assert report.loss_after == pytest.approx(loss, rel=1e-6) and loss < before
        mu = report.next_damping
        assert 0.1 * report.damping <= mu * (1 + 1e-12) and mu <= report.damping
    assert undone or target < 0.9, "some step that descends should have been too poor"


@pytest.mark.parametrize("options", [
    {}, {"acceleration": "chord"}, {"acceleration": "geodesic"}, {"momentum": 0.8}, {"scaling": "marquardt"}, {"lr": 0.5},
    {"norm_constraint": 0.1, "damping": 0.1}, {"line_search": "armijo", "damping": 0.1},
    {"solver": "cg", "cg": pgdfast.CG(30, 1e-4, truncate=True)}, {"damping": 0.0, "damping_rule": Longest(0.9)},
], ids=lambda options: " ".join(options) or "plain")
@pytest.mark.parametrize("backend, dtype", [("native", torch.float32), *((backend, torch.float64) for backend in EVERYWHERE)])
def test_never_uphill(backend, options, dtype):
    model, optimizer, closure = wavy(dtype, **{"damping": 1e-6, "backend": backend} | options)
    params, first = list(model.parameters()), None
    for _ in range(8):
        before, start = float(closure().detach()), snapshot(params)
        first = before if first is None else first
        optimizer.step(closure)
        report, after = optimizer.report, float(closure().detach())
        moved = not all(map(torch.equal, start, params))
        assert after <= before and moved == (report.status == "accepted")
        target = optimizer._options.rule.target
        assert not moved or report.gain_ratio >= target or report.attempts == 12
    assert after < 0.7 * first


@pytest.mark.parametrize("options", [{}, {"acceleration": "chord", "scaling": "marquardt"}, {"momentum": 0.5, "lr": 0.7}])
def test_resumes_bit_for_bit(options):
    def steps(model, optimizer, closure):
        return [*(optimizer.step(closure) for _ in range(4)), flat(model.parameters())]

    model, optimizer, closure = wavy(damping=1e-4, **options)
    steps(model, optimizer, closure)
    twin, resumed, same = wavy(damping=1e-4, **options)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    expected = steps(model, optimizer, closure)
    assert all(map(torch.equal, steps(twin, resumed, same), expected))
