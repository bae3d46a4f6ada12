"""Problems whose rows are split over ranks and batches, and runs of LM on them; each function gets its group first."""

import math

import torch
import torch.nn.functional as F
from helpers import gradient, mlp, rand

import pgdfast

ROWS = 26
TIGHT = pgdfast.CG(max_iterations=5000, tolerance=1e-14)


def shares(size):
    """The rows of each rank: unequal, none on rank 1."""
    cuts = {1: [0, ROWS], 2: [0, ROWS, ROWS], 3: [0, 9, 9, ROWS], 4: [0, 5, 5, 18, ROWS]}[size]
    return [slice(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def data(dtype=torch.float64):
    x = rand(ROWS, 2, seed=1, dtype=dtype)
    return x, (torch.sin(3 * x[:, :1]) + 0.1 * rand(ROWS, 1, seed=2).to(dtype))


def _residuals(model, x, y):
    z = x.detach().requires_grad_()
    u = model(z)
    slope = gradient(u, z)
    return slope[:, :1] + u - y, 2 * model(x[x[:, 0] > 0])


LOSSES = {   # model, rows -> what a closure returns
    "mean": (1, lambda m, x, y: F.mse_loss(m(x), y)),
    "sum": (1, lambda m, x, y: F.mse_loss(m(x), y, reduction="sum")),
    "terms": (1, lambda m, x, y: F.mse_loss(m(x), y) + 3 * (m(-x) - y).square().sum() + 0.5 * (m(2 * x) ** 2).mean()),
    "residuals": (1, _residuals),
    "cross-entropy": (3, lambda m, x, y: F.cross_entropy(m(x), (7 * x[:, 0].abs()).long() % 3)),
    "cross-entropy sum": (3, lambda m, x, y: F.cross_entropy(m(x), (7 * x[:, 0].abs()).long() % 3, reduction="sum")),
    "penalty": (1, lambda m, x, y: F.mse_loss(m(x), y) + 1e-3 * sum(p.square().sum() for p in m.parameters())),
}


def run(group, loss, options, steps=20, batch=None, every_row=False):
    """(parameters, losses, statuses, solvers) of steps of LM; batch: rows of a batch, None without batches."""
    outputs, objective = LOSSES[loss]
    model = mlp(2, 7, outputs)
    x, y = data()
    if group is not None and not every_row:
        rows = shares(group.size())[group.rank()]
        x, y = x[rows], y[rows]
    opt = pgdfast.LM(model.parameters(), process_group=group, cg=TIGHT, **options)
    losses, told = [], []
    for _ in range(steps):
        if batch is None:
            value = opt.step(lambda: objective(model, x, y))
        else:
            value = opt.step(lambda one: objective(model, *one), list(zip(x.split(batch), y.split(batch), strict=True)))
        losses.append(float(value))
        told.append((opt.report.status, opt.report.solver, opt.report.attempts))
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]), losses, told


def runs(group, cases):
    """`run` of each case."""
    return [run(group, *case) for case in cases]


def finite(values):
    return all(map(math.isfinite, values))
