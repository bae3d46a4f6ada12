"""Small problems whose rows separate in one way or another, or not at all."""

import torch
from helpers import gradient, mlp, parameters, rand


def regression(outputs, dtype=torch.float64, rows=9):
    model, x = mlp(3, 12, outputs, dtype=dtype), rand(rows, 3, seed=1, dtype=dtype)
    return list(model.parameters()), lambda: model(x)


def pinn():
    model, inside, edge = mlp(2, 12, 12, 1), rand(7, 2, seed=1).requires_grad_(), rand(3, 2, seed=2)

    def closure():
        slope = gradient(model(inside), inside)
        return sum(gradient(slope[:, d], inside)[:, d] for d in range(2)), model(edge)

    return list(model.parameters()), closure


def coupled(rows=9):
    """Residuals that do not separate: every one sees all rows, twice."""
    weights, x, A = parameters((3, 4), (4, 4), (4, 1)), rand(rows, 3, seed=1), rand(rows, rows, seed=2) / rows**0.5

    def closure():
        h = x
        for w in weights:
            h = torch.tanh(A @ torch.tanh(h @ w))
        return h

    return weights, closure


def chained():
    model, x, (k,) = mlp(2, 9, 1), rand(8, 2, seed=1), parameters((1,))
    return [k, *model.parameters()], lambda: (torch.exp(k) * model(x) - 1, model(x).mean().view(1))
