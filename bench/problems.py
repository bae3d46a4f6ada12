"""The problems that are timed: plain networks, float32, full batch, F.mse_loss."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Problem:
    """A network of fully connected layers and a batch for it; every call makes the same numbers anew.

    Index legend: N samples, O outputs, M = N O residuals, P parameters.
    """

    name: str
    widths: tuple[int, ...]
    activation: type[nn.Module]
    samples: int
    damping: float

    def model(self):
        generator = torch.Generator().manual_seed(1)
        layers = []
        for d_in, d_out in zip(self.widths, self.widths[1:], strict=False):
            layers += [nn.Linear(d_in, d_out), self.activation()]
        model = nn.Sequential(*layers[:-1])
        with torch.no_grad():
            for layer in model:
                if isinstance(layer, nn.Linear):
                    bound = layer.in_features**-0.5
                    layer.weight.uniform_(-bound, bound, generator=generator)
                    layer.bias.uniform_(-bound, bound, generator=generator)
        return model

    def data(self):
        """Inputs (N, d), uniform on [-1, 1], and targets (N, O), a wave of the first input plus noise."""
        generator = torch.Generator().manual_seed(2)
        x = 2 * torch.rand(self.samples, self.widths[0], generator=generator) - 1
        noise = torch.randn(self.samples, self.widths[-1], generator=generator)
        return x, torch.sin(3 * x[:, :1]) + 0.1 * noise

    def closure(self, model):
        x, y = self.data()
        return lambda: F.mse_loss(model(x), y)

    @property
    def residuals(self):
        return self.samples * self.widths[-1]

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
    def dual_flops(self):
        return self.gram_flops + self.residuals**3 / 3 + self.sweep_flops


A = Problem("A", (1, 80, 80, 1), nn.Tanh, 100, 1e-2)
B = Problem("B", (2, 80, 80, 1), nn.Tanh, 400, 1e-2)
DIGITS = Problem("784-250-10", (784, 250, 10), nn.ReLU, 200, 1e-2)
