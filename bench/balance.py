"""What `pgdfast.LM(balance=)` does on PINNs with several terms: errors after a budget of processor seconds, one thread.

`python -m bench.balance [--seeds N] [--only NAME] [--scale S]` prints, per problem, the geometric mean over seeds of the error
after a quarter of the budget and after all of it, with steps, for balance=None, "gradient" and "trace". "x 100" means that all
terms but the differential equation's were multiplied by 100. Rule "delayed" with "chord", float64.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import pgdfast
from pgdfast.pde import jet
from pgdfast_experiments.pde.networks import mlp, sobol
from pgdfast_experiments.pde.references import cole_hopf

from . import poisson_2d

MODES = (None, "gradient", "trace")


@dataclass(frozen=True)
class Case:
    """A problem: `make(seed)` gives (network, closure, error) with the equation's residuals first; seconds of one run."""

    name: str
    make: Callable
    seconds: float
    factor: float = 1.0   # of the other terms' residuals


def burgers(seed, count=1000, edge=100, stretch=0.01):
    """u_t + u u_x = 0.01 / pi u_xx on [0, 1]^2, odd in x: initial and boundary values as terms; x = d sinh(A s)."""
    net, points, nu, a = mlp([2, 20, 20, 20, 1], seed), sobol(count, seed), 0.01 / math.pi, math.asinh(1 / stretch)
    x = stretch * torch.sinh(a * points[:, :1])
    slope = 1 / (stretch * a * torch.cosh(a * points[:, :1]))
    curve = -(stretch * a**2 * torch.sinh(a * points[:, :1])) * slope**3
    line = torch.linspace(0, 1, edge, dtype=torch.float64)[:, None]
    start, left = torch.cat([line, 0 * line], 1), torch.cat([0 * line, line], 1)
    right = torch.cat([1 + 0 * line, line], 1)
    initial = -torch.sin(math.pi * stretch * torch.sinh(a * line))
    test = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = cole_hopf(stretch * torch.sinh(a * test[:, :1]), test[:, 1:], nu)
    assert bool(((0 <= x) & (x <= 1)).all())

    def closure():
        u, (u_s, u_t), (u_ss,) = jet(lambda p: net(2 * p - 1), points, [0, 1], order=[2, 1])
        equation = (u_t + u * u_s * slope - nu * (u_ss * slope**2 + u_s * curve)) / slope
        return (
            equation / math.sqrt(count), (net(2 * start - 1) - initial) / math.sqrt(edge),
            net(2 * left - 1) / math.sqrt(edge), net(2 * right - 1) / math.sqrt(edge),
        )

    return net, closure, lambda: distance(net(2 * test - 1), truth)


def convection(seed, beta=30.0, count=600, edge=60):
    """u_t + beta u_x = 0 on [0, 2 pi] x [0, 1], u(x, 0) = sin x, periodic in x (Krishnapriyan et al., NeurIPS 2021)."""
    net, points = mlp([2, 30, 30, 30, 1], seed), sobol(count, seed)
    line = torch.linspace(0, 1, edge, dtype=torch.float64)[:, None]
    start, left = torch.cat([line, 0 * line], 1), torch.cat([0 * line, line], 1)
    right = torch.cat([1 + 0 * line, line], 1)
    test = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = torch.sin(2 * math.pi * test[:, :1] - beta * test[:, 1:])

    def closure():
        _, (u_x, u_t), () = jet(lambda p: net(2 * p - 1), points, [0, 1], order=[1, 1])
        return (
            (u_t + beta / (2 * math.pi) * u_x) / math.sqrt(count),   # the network's x runs from 0 to 1
            (net(2 * start - 1) - torch.sin(2 * math.pi * line)) / math.sqrt(edge),
            (net(2 * left - 1) - net(2 * right - 1)) / math.sqrt(edge),
        )

    return net, closure, lambda: distance(net(2 * test - 1), truth)


def distance(u, truth):
    """The relative L2 distance."""
    return float((u.detach() - truth).norm() / truth.norm())


CASES = [
    *[Case("Poisson 2-64-1", lambda seed: poisson_2d.problem(poisson_2d.SMALL, seed), 1.5, f) for f in (1.0, 1e-2, 1e2)],
    *[Case("Poisson 2-64-64-48-48-1", lambda seed: poisson_2d.problem(poisson_2d.LARGE, seed), 6.0, f)
      for f in (1.0, 1e-2, 1e2)],
    Case("Burgers, soft conditions", burgers, 8.0),
    Case("convection, beta = 30", convection, 12.0),
]


def trained(case, seed, balance, scale=1.0):
    """((error, steps) after a quarter of the budget, after all of it; the last weights) of one run."""
    net, closure, error = case.make(seed)

    def weighed():
        first, *others = closure()
        return (first, *[case.factor * r for r in others])

    optimizer = pgdfast.LM(net.parameters(), damping_rule="delayed", acceleration="chord", balance=balance)
    spent, steps, found = 0.0, 0, []
    for budget in (case.seconds * scale / 4, case.seconds * scale):
        while spent < budget:
            start = time.process_time()
            optimizer.step(weighed)
            spent, steps = spent + time.process_time() - start, steps + 1
        found.append((error(), steps))
    return found, optimizer.report.weights


def main(arguments=None):
    """Print a row per problem as its runs end."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", metavar="NAME", help="problems whose name contains this")
    parser.add_argument("--scale", type=float, default=1.0, help="of the seconds (default: 1)")
    parser.add_argument("--modes", nargs="*", default=MODES, help='some of None, "gradient" and "trace"')
    given = parser.parse_args(arguments)
    modes = [None if mode == "None" else mode for mode in given.modes]
    torch.set_num_threads(1)
    trained(CASES[0], 0, "trace", 0.1)   # first calls load and bind
    print("| problem | seconds | " + " | ".join(f"{mode}" for mode in modes) + " | weights (seed 0) |")
    print("|---" * (len(modes) + 3) + "|")
    for case in CASES:
        if given.only not in case.name:
            continue
        cells, last = [], []
        for mode in modes:
            runs = [trained(case, seed, mode, given.scale) for seed in range(given.seeds)]
            ends = []
            for at in (0, 1):
                mean = math.exp(sum(math.log(run[0][at][0]) for run in runs) / len(runs))
                ends.append(f"{mean:.1e} ({sum(run[0][at][1] for run in runs) // len(runs)})")
            cells.append(", ".join(ends))
            if mode is not None:
                last.append(f"{mode} " + ", ".join(f"{w:.2g}" for w in runs[0][1]))
        name = case.name if case.factor == 1 else f"{case.name}, x {case.factor:g}"
        seconds = f"{case.seconds * given.scale / 4:g}, {case.seconds * given.scale:g}"
        print(f"| {name} | {seconds} | " + " | ".join(cells) + f" | {'; '.join(last)} |", flush=True)


if __name__ == "__main__":
    main()
