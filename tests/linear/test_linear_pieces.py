"""Sweeps over so many rows that the core takes them in pieces, and on several threads, against the plain PyTorch kernels."""

import pytest
import torch
import torch.nn.functional as F
from helpers import gradient, mlp, rand, relative

import pgdfast

pytestmark = pytest.mark.skipif(pgdfast.backends()["native"] != "available", reason="the C++ core is not built")

ROWS = 1501   # of some 4 kB each; a prime number of rows does not divide into equal pieces


def network(outputs):
    model = mlp(3, 64, 64, outputs)
    x, y = rand(ROWS, 3, seed=1), rand(ROWS, outputs, seed=2)
    return list(model.parameters()), lambda: model(x) - y


def pinn():
    model = mlp(2, 48, 1)
    x, edge = rand(ROWS, 2, seed=1).requires_grad_(), rand(97, 2, seed=2)

    def residuals():
        slope = gradient(model(x).sum(), x)
        return sum(gradient(slope[:, d].sum(), x)[:, d] for d in range(2)) + 1, model(edge)[:, 0]

    return list(model.parameters()), residuals


def normalized():
    model, out = mlp(3, 64, 64), torch.nn.Parameter(rand(64, 5, seed=3))
    x = rand(ROWS, 3, seed=1)
    return [*model.parameters(), out], lambda: F.layer_norm(torch.softmax(model(x), 1) * 3, (64,)) @ out


def embedded():
    table, model = torch.nn.Parameter(rand(11, 64, seed=3)), mlp(64, 64, 2)
    tokens = torch.arange(ROWS * 2).reshape(ROWS, 2) % 11
    return [table, *model.parameters()], lambda: model(F.embedding(tokens, table).sum(1))


def sequences():
    """Three positions per row that attend to each other."""
    model, weight = mlp(4, 24, 24), torch.nn.Parameter(rand(24, 24, seed=3) / 5)
    x = rand(ROWS, 3, 4, seed=1)

    def residuals():
        h = model(x)
        return (torch.softmax(h @ weight @ h.mT, 2) @ h).sum(1)

    return [*model.parameters(), weight], residuals


def shared_by_rows():
    """A quantity that all rows read keeps the program in one piece."""
    model, scale = mlp(3, 64, 64), torch.nn.Parameter(rand(64, seed=3))
    x = rand(ROWS, 3, seed=1)
    return [*model.parameters(), scale], lambda: model(x) * torch.tanh(scale) - scale.square().sum()


PROBLEMS = {   # with the rows that their independent parts are cut into
    "one output": (lambda: network(1), {ROWS}),
    "three outputs": (lambda: network(3), {ROWS}),
    "pinn": (pinn, {ROWS, 97}),
    "normalized": (normalized, {ROWS}),
    "embedded": (embedded, {ROWS}),
    "sequences": (sequences, {ROWS}),
    "shared by rows": (shared_by_rows, {1}),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", PROBLEMS)
def test_products_in_pieces(name, threads):
    make, rows = PROBLEMS[name]
    params, closure = make()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        native, plain = (pgdfast.linearize(closure, params, backend=b) for b in ("native", "torch"))
        assert set(native.kernels().rows_of_parts) == rows
        v, u = rand(native.num_parameters, seed=5), rand(native.num_residuals, seed=6)
        assert relative(native.jvp(v), plain.jvp(v)) < 1e-13
        assert relative(native.vjp(u), plain.vjp(u)) < 1e-13
        assert torch.equal(native.jvp(v), native.jvp(v))
        assert torch.equal(native.vjp(u), native.vjp(u))
    finally:
        torch.set_num_threads(before)
