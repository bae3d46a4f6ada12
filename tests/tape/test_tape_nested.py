"""Kinks, and residuals of differential equations by nested autograd.grad(create_graph=True)."""

import pytest
import torch
import torch.nn.functional as F
from helpers import ACTIVATIONS, gradient, jacobian_agreement, parameters, perturb, rand

from pgdfast.linear import Linearizer

KINKS = {
    "relu": torch.relu,
    "abs": torch.abs,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "celu": F.celu,
    "hardtanh": F.hardtanh,
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp min": lambda x: x.clamp(min=0),
    "clamp max": lambda x: torch.clamp_max(x, 0),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "minimum": lambda x: torch.minimum(torch.zeros_like(x), x),
    "square": lambda x: x**2,
    "cube": lambda x: x**3,
    "first power": lambda x: x**1,
    "no power": lambda x: x**0,
    "power of tensor": lambda x: x ** torch.tensor([0.0, 1.0, 2.0, 3.0, 2.0], dtype=torch.float64),
    "zero to a power": lambda x: torch.tensor(0.0, dtype=torch.float64) ** (x + 2),
    "number zero to a power": lambda x: 0.0 ** (x + 2),
    "softplus": lambda x: F.softplus(x, threshold=1.0),
}


@pytest.mark.parametrize("name", KINKS)
def test_kinks_and_zeros_are_taken_as_autograd_takes_them(name):
    x = torch.tensor([-1.0, -0.0, 0.0, 1.0, 0.5], dtype=torch.float64, requires_grad=True)
    assert jacobian_agreement(Linearizer([x]), lambda: KINKS[name](x), [x]) < 1e-12


def poisson(act, w1, b1, w2, order):
    """Interior: the Laplacian, or its gradient; boundary: the value."""
    x = rand(7, 2, seed=3).requires_grad_()
    u = F.linear(act(F.linear(x, w1, b1)), w2)
    slopes = gradient(u, x)
    laplacian = sum(gradient(slopes[:, d], x)[:, d] for d in range(2))
    interior = laplacian - torch.sin(x[:, 0]) if order == 2 else gradient(laplacian, x)
    edge = rand(5, 2, seed=4)
    edge[:, 0] = 1.0
    boundary = F.linear(act(F.linear(edge, w1, b1)), w2).squeeze(1)
    return interior, 10 * boundary


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_poisson_residual_by_nested_derivatives(name, order):
    params = parameters((6, 2), (6,), (1, 6))

    def closure():
        return poisson(ACTIVATIONS[name], *params, order)

    linearizer = Linearizer(params)
    for visit in range(2):
        assert jacobian_agreement(linearizer, closure, params, seed=visit) < 1e-12
        perturb(params, seed=visit)


@pytest.mark.parametrize("name", ["tanh", "gelu", "elu", "softplus", "sin", "silu"])
def test_poisson_loss_of_a_deeper_network(name):
    params = parameters((5, 2), (5,), (4, 5), (4,), (1, 4))

    def net(x):
        w1, b1, w2, b2, w3 = params
        act = ACTIVATIONS[name]
        return F.linear(act(F.linear(act(F.linear(x, w1, b1)), w2, b2)), w3)

    def closure():
        x = rand(6, 2, seed=3).requires_grad_()
        slopes = gradient(net(x), x)
        laplacian = sum(gradient(slopes[:, d], x)[:, d] for d in range(2))
        return laplacian, net(rand(4, 2, seed=5))

    assert jacobian_agreement(Linearizer(params), closure, params) < 1e-12
