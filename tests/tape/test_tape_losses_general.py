"""Losses of other forms than squares and cross-entropies by name, against explicit output Hessians and the reference."""

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, agreement, mlp, perturb, rand, relative
from losses import CONVEX, LABELS, LOSSES, MONOTONE, REWEIGHTED, ROBUST, SQUARES, D, K, N, X, Y
from torch.func import functional_call, jacrev

import pgdfast
from pgdfast import LM
from pgdfast.linear import Linearizer


def network(dtype=torch.float64):
    model = mlp(D, 5, K, dtype=dtype)
    return model, list(model.parameters())


def output_jacobian(model):
    """dz/dtheta by torch.func, (N K, P)."""
    found = jacrev(lambda p: functional_call(model, p, (X,)))(dict(model.named_parameters()))
    return torch.cat([j.reshape(N * K, -1) for j in found.values()], 1).detach()


def hessian(loss, z):
    return torch.autograd.functional.hessian(loss, z).reshape(N * K, N * K)


def expected(name, model):
    """J^T H J with the output Hessian that the loss is documented to take."""
    z, J = model(X).detach(), output_jacobian(model)
    if name in MONOTONE:
        _, inner, slope = MONOTONE[name]
        H = slope(inner(z)) * hessian(inner, z)
    elif name in SQUARES or name in CONVEX:
        H = hessian(LOSSES[name], z)
    else:
        h = hessian(LOSSES[name], z).diagonal()
        slope = torch.autograd.functional.jacobian(LOSSES[name], z).reshape(-1)
        ratio = slope / (z - Y).reshape(-1)
        H = torch.where(h > 1e-3 * ratio, h, ratio).diag()
    return J.T @ H @ J


def gradient(loss, params):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, params)])


@pytest.mark.parametrize("name", [n for group in (SQUARES, CONVEX, REWEIGHTED, ROBUST, MONOTONE) for n in group])
def test_gauss_newton_matrix(name):
    model, params = network()
    linearizer = Linearizer(params)
    for visit in range(3):
        lin = linearizer(lambda: LOSSES[name](model(X)))
        J = lin.dense()
        assert relative(J.T @ J, expected(name, model)) < 1e-10
        assert lin.has_squares_only == (name in SQUARES)
        perturb(params, seed=visit)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_form_agrees_with_the_reference(name, backend):
    model, params = network()
    linearizer = Linearizer(params, backend)
    for visit in range(3):
        assert agreement(linearizer, lambda: LOSSES[name](model(X)), params, seed=visit) < 1e-10
        perturb(params, seed=visit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_that_of_autograd(name, dtype):
    model, params = network(dtype)
    loss = lambda: LOSSES[name](model(X.to(dtype)).double())  # noqa: E731
    linearizer = Linearizer(params)
    for visit in range(3):
        lin = linearizer(loss)
        assert relative(lin.gradient(), gradient(loss(), params)) < 50 * torch.finfo(dtype).eps
        assert relative(lin.loss, loss()) < 10 * torch.finfo(dtype).eps
        perturb(params, seed=visit)


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in ("huber by hand", "learned variance")])
def test_losses_in_single_precision(name):
    """All of it in float32, the loss's own operations too."""
    model, params = network()
    single = mlp(D, 5, K, dtype=torch.float32)
    data = Y.float()
    loss = {
        "huber": lambda z, y: F.huber_loss(z, y), "cauchy": lambda z, y: torch.log1p((z - y).square()).mean(),
        "rmse": lambda z, y: F.mse_loss(z, y).sqrt(), "l1": lambda z, y: (z - y).abs().mean(),
        "softplus": lambda z, y: (F.softplus(z) - y.sigmoid() * z).mean(), "inner": lambda z, y: ((z - y) * (z - y)).sum(),
        "logsumexp": lambda z, y: (torch.logsumexp(z, 1) - z[torch.arange(N), LABELS]).mean(),
    }.get(name)
    if loss is None:
        pytest.skip("one of each kind")
    wide = pgdfast.linearize(lambda: loss(model(X), Y), params)
    lin = pgdfast.linearize(lambda: loss(single(X.float()), data), list(single.parameters()))
    v = rand(lin.num_parameters)
    assert lin.dtype == torch.float32
    assert relative(lin.gradient(), wide.gradient()) < 1e-5 and relative(lin.ggn(v.float()), wide.ggn(v)) < 1e-4


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", LOSSES)
def test_steps_go_downhill(name, backend):
    model, params = network()
    opt = LM(params, backend=backend)
    losses = [float(opt.step(lambda: LOSSES[name](model(X)))) for _ in range(6)]
    assert all(b <= a for a, b in zip(losses, losses[1:], strict=False)) and losses[-1] < losses[0]


@pytest.mark.parametrize("name", LOSSES)
def test_gain_ratio_tends_to_one(name):
    model, params = network()
    opt = LM(params, damping=1e6, damping_rule="gain-ratio")
    opt.step(lambda: LOSSES[name](model(X)))
    assert opt.report.status == "accepted" and abs(opt.report.gain_ratio - 1) < 1e-3
