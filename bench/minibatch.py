"""Batches drawn anew at every step: SPRING's momentum and the damping rules. `python bench/minibatch.py [STEPS [SEEDS]]`.

A PINN of the Poisson equation on the unit square (u = sin pi x sin pi y, tanh 2-24-24-1, float64) on 20 + 10 points drawn
inside the closure, and a regression on 40 of 1,000 noisy samples. Equal numbers of steps from equal weights. Printed: the
geometric mean, over seeds and the second half of the steps, of the error against the exact function, its least and largest
over the seeds; solves a step; steps whose momentum was dropped; mu's least, last and largest.
"""

import math
import sys

import torch
from torch import nn

import pgdfast

STEPS, SEEDS = 200, 3
RULES = (   # mu at first, lr
    ("constant", 1e-2, 0.1), ("constant", 1e-3, 0.1), ("gain-ratio", 1e-3, 0.1), ("delayed", 1e-3, 0.1),
    ("gain-ratio", 1e-3, 1.0), ("delayed", 1e-3, 1.0),
)
MOMENTA = (0.0, 0.6, 0.8, 0.9)


def root_mean_square(net, exact, x):
    """Error of a net on points."""
    with torch.no_grad():
        return float((net(x) - exact(x)).square().mean().sqrt())


def mlp(*widths):
    pairs = zip(widths[:-1], widths[1:], strict=True)
    return nn.Sequential(*[layer for a, b in pairs for layer in (nn.Linear(a, b), nn.Tanh())][:-1]).double()


def poisson(seed, interior=20, boundary=10):
    """Parameters, a closure on new points at every call, and the error."""
    torch.manual_seed(seed)
    net, points = mlp(2, 24, 24, 1), torch.rand(2000, 2, dtype=torch.float64)

    def exact(x):
        return torch.sin(math.pi * x).prod(1, keepdim=True)

    def closure():
        x, edge = torch.rand(interior, 2, dtype=torch.float64), torch.rand(boundary, 2, dtype=torch.float64)
        side = torch.randint(4, (boundary,))
        edge[torch.arange(boundary), side // 2] = (side % 2).double()
        _, _, lap = pgdfast.pde.laplacian(net, x)
        return (lap + 2 * math.pi**2 * exact(x)) / interior**0.5, 3 * net(edge) / boundary**0.5

    return list(net.parameters()), closure, lambda: root_mean_square(net, exact, points)


def regression(seed, batch=40, noise=0.1):
    """The same for sin(6 x) with noise."""
    torch.manual_seed(seed)
    net, x = mlp(1, 20, 20, 1), 2 * torch.rand(1000, 1, dtype=torch.float64) - 1

    def exact(x):
        return torch.sin(6 * x)

    y = exact(x) + noise * torch.randn(1000, 1, dtype=torch.float64)

    def closure():
        rows = torch.randperm(1000)[:batch]
        return (net(x[rows]) - y[rows]) / batch**0.5

    return list(net.parameters()), closure, lambda: root_mean_square(net, exact, x)


def run(make, seed, steps, **options):
    """Logarithm of the mean error, solves, steps without their momentum, and every mu."""
    params, closure, error = make(seed)
    optimizer = pgdfast.LM(params, **options)
    errors, solves, dropped, damping = [], 0, 0, []
    for step in range(steps):
        optimizer.step(closure)
        report = optimizer.report
        solves, dropped = solves + report.attempts, dropped + (step > 0 and report.momentum == 0)
        damping.append(report.damping)
        if step >= steps // 2 and step % 5 == 0:
            errors.append(math.log10(error()))
    return sum(errors) / len(errors), solves, dropped, damping


def main():
    given = [int(argument) for argument in sys.argv[1:]]
    steps, seeds = (given + [STEPS, SEEDS][len(given):])[:2]
    print(f"{steps} steps, {seeds} seeds\n{'problem':11} {'rule':17} {'lr':>3} {'beta':>4}  {'error':>8} {'least':>8}"
          f" {'largest':>8}  {'solves':>6} {'dropped':>7}  {'mu least':>8} {'last':>8} {'largest':>8}")
    for make in (poisson, regression):
        for rule, mu, lr in RULES:
            for beta in MOMENTA:
                found = [run(make, s, steps, damping=mu, lr=lr, damping_rule=rule, momentum=beta) for s in range(seeds)]
                logs = [each[0] for each in found]
                solves, dropped = (sum(each[k] for each in found) / (steps * seeds) for k in (1, 2))
                every = [m for each in found for m in each[3]]
                print(f"{make.__name__:11} {f'{rule} {mu:.0e}':17} {lr:3.1f} {beta:4.1f}  {10 ** (sum(logs) / seeds):8.1e} "
                      f"{10 ** min(logs):8.1e} {10 ** max(logs):8.1e}  {solves:6.2f} {dropped if beta else 0:7.2f}  "
                      f"{min(every):8.0e} {found[-1][3][-1]:8.0e} {max(every):8.0e}", flush=True)


if __name__ == "__main__":
    main()
