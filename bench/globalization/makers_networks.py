"""The experiments' tasks A to G, and a classifier.

Each function takes the seed and returns (module, closure, None).
"""

import math

import torch
import torch.nn.functional as F

from pgdfast_experiments import modular_mlp, poisson_pinn, polynomial, regression_1d, regression_2d, transformer
from pgdfast_experiments.models import relu_mlp, tanh_mlp


def waves_1d(seed):
    model, (x, u) = tanh_mlp(1, 80, 2, 1, seed), regression_1d.data()
    return model, lambda: model(x) - u, None


def waves_2d(seed):
    model, (x, u) = tanh_mlp(2, 80, 2, 1, seed), regression_2d.data()
    return model, lambda: model(x) - u, None


def pinn(seed):
    model, (interior, boundary) = tanh_mlp(2, poisson_pinn.WIDTH, 1, 1, seed), poisson_pinn.points(seed)
    return model, lambda: poisson_pinn.residuals(model, interior, boundary, 2.0), None


def modular(seed, modulus=13, width=50):
    model, ((x, y), _) = modular_mlp.QuadraticNetwork(modulus, width, 1.0, seed, torch.float64), modular_mlp.data(seed, modulus)
    return model, lambda: model(x) - y, None


def nearly_linear(seed):
    model, ((x, y), _, _) = polynomial.PolynomialNetwork(1.0, 0.25, seed, torch.float64), polynomial.data(seed)
    return model, lambda: model(x) - y, None


def attention(seed, modulus=11, width=16):
    model = transformer.Transformer(modulus + 2, width, 4, 2, 4, seed, torch.float32)
    (tokens, answers), _ = transformer.data(seed, modulus)
    return model, lambda: F.cross_entropy(model(tokens), answers), None


def pixels(seed):
    """Random images with random labels: no download, and the same numbers everywhere."""
    model, generator = relu_mlp((784, 250, 10), 1.0, seed), torch.Generator().manual_seed(seed)
    x, labels = torch.rand(200, 784, generator=generator), torch.randint(10, (200,), generator=generator)
    targets = F.one_hot(labels, 10).to(x.dtype)
    return model, lambda: F.mse_loss(model(x), targets), None


def spirals(seed, count=150):
    """Two spirals of one and a half turns, told apart by a cross-entropy."""
    model, generator = tanh_mlp(2, 20, 2, 2, seed), torch.Generator().manual_seed(100)
    angle = torch.linspace(0.25, 1.0, count, dtype=torch.float64) * 3 * math.pi
    arm = torch.stack([angle * torch.cos(angle), angle * torch.sin(angle)], dim=1) / (3 * math.pi)
    x = torch.cat([arm, -arm])
    x = x + 0.01 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    labels = torch.arange(2).repeat_interleave(count)
    return model, lambda: F.cross_entropy(model(x), labels), None
