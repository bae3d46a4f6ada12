"""Products with constants that are nearly all zero: the core visits the others alone, and the numbers are the same."""

import pytest
import torch

import pgdfast

pytestmark = pytest.mark.skipif(pgdfast.backends()["native"] != "available", reason="needs the C++ core")


def _one_hot(rows, columns, dtype):
    x = torch.zeros(rows, columns, dtype=dtype)
    x[torch.arange(rows), torch.arange(rows) * 7 % columns] = 1.5
    x[torch.arange(rows), torch.arange(rows) * 3 % columns] = -1.0
    return x


INPUTS = {
    "one-hot": _one_hot,
    "all zero": lambda rows, columns, dtype: torch.zeros(rows, columns, dtype=dtype),
    "one row full": lambda rows, columns, dtype: _one_hot(rows, columns, dtype).index_fill(0, torch.tensor([rows - 1]), 2.0),
    "transposed": lambda rows, columns, dtype: _one_hot(columns, rows, dtype).T,
    "strided": lambda rows, columns, dtype: _one_hot(rows, 2 * columns, dtype)[:, ::2],
    "dense": lambda rows, columns, dtype: torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize(("rows", "columns", "width"), [(101, 47, 16), (331, 64, 37), (40, 128, 15), (97, 43, 1)])
def test_products_agree_with_the_explicit_jacobian(inputs, rows, columns, width, dtype):
    generator = torch.Generator().manual_seed(1)
    x = inputs(rows, columns, dtype)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    W, V = (draw(*shape).requires_grad_() for shape in ((width, columns), (3, width)))
    lin = pgdfast.linearize(lambda: (x @ W.T).square() @ V.T, [W, V], backend="native")
    h, v, u = (x @ W.T).detach().double(), draw(width * columns + 3 * width), draw(3 * rows)
    dW, dV = v[: width * columns].view(width, columns).double(), v[width * columns :].view(3, width).double()
    double, G = x.double(), u.view(rows, 3).double()
    ahead = (2 * h * (double @ dW.T)) @ V.double().T + h.square() @ dV.T
    back = torch.cat([((2 * h * (G @ V.double())).T @ double).flatten(), (G.T @ h.square()).flatten()])
    allowed = 1e-12 if dtype is torch.float64 else 1e-5
    for found, expected in ((lin.jvp(v), ahead.flatten()), (lin.vjp(u), back)):
        assert (found.double() - expected.detach()).norm() <= allowed * expected.norm()
