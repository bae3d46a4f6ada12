"""`poisson-2d`: -Lap u = f on the unit square, u = sin(pi x) sin(pi y), as in arXiv 2405.15603: nets, points and error.

900 interior and 120 boundary points, float64; the residuals are divided by the roots of their numbers, so that the loss is half
the sum of both mean squares. The error is the root mean square of net - u at 9,000 random points.
"""

import math

import torch
from torch import nn

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


def problem(widths, seed):
    """(network, closure, error): what LM.step takes, and a function without arguments that returns the error."""
    net, generator = network(widths, seed), torch.Generator().manual_seed(1000 + seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    x, edge, test = uniform(INTERIOR, 2), uniform(BOUNDARY, 2), uniform(TEST, 2)
    side = torch.arange(BOUNDARY)
    edge[side, side % 2] = (side // 2 % 2).double()   # one coordinate is 0 or 1, the four sides in turn
    f, truth = 2 * math.pi**2 * exact(x), exact(test)

    def closure():
        return (laplacian(net, x).laplacian + f) / math.sqrt(INTERIOR), net(edge) / math.sqrt(BOUNDARY)

    def error():
        with torch.no_grad():
            return float((net(test) - truth).square().mean().sqrt())

    return net, closure, error
