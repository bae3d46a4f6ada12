"""`poisson-2d`: -Lap u = f on the unit square, u = sin(pi x) sin(pi y), as in arXiv 2405.15603: nets, points and error.

900 interior and 120 boundary points, float64; the residuals are divided by the roots of their numbers, so that the loss is half
the sum of both mean squares. The error is the root mean square of net - u at 9,000 random points.
`python bench/poisson_2d.py` prints wall-clock seconds (steps) to given errors, medians over seeds, PyTorch's own thread count.
"""

import argparse
import math
import statistics
import time

import torch
from torch import nn

import pgdfast
from pgdfast.pde import laplacian

SMALL, LARGE = (2, 64, 1), (2, 64, 64, 48, 48, 1)
INTERIOR, BOUNDARY, TEST = 900, 120, 9000


def exact(x):
    """u(x), (N, 1)."""
    return torch.sin(math.pi * x[:, :1]) * torch.sin(math.pi * x[:, 1:])


def network(widths, seed):
    """The tanh network of these widths with PyTorch's own initial weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pairs = zip(widths, widths[1:], strict=False)
        layers = [m for a, b in pairs for m in (nn.Linear(a, b, dtype=torch.float64), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def problem(widths, seed, interior=INTERIOR, sides=BOUNDARY):
    """(network, closure, error): what LM.step takes, and a function without arguments that returns the error.

    interior, sides: points inside and on the boundary.
    """
    net, generator = network(widths, seed), torch.Generator().manual_seed(1000 + seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    x, edge, test = uniform(interior, 2), uniform(sides, 2), uniform(TEST, 2)
    side = torch.arange(sides)
    edge[side, side % 2] = (side // 2 % 2).double()   # one coordinate is 0 or 1, the four sides in turn
    f, truth = 2 * math.pi**2 * exact(x), exact(test)

    def closure(net=net, take=lambda points: points):
        inside, boundary = laplacian(net, take(x)).laplacian + take(f), net(take(edge))
        return inside / math.sqrt(interior), boundary / math.sqrt(sides)

    def error():
        with torch.no_grad():
            return float((net(test) - truth).square().mean().sqrt())

    return net, closure, error


def train(widths, seed, levels, limit, clock=time.perf_counter, **options):
    """{error: (seconds, steps)} of one run, the clock running in `step` alone; it ends at the least error or after `limit`."""
    net, closure, error = problem(widths, seed)
    optimizer = pgdfast.LM(net.parameters(), **options)
    found, spent, steps = {}, 0.0, 0
    while spent < limit and len(found) < len(levels):
        start = clock()
        optimizer.step(closure)
        spent, steps = spent + clock() - start, steps + 1
        reached = error()
        for level in levels:
            if reached <= level:
                found.setdefault(level, (spent, steps))
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rule", default="auto")
    parser.add_argument("--acceleration", default="auto")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=30.0, metavar="SECONDS", help="of a run (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: its own choice)")
    parser.add_argument("--processor-time", action="store_true", help="not wall-clock time: for a busy machine and one thread")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    options = {"damping_rule": given.rule, "acceleration": None if given.acceleration == "none" else given.acceleration,
               "clock": time.process_time if given.processor_time else time.perf_counter}
    print(f"{given.rule}, acceleration {given.acceleration}, {torch.get_num_threads()} threads")
    for widths, levels in ((SMALL, (1e-5, 1e-6, 1e-7)), (LARGE, (1e-5, 1e-6))):
        train(widths, 0, (0.0,), 0.3, **options)   # first calls load and bind
        runs = [train(widths, seed, levels, given.limit, **options) for seed in range(given.seeds)]
        for level in levels:
            pairs = sorted(run.get(level, (math.inf, math.inf)) for run in runs)
            seconds, steps = (statistics.median(column) for column in zip(*pairs, strict=True))
            each = ", ".join(f"{s:.2f} ({n:g})" for s, n in pairs)
            print(f"{'-'.join(map(str, widths))} to {level:.0e}: {seconds:.2f} s ({steps:g} steps); by seed {each}", flush=True)


if __name__ == "__main__":
    main()
