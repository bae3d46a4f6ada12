"""The problems that are timed: the paper's sizes, float32, full batch. Every call makes the same numbers anew.

Index legend: N samples, O outputs, M residuals, P parameters.
"""

import math
import os
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from pgdfast_experiments import mnist_data, modular_mlp, polynomial, transformer
from pgdfast_experiments.models import relu_mlp, tanh_mlp
from pgdfast_experiments.poisson_pinn import exact, points


def as_loss(result):
    """The scalar that a first-order optimizer descends: the closure's own, or half the sum of its squared residuals."""
    if isinstance(result, torch.Tensor):
        return result if result.dim() == 0 else 0.5 * result.square().sum()
    return sum(0.5 * part.square().sum() for part in result)


@dataclass(frozen=True)
class Problem:
    """A network of fully connected layers, its closure and how its step is solved."""

    name: str
    what: str
    widths: tuple[int, ...]
    samples: int
    damping: float
    solver: str = "dual"
    biases: bool = True
    mean: bool = True       # the closure returns the mean squared error; else the residuals
    entropy: bool = False   # it returns a cross-entropy
    products: bool = True   # the layers' products are those of plain matrices: operations and GEMMs are counted
    reference: bool = True  # small enough for explicit float64 Jacobians

    def model(self, dtype=torch.float32):
        raise NotImplementedError

    def data(self, dtype=torch.float32):
        """Inputs and targets."""
        raise NotImplementedError

    def closure(self, model):
        x, y = self.data(next(model.parameters()).dtype)
        return (lambda: functional.mse_loss(model(x), y)) if self.mean else (lambda: model(x) - y)

    @property
    def residuals(self):
        return self.samples * self.widths[-1]

    @property
    def parameters(self):
        return sum(self._weights) + self.biases * sum(self.widths[1:])

    @property
    def scale(self):
        """The residuals of the closure are `scale` times model(x) - y."""
        return math.sqrt(2 / self.residuals) if self.mean else 1.0

    @property
    def described(self):
        return self.what

    @property
    def activations(self):
        """Numbers in the inputs and outputs of all layers."""
        return self.samples * sum(self.widths)

    # Operations (a multiply-add is two) that each product needs; elementwise work and biases are not counted.

    @property
    def _weights(self):
        return [d_in * d_out for d_in, d_out in zip(self.widths, self.widths[1:], strict=False)]

    @property
    def propagation_flops(self):
        """Tangents or cotangents through every layer but the first."""
        return 2 * self.samples * sum(self._weights[1:])

    @property
    def sweep_flops(self):
        """J v or J^T u: the propagation and one product with every weight's tangent or for its gradient."""
        return self.propagation_flops + 2 * self.samples * sum(self._weights)

    @property
    def gram_flops(self):
        """J J^T, one half, from the factors of each layer: O sweeps of unit cotangents, then M^2 (d_in + d_out)."""
        factors = sum(d_in + d_out for d_in, d_out in zip(self.widths, self.widths[1:], strict=False))
        return self.widths[-1] * self.propagation_flops + self.residuals**2 * factors

    @property
    def order(self):
        """Of the matrix that an exact step factors."""
        return self.residuals if self.solver == "dual" else self.parameters

    @property
    def cholesky_flops(self):
        return self.order**3 / 3

    @property
    def step_flops(self):
        """The dual step from the layers' factors; of the primal one its Cholesky alone."""
        return self.cholesky_flops + (self.gram_flops + self.sweep_flops if self.solver == "dual" else 0)

    def sweep_shapes(self):
        """(m, k, n) of every matrix product in J v, then of those in J^T u."""
        pairs = list(enumerate(zip(self.widths, self.widths[1:], strict=False)))
        forward = [s for k, (i, o) in pairs for s in [(self.samples, i, o)] * (1 if k == 0 else 2)]
        backward = [s for k, (i, o) in pairs for s in [(o, self.samples, i), (self.samples, o, i)][: 1 if k == 0 else 2]]
        return forward + backward

    def gram_shape(self):
        """(M, K) of the widest factor Y of the Gram matrix, whose Y Y^T leads its cost; None where it is of width 1."""
        return (self.residuals, self.widths[-2]) if self.widths[-1] > 1 else (self.residuals, max(self.widths[1:-1]))


