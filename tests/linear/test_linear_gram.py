"""The Gram matrix from factors: weights used in exchanged roles, in passes, in slices of explicit columns."""

import pytest
import torch
from helpers import gradient, mlp, parameters, rand, relative

import pgdfast
from pgdfast import reference


def laplacian(u, x):
    slope = gradient(u, x)
    return sum(gradient(slope[:, d], x)[:, d] for d in range(x.shape[1]))


def poisson(outputs, *hidden):
    """A PINN whose double backward uses every weight several times, along and against its rows; boundary rows besides."""
    model = mlp(2, *hidden, outputs)
    inside, edge = rand(7, 2, seed=1).requires_grad_(), rand(3, 2, seed=2)

    def closure():
        u = model(inside)
        return torch.stack([laplacian(u[:, k], inside) for k in range(outputs)], 1), model(edge)

    return list(model.parameters()), closure


def regression(*widths):
    model, x = mlp(*widths), rand(9, widths[0], seed=1)
    return list(model.parameters()), lambda: model(x)


def mixed():
    """Explicit rows of all kinds: a matrix with a narrow side, a stack, an embedding, a number, a weight used twice."""
    wide, stack, table, number, twice = parameters((40, 3), (2, 3, 3), (8, 3), (1,), (6, 6))
    x, ids = rand(9, 3, seed=5), torch.arange(9) % 8

    def closure():
        h = torch.tanh((x + table[ids]) @ stack[0] @ stack[1])
        for _ in range(2):
            h = torch.tanh(torch.cat([h, h], 1) @ twice)[:, :3] * number
        return torch.tanh(h @ wide.T) @ rand(40, 2, seed=6)

    return [wide, stack, table, number, twice], closure


def shared_points(*hidden):
    """Tensors over the same points, some of them in another order: rows of one to three outputs."""
    model, x, some = mlp(2, *hidden, 2), rand(9, 2, seed=1).requires_grad_(), torch.tensor([7, 5, 6, 1])

    def closure():
        u = model(x)
        return u[some, 0] * u[some, 1], laplacian(u[:, 0], x), u[:6, 1]

    return list(model.parameters()), closure


def shared_outputs():
    """Outputs of a network as tensors, two of them at some points only: J^T J comes from factors summed over outputs."""
    model, x, some = mlp(3, 40, 40, 5), rand(40, 3, seed=1), torch.arange(38, 0, -3)

    def closure():
        u = model(x)
        return u[:, 0], u[some, 1], u[:, 2], u[:, 3], torch.tanh(u[2:30, 4])

    return list(model.parameters()), closure


def halves_of_a_bias():
    """A weight used twice, each time with another part of one bias: their products do not meet."""
    W, b = parameters((20, 16), (40,))
    x, y, out = rand(7, 16, seed=1), rand(7, 16, seed=2), rand(20, 1, seed=3)
    return [W, b], lambda: (torch.tanh(x @ W.T + b[:20]) @ out, torch.tanh(y @ W.T + b[20:]) @ out)


CASES = {
    "halves of a bias": halves_of_a_bias,
    "shared outputs": shared_outputs,
    "shared points": lambda: shared_points(40, 40),
    "shared points, narrow": lambda: shared_points(5, 5),
    "poisson 24": lambda: poisson(1, 24, 24),
    "poisson 24-16": lambda: poisson(1, 24, 16, 16),
    "two equations": lambda: poisson(2, 24, 24),
    "narrow poisson": lambda: poisson(1, 5, 5),
    "regression": lambda: regression(3, 20, 20, 1),
    "several outputs": lambda: regression(3, 20, 20, 4),
    "explicit rows of all kinds": mixed,
}


@pytest.mark.parametrize("limit", [None, 1, 3000, 20000])
@pytest.mark.parametrize("name", CASES)
def test_gram_is_that_of_the_jacobian(name, limit, monkeypatch):
    """In one pass, as a small problem takes it, and cut into as many as a small budget asks for."""
    if limit is not None:
        monkeypatch.setenv("PGDFAST_PASS_BYTES", str(limit))
    params, closure = CASES[name]()
    J = reference.linearize(closure, params).dense()
    lin = pgdfast.linearize(closure, params, backend="native")
    assert relative(lin.gram(), J @ J.T) < 1e-13
    g = J.T @ lin.residual
    right = torch.linalg.solve(J.T @ J + 0.1 * torch.eye(len(g), dtype=g.dtype), g)
    for solver in ("dual", "primal"):
        assert relative(pgdfast.solve(lin, 0.1, solver=solver).step, right) < 1e-9
    assert relative(lin.diagonal(), J.square().sum(0)) < 1e-13


def test_weights_of_a_penalty_reach_every_slice(monkeypatch):
    monkeypatch.setenv("PGDFAST_PASS_BYTES", "2000")
    params, inner = poisson(1, 5, 5)
    closure = lambda: sum(r.square().sum() for r in inner()) + 0.3 * params[2].square().sum()  # noqa: E731
    ref = reference.linearize(closure, params)
    found = pgdfast.solve(pgdfast.linearize(closure, params), 0.1, solver="dual")
    assert relative(found.step, reference.solve(ref, 0.1).step) < 1e-9
