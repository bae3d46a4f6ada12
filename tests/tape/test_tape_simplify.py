"""What a program leaves out: additions that only rename, and work that reaches no residual."""

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, jacobian_agreement, parameters, perturb, rand, relative

from pgdfast.linear import Linearizer

X = rand(6, 4, seed=5)


def mix(z):
    """A linear map of each row, so that what is dead above is dead below."""
    return torch.tanh(z) @ rand(z.shape[-1], z.shape[-1], seed=6)


# Functions of w (4, 6) and b (6,): a few elements of a longer computation.
PARTS = {
    "last row": lambda w, b: mix(X @ w + b)[-1],
    "every other row": lambda w, b: mix(F.linear(X, w.T, b))[::2],
    "every third row from the second": lambda w, b: mix(mix(X @ w))[1::3] + b,
    "irregular rows": lambda w, b: torch.cat([mix(X @ w)[:1], mix(X @ w)[2:3], mix(X @ w)[5:]]) * b,
    "irregular rows of one": lambda w, b: (lambda h: torch.stack([h[0], h[2], h[5]]))(mix(X @ w)),
    "last of each group": lambda w, b: mix((X @ w).view(2, 3, 6) + b)[:, -1],
    "two of each group": lambda w, b: mix(torch.relu(X @ w + b)).view(2, 3, 6)[:, 1:],
    "corner": lambda w, b: mix(X @ w)[:2, 1:3],
    "columns of a weight": lambda w, b: torch.sin(X @ w)[:, ::2],
    "rows of a transposed product": lambda w, b: mix((w.T @ X.T).T + b)[::3],
    "columns need other rows": lambda w, b: (lambda h: torch.cat([h[0, :20], h[:, 20:].sum(0)]))(
        X @ torch.cat([w, w * b, torch.sin(w), w, w, w], 1)
    ),
    "softmax of some rows": lambda w, b: (X @ w + b).softmax(1)[1::2],
    "norm of some rows": lambda w, b: F.layer_norm((X @ w).view(2, 3, 6), (6,), b)[:, -1],
    "softmax of some columns": lambda w, b: mix((X @ w).softmax(1)[:, :2]),
    "softmax down the rows": lambda w, b: (X @ w).softmax(0)[:, 1] * b[:1],
    "attention of the last": lambda w, b: (
        F.scaled_dot_product_attention(*(X @ w).view(1, 2, 3, 6).split(2, -1))[:, :, -1] * b[:2]
    ),
    "gathered, some dropped": lambda w, b: mix((X @ w)[torch.tensor([5, 0, 3, 3])])[1:],
    "nothing but the bias": lambda w, b: (X @ w)[:0].sum() + b,
}


def problem(name):
    params = parameters((4, 6), (6,))
    return (lambda: PARTS[name](*params)), params


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PARTS)
def test_parts_agree_with_the_reference(name, backend):
    closure, params = problem(name)
    linearizer = Linearizer(params, backend)
    assert linearizer(closure)._plan is not None   # no fallback
    for visit in range(2):
        assert jacobian_agreement(linearizer, closure, params, seed=visit) < 1e-12
        perturb(params, seed=visit)


@pytest.mark.parametrize("name", PARTS)
def test_what_earlier_sweeps_left_behind_is_never_read(name):
    closure, params = problem(name)
    lin = Linearizer(params, "native")(closure)
    v, u = rand(lin.num_parameters, seed=1), rand(lin.num_residuals, seed=2)
    clean = lin.jvp(v), lin.vjp(u)
    for poison in (torch.nan, torch.inf):
        lin.jvp(torch.full_like(v, poison))
        assert relative(lin.jvp(v), clean[0]) == 0
        lin.vjp(torch.full_like(u, poison))
        assert relative(lin.vjp(u), clean[1]) == 0
        lin.jvp(torch.full_like(v, poison))
        assert relative(lin.vjp(u), clean[1]) == 0
        lin.vjp(torch.full_like(u, poison))
        assert relative(lin.jvp(v), clean[0]) == 0


def flops(closure, params):
    return Linearizer(params)(closure)._plan.kernels.flops


def test_dead_rows_cost_nothing():
    params = parameters((8, 8), (8, 8))
    x = rand(64, 8)

    def closure(rows):
        return torch.tanh(torch.tanh(x @ params[0]) @ params[1])[rows]

    whole, part = flops(lambda: closure(slice(None)), params), flops(lambda: closure(slice(3, None, 4)), params)
    assert part == pytest.approx(whole / 4)


def test_queries_that_nobody_asks_cost_nothing():
    (w,) = parameters((32, 96))
    x = rand(3, 4, 32)

    def closure(last):
        q, k, v = (x @ w).split(32, -1)
        q = q[:, -1:] if last else q
        return torch.softmax(q @ k.mT, -1) @ v

    saved = 1 - flops(lambda: closure(True), [w]) / flops(lambda: closure(False), [w])
    assert saved > 0.25   # of three products of one size three quarters of the first, and of what follows


def test_sums_are_written_in_place():
    params = parameters((4, 4), (4, 4), (4,))
    x = rand(5, 4)

    def closure():
        h = torch.tanh(x @ params[0])
        return torch.tanh(h + torch.sin(h) @ params[1] + params[2])

    program = Linearizer(params)(closure)._plan.program
    adds = [op for op in program.instructions if op.kind == 0 and op.constant < 0]
    assert len(adds) == 2   # h, which the sine reads too, and the bias


def test_layers_that_are_added_up_keep_their_biases_with_them():
    params = parameters((3, 4), (3,), (3, 4), (3,))
    x = rand(7, 4)
    linearizer = Linearizer(params)

    def closure():
        return torch.tanh(F.linear(x, *params[:2]) + F.linear(torch.sin(x), *params[2:])).sum(1)

    assert jacobian_agreement(linearizer, closure, params) < 1e-12