class Regression(Problem):
    """A tanh network with PyTorch's initial weights, fitted to a wave of its first input plus noise."""

    def model(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        model = tanh_mlp(self.widths[0], self.widths[1], len(self.widths) - 2, self.widths[-1], 1, dtype)
        with torch.no_grad():
            for layer in model:
                if isinstance(layer, nn.Linear):
                    for p in (layer.weight, layer.bias):   # drawn in float32: the same numbers in either precision
                        bound = layer.in_features**-0.5
                        p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))
        return model

    def data(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(2)
        x = 2 * torch.rand(self.samples, self.widths[0], generator=generator) - 1
        noise = torch.randn(self.samples, self.widths[-1], generator=generator)
        return x.to(dtype), (torch.sin(3 * x[:, :1]) + 0.1 * noise).to(dtype)


class Poisson(Problem):
    """-Lap u = f on the unit square: 640 interior and 40 boundary points, residuals by nested autograd."""

    def model(self, dtype=torch.float32):
        return tanh_mlp(2, 256, 1, 1, 1, torch.float32).to(dtype)

    def data(self, dtype=torch.float32):
        """Interior points (640, 2), boundary points (40, 2), and f (640, 1)."""
        interior, boundary = points(1, torch.float32)
        interior, boundary = interior.to(dtype), boundary.to(dtype)
        return interior, boundary, 2 * math.pi**2 * exact(interior, 1)

    def closure(self, model):
        interior, boundary, f = self.data(next(model.parameters()).dtype)
        x = interior.clone().requires_grad_()

        def residuals():
            slope = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
            laplacian = sum(
                torch.autograd.grad(slope[:, d].sum(), x, create_graph=True)[0][:, d:d + 1] for d in range(2))
            return laplacian + f, model(boundary)

        return residuals


class Modular(Problem):
    """a + b mod 23 by f = W2 (W1 x)^2 / 100 on 90 % of all pairs."""

    def model(self, dtype=torch.float32):
        return modular_mlp.QuadraticNetwork(23, 100, 1.0, 1, torch.float32).to(dtype)

    def data(self, dtype=torch.float32):
        (x, y), _ = modular_mlp.data(1, dtype=dtype)
        return x, y


class Polynomial(Problem):
    """f = mean of phi(w_i . x) with phi(h) = h + h^2 / 8: only the 500 x 100 weights are trained."""

    def model(self, dtype=torch.float32):
        return polynomial.PolynomialNetwork(1.0, 0.25, 1, torch.float32).to(dtype)

    def data(self, dtype=torch.float32):
        (x, y), _, _ = polynomial.data(1, torch.float32)
        return x.to(dtype), y.to(dtype)

    # The 500 outputs of the one layer are averaged: M = N, and no tangent passes a second weight.

    @property
    def residuals(self):
        return self.samples

    @property
    def gram_flops(self):
        return self.residuals**2 * sum(self.widths)

    def gram_shape(self):
        return self.residuals, self.widths[1]


class Transformer(Problem):
    """a + b mod 97 by two decoder layers, d = 128, 4 heads; cross-entropy over a batch of 512."""

    def model(self, dtype=torch.float32):
        return transformer.Transformer(99, 128, 4, 2, 4, 1, torch.float32).to(dtype)

    def data(self, dtype=torch.float32):
        (tokens, answers), _ = transformer.data(1)
        return tokens[:512], answers[:512]

    def closure(self, model):
        tokens, answers = self.data()
        return lambda: functional.cross_entropy(model(tokens), answers)

    @property
    def parameters(self):
        return sum(p.numel() for p in self.model().parameters())


class Digits(Problem):
    """Digits by a ReLU network with Glorot weights: real ones where PGDFAST_DATA names them, else random pixels."""

    def model(self, dtype=torch.float32):
        return relu_mlp(self.widths, 1.0, 1, torch.float32).to(dtype)

    @property
    def described(self):
        return f"{self.what}, {'real digits' if os.environ.get('PGDFAST_DATA') else 'random pixels'}"

    def data(self, dtype=torch.float32):
        if os.environ.get("PGDFAST_DATA"):
            digits = mnist_data.train_and_test(None, 1000, 0)
            x, labels = digits.train_images[: self.samples], digits.train_labels[: self.samples]
        else:
            generator = torch.Generator().manual_seed(2)
            x = torch.rand(self.samples, self.widths[0], generator=generator)
            labels = torch.randint(10, (self.samples,), generator=generator)
        return x.to(dtype), functional.one_hot(labels, 10).to(dtype)


A = Regression("A", "tanh 1-80-80-1", (1, 80, 80, 1), 100, 1e-2)
B = Regression("B", "tanh 2-80-80-1", (2, 80, 80, 1), 400, 1e-2)
C = Poisson("C", "PINN, tanh 2-256-1, nested autograd", (2, 256, 1), 680, 1e-1, mean=False, products=False)
D = Modular("D", "modular addition, quadratic 46-100-23", (46, 100, 23), 476, 1e-1, "primal", biases=False, mean=False,
            reference=False)
E = Polynomial("E", "polynomial 100-500, fixed readout", (100, 500), 550, 1e-3, biases=False, mean=False)
F = Transformer("F", "transformer, 2 layers, d = 128, batch 512, cross-entropy", (128, 97), 512, 1.0, "cg",
                entropy=True, products=False, reference=False)
G = Digits("G", "ReLU 784-250-10", (784, 250, 10), 200, 1e-2, reference=False)
PROBLEMS = {problem.name: problem for problem in (A, B, C, D, E, F, G)}
