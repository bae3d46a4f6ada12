"""Batches that are drawn anew at every step: training stays stable, and SPRING's momentum helps."""

import math

import pytest
import torch
from helpers import mlp, rand

import pgdfast
from pgdfast import Delayed, GainRatio

STEPS = 150


def resampled_pinn(seed):
    """The Poisson equation on the unit square on 20 + 10 new points a call: parameters, closure, error."""
    net, points = mlp(2, 16, 16, 1, seed=seed), rand(500, 2, seed=3).abs() % 1

    def exact(x):
        return torch.sin(math.pi * x).prod(1, keepdim=True)

    def closure():
        x, edge = torch.rand(20, 2, dtype=torch.float64), torch.rand(10, 2, dtype=torch.float64)
        side = torch.randint(4, (10,))
        edge[torch.arange(10), side // 2] = (side % 2).double()
        _, _, lap = pgdfast.pde.laplacian(net, x)
        return (lap + 2 * math.pi**2 * exact(x)) / 20**0.5, 3 * net(edge) / 10**0.5

    return list(net.parameters()), closure, lambda: float((net(points) - exact(points)).detach().square().mean().sqrt())


def train(seed, **options):
    """Logarithm of the mean error over the last third of the steps, and every mu."""
    params, closure, error = resampled_pinn(seed)
    optimizer = pgdfast.LM(params, lr=0.1, **options)
    torch.manual_seed(seed)
    errors, damping = [], []
    for step in range(STEPS):
        optimizer.step(closure)
        assert optimizer.report.loss_after is None or optimizer.report.loss_after <= optimizer.report.loss
        damping.append(optimizer.report.damping)
        if step >= 2 * STEPS // 3 and step % 5 == 0:
            errors.append(math.log10(error()))
    return sum(errors) / len(errors), damping


def test_momentum_lowers_the_error_on_resampled_points():
    plain, spring = (
        [train(seed, damping=1e-2, damping_rule="constant", momentum=beta)[0] for seed in range(2)] for beta in (0.0, 0.8)
    )
    assert max(spring) < min(plain) - 0.2   # in every run, by 37 % at least


@pytest.mark.parametrize("rule", ["gain-ratio", "delayed"])
@pytest.mark.parametrize("beta", [0.0, 0.8])
def test_rules_that_reject_stay_stable_on_resampled_points(rule, beta):
    log_error, damping = train(0, damping=1e-3, damping_rule=rule, momentum=beta)
    assert log_error < -2 and max(damping) < 10


@pytest.mark.parametrize("make", [GainRatio, Delayed])
def test_smallest_damping_keeps_a_linear_model_from_fitting_the_noise(make):
    truth, ends = rand(30, seed=1), {}
    for smallest in (1e-20, 30.0):
        w = torch.zeros(30, dtype=torch.float64, requires_grad=True)
        optimizer = pgdfast.LM([w], damping=1.0, damping_rule=make(smallest=smallest))
        torch.manual_seed(0)

        def closure(w=w):
            x = torch.randn(10, 30, dtype=torch.float64)
            return x @ (w - truth) - torch.randn(10, dtype=torch.float64)

        errors = []
        for step in range(60):
            optimizer.step(closure)
            if step >= 40:
                errors.append(float((w.detach() - truth).norm()))
        ends[smallest] = sum(errors) / len(errors)
        assert optimizer.report.damping >= smallest
    assert ends[30.0] < 0.8 * ends[1e-20]


@pytest.mark.parametrize("make", [GainRatio, Delayed])
@pytest.mark.parametrize("smallest", [0.0, -1.0, math.inf, "1"])
def test_smallest_that_is_none(make, smallest):
    with pytest.raises(ValueError, match="smallest mu is .*; it must be a positive number"):
        make(smallest=smallest)
