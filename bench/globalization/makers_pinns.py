"""Differential equations: the worked problems with their own closures, convection and Allen-Cahn.

Each function takes a seed and returns (module, closure, error or None).
"""

import importlib
import math
from functools import partial

import torch

import pgdfast
from pgdfast_experiments.pde.networks import mlp, sobol


def worked(name, variant, seed):
    """A worked problem of pgdfast_experiments.pde: its network, residuals and distance from the reference."""
    trial = importlib.import_module(f"pgdfast_experiments.pde.{name}").make(seed, variant)
    return trial.model, trial.residuals, trial.error


poisson_small = partial(worked, "poisson_2d", "small")
poisson_large = partial(worked, "poisson_2d", "large")
poisson_nested = partial(worked, "poisson_2d", "small nested")
burgers = partial(worked, "burgers", "")
helmholtz = partial(worked, "helmholtz", "")
heat_1d = partial(worked, "heat_1d", "")
inverse_heat = partial(worked, "inverse_heat", "")


def convection(seed, beta=30.0, count=800):
    """u_t + beta u_x = 0, u(x, 0) = sin x, period 2 pi, t to 1: Krishnapriyan et al., arXiv 2109.01050, section 3.1."""
    model = mlp([2, 30, 30, 30, 1], seed)
    scale = torch.tensor([2 * math.pi, 1.0], dtype=torch.float64)
    x = sobol(count, seed) * scale
    start = torch.linspace(0, 2 * math.pi, 101, dtype=torch.float64)[:-1, None]
    start = torch.cat([start, torch.zeros_like(start)], 1)
    times = torch.linspace(0, 1, 50, dtype=torch.float64)[:, None]
    left, right = torch.cat([0 * times, times], 1), torch.cat([0 * times + 2 * math.pi, times], 1)
    test = sobol(2000, 999 + seed) * scale
    truth = torch.sin(test[:, :1] - beta * test[:, 1:])

    def closure():
        _, (u_x, u_t), _ = pgdfast.pde.jet(model, x, [0, 1], order=1)
        return ((u_t + beta * u_x) / math.sqrt(count), (model(start) - torch.sin(start[:, :1])) * math.sqrt(beta / len(start)),
                (model(left) - model(right)) * math.sqrt(beta / len(times)))

    def error():
        with torch.no_grad():
            return float((model(test) - truth).norm() / truth.norm())

    return model, closure, error


def allen_cahn(seed, count=1000):
    """u_t = 1e-4 u_xx + 5 u - 5 u^3, u(x, 0) = x^2 cos(pi x), u = -1 at x = -1 and 1: arXiv 1711.10566, section 3.1.1.

    The network holds initial and boundary values by construction.
    """
    net, points = mlp([2, 24, 24, 24, 1], seed), sobol(count, seed)
    x = torch.stack([2 * points[:, 0] - 1, points[:, 1]], dim=1)

    def model(z):
        s, t = z[:, :1], z[:, 1:]
        return s * s * torch.cos(math.pi * s) + t * (1 - s * s) * net(z)

    def closure():
        u, (_, u_t), (u_xx,) = pgdfast.pde.jet(model, x, [0, 1], order=[2, 1])
        return ((u_t - 1e-4 * u_xx - 5 * u + 5 * u**3) / math.sqrt(count),)

    return net, closure, None
