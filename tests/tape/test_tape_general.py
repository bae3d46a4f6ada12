"""The general rules within networks: rows stay apart, and what changes from step to step is noticed."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, jacobian_agreement, mlp, parameters, perturb, rand, relative
from torch import nn

import pgdfast
from pgdfast.linear import Linearizer

X = rand(6, 3, seed=21)
IDS = torch.tensor([2, 0, 0, 3])


def with_column(z):
    """A tensor written column by column."""
    y = torch.zeros_like(z)
    y[:, 1:] = z[:, :3]
    y[:, 0] = z[:, 0] * z[:, 1]
    return y


ROWS = {   # functions of a network's outputs (6, 4) that leave rows apart
    "pointwise": lambda z: torch.atan2(z[:, 0], 2 + z[:, 1]),
    "prelu": lambda z: F.prelu(z, torch.full((4,), 0.2, dtype=z.dtype)),
    "flip": lambda z: z.flip(1) * z,
    "roll": lambda z: z.roll(1, 1) - z,
    "pad": lambda z: F.pad(z, (1, 2)),
    "reflect": lambda z: F.pad(z, (1, 2), mode="reflect"),
    "unfold": lambda z: z.unfold(1, 2, 1)[..., 0] * z.unfold(1, 2, 1)[..., 1],
    "max_pool": lambda z: F.max_pool1d(z, 2),
    "median": lambda z: z.median(1)[0],
    "setitem": with_column,
    "scatter": lambda z: z.scatter_add(1, IDS.expand(6, 4), z * z),
    "index_add": lambda z: torch.zeros_like(z).index_add(1, IDS, z),
    "cat": lambda z: torch.cat([X[:, :1], z, X], 1),
    "strides": lambda z: z.as_strided((6, 2), (4, 1), 1),
    "norm": lambda z: z / torch.linalg.vector_norm(z, dim=1, keepdim=True),
    "quaternions": lambda z: F.normalize(z, dim=1),
    "cosine": lambda z: F.cosine_similarity(z, X.new_ones(4), dim=1),
    "cross": lambda z: torch.linalg.cross(z[:, :3], X, dim=1),
    "running sums": lambda z: z.cumsum(1) * z.cumprod(1),
    "logcumsumexp": lambda z: z.logcumsumexp(1),
    "variance": lambda z: z.var(1) + z.std(1) + z.prod(1),
    "inverse": lambda z: torch.linalg.inv(z.view(6, 2, 2) + 4 * torch.eye(2, dtype=z.dtype)),
    "determinant": lambda z: torch.linalg.det(z.view(6, 2, 2)),
    "solution": lambda z: torch.linalg.solve(z.view(6, 2, 2) + 4 * torch.eye(2, dtype=z.dtype), X[:, :2]),
    "centres": lambda z: torch.exp(-torch.cdist(z, rand(5, 4, seed=2)) ** 2),
    "interpolation": lambda z: F.interpolate(z[:, None], size=7, mode="linear", align_corners=True),
    "sampling": lambda z: F.grid_sample(
        rand(1, 2, 5, 5, seed=3).expand(6, 2, 5, 5), z.view(6, 2, 1, 2).tanh(), align_corners=False),
    "bilinear": lambda z: F.bilinear(z, X, rand(2, 4, 3, seed=3)),
    "sparse": lambda z: torch.sparse.mm(torch.diag(X[:, 0]).to_sparse(), z),
    "cross-entropy": lambda z: F.cross_entropy(z, torch.arange(6) % 4, reduction="none"),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_stay_apart(name):
    model = mlp(3, 5, 4)
    params = list(model.parameters())
    linearizer = Linearizer(params)
    for visit in range(3):
        closure = lambda: ROWS[name](model(X))  # noqa: E731
        layout = linearizer(closure).row_layout()
        assert layout is not None and layout.num_rows >= 6
        assert jacobian_agreement(linearizer, closure, params, seed=visit) < 1e-12
        perturb(params, seed=visit)


CHANGING = {   # functions of parameters (3, 4) and (4,), and of the number of a step
    "sizes in cat": lambda a, c, k: torch.cat([X[:3, : 1 + k % 2], a, X[:3, : 2 - k % 2]], 1),
    "index_add": lambda a, c, k: torch.tanh(a).index_add(1, (IDS + k) % 4, a),
    "how often": lambda a, c, k: torch.tanh(a).index_add(1, IDS.clamp_max(k % 3), a),
    "mask": lambda a, c, k: a.masked_scatter(X[:3, :1] + X[:3, 1:2].roll(k, 0) > 0, torch.tanh(a)),
    "index_put": lambda a, c, k: torch.tanh(a).index_put((torch.tensor([k % 3]),), c),
    "setitem": lambda a, c, k: written(2.0 * a, k, c),
    "pointwise": lambda a, c, k: torch.fmod(a, 0.3 + 0.1 * k) + torch.lerp(a, c, 0.1 * k),
    "layout": lambda a, c, k: torch.hypot(a, rand(4, 3, seed=k).T if k % 2 else rand(3, 4, seed=k)),
    "shift": lambda a, c, k: torch.tanh(a).roll(k % 3, 1),
    "strides": lambda a, c, k: torch.tanh(a).as_strided((2, 3), (4, 1), k % 2),
}


def written(y, k, values):
    """Y with a row written in place."""
    y[k % 3] = values
    return y


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHANGING)
def test_what_changes_is_noticed(name, backend):
    a, c = parameters((3, 4), (4,))
    linearizer = Linearizer([a, c], backend)
    for step in range(8):
        assert jacobian_agreement(linearizer, lambda: CHANGING[name](a, c, step), [a, c], seed=step) < 1e-12  # noqa: B023
        perturb([a, c], seed=step)


def test_single_precision_in_place():
    model = mlp(3, 5, 4, dtype=torch.float32)
    params, x = list(model.parameters()), X.float()
    assert jacobian_agreement(Linearizer(params), lambda: with_column(model(x)), params) < 1e-5


def test_activations_in_a_network():
    layers = [nn.Hardswish(), nn.PReLU(), nn.Softshrink(0.1), nn.RReLU(0.1, 0.1), nn.Hardtanh()]
    for act in layers:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), act, nn.Linear(5, 2)).double()
        params = list(model.parameters())
        linearizer = Linearizer(params)
        for visit in range(2):
            lin = linearizer(lambda: model(X))  # noqa: B023
            assert lin.row_layout() is not None
            assert jacobian_agreement(linearizer, lambda: model(X), params, seed=visit) < 1e-12  # noqa: B023
            perturb(params, seed=visit)


def test_rows_of_a_spectral_layer():
    """Samples stay apart, though the complex weights are every other number of a parameter."""
    weights, = parameters((4, 4, 3, 2))
    x = rand(5, 4, 8, seed=2)

    def closure():
        modes = torch.fft.rfft(x)
        out = torch.zeros(5, 4, 5, dtype=torch.complex128)
        out[:, :, :3] = torch.einsum("bim,iom->bom", modes[:, :, :3], torch.view_as_complex(weights))
        return torch.tanh(torch.fft.irfft(out, n=8)).flatten(1)

    linearizer = Linearizer([weights])
    for visit in range(3):
        assert linearizer(closure).row_layout().num_rows == 5
        assert jacobian_agreement(linearizer, closure, [weights], seed=visit) < 1e-12
        perturb([weights], seed=visit)


@pytest.mark.filterwarnings("ignore:pgdfast. no tape rule")
@pytest.mark.parametrize(("why", "closure"), [
    ("more than 64 MB", lambda a: torch.linalg.matrix_exp(a)[0]),
    ("a few places", lambda a: torch.zeros(9000, dtype=a.dtype).index_add(
        0, torch.zeros(3600, dtype=torch.long), a.view(-1))[:1]),
    ("complex factor", lambda a: (1j * torch.add(torch.complex(a, a), torch.complex(a, a), alpha=2j)).abs()[0]),
])
def test_what_is_too_much_for_a_rule_is_said(why, closure):
    a = (0.01 * rand(60, 60)).requires_grad_()
    lin = pgdfast.linearize(lambda: closure(a), [a])
    assert why in lin.sync_reason
    u = rand(lin.num_residuals, seed=1)
    assert relative(lin.vjp(u), torch.autograd.grad(closure(a), a, u)[0].reshape(-1)) < 1e-12


class Mark:
    """Something that weak references may point to."""


def test_rules_that_call_a_backward_let_go_of_the_tape():
    a, c = parameters((3, 4), (4,))
    seen = []

    def closure():
        y = 2.0 * a
        y.grad_fn.metadata["mark"] = mark = Mark()   # lives as long as the node
        seen.append(weakref.ref(mark))
        z = torch.atan2(y, c).roll(1, 0)
        z[0] = c
        return torch.linalg.vector_norm(z.index_add(1, IDS, z), dim=1)

    optimizer = pgdfast.LM([a, c])
    for _ in range(5):
        optimizer.step(closure)
    gc.collect()
    assert [ref() for ref in seen[:-1]] == [None] * (len(seen) - 1)
