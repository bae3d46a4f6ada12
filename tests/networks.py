"""Networks of every kind that Taylor mode has rules for."""

import math

import torch
import torch.nn.functional as F
from helpers import mlp, rand
from torch import nn


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(3.0 * x)


class Square(nn.Module):
    def forward(self, x):
        return x**2


class Exp(nn.Module):
    def forward(self, x):
        return torch.exp(0.5 * x)


class Cos(nn.Module):
    def forward(self, x):
        return x.cos()


ACTIVATIONS = {
    "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "silu": nn.SiLU, "gelu": nn.GELU, "softplus": nn.Softplus, "relu": nn.ReLU,
    "sine": Sine, "cosine": Cos, "square": Square, "exp": Exp,
}


class Residual(nn.Module):
    """Skip connections, a gate, and weights that are used twice."""

    def __init__(self, inputs=2, outputs=1, width=7):
        super().__init__()
        self.first, self.again, self.gate = (nn.Linear(n, width) for n in (inputs, width, inputs))
        self.last = nn.Linear(width, outputs, bias=False)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = h + F.silu(self.again(h))
        z = torch.sigmoid(self.gate(x))
        h = h * z + (1 - z) * torch.tanh(self.again(h))
        return self.last(h) / 2


class Fourier(nn.Module):
    """Random Fourier features, hard boundary values, a learnable slope."""

    def __init__(self, inputs=2, outputs=1, width=6):
        super().__init__()
        self.register_buffer("frequencies", rand(inputs, width, seed=5))
        self.slope = nn.Parameter(torch.tensor(1.3))
        self.hidden, self.last = nn.Linear(2 * width, 5), nn.Linear(5, outputs)

    def forward(self, x):
        angle = 2 * math.pi * x @ self.frequencies
        features = torch.cat([angle.sin(), torch.cos(angle)], dim=-1)
        u = self.last(torch.tanh(self.slope * self.hidden(features)))
        return x[:, :1] * (1 - x[..., :1]) * u + x[:, [1]] ** 3 - 0.5


class Columns(nn.Module):
    """Coordinates by name, one dimension, and pieces put together again."""

    def __init__(self, outputs=2, width=4):
        super().__init__()
        self.a, self.b = nn.Linear(1, width), nn.Linear(1, width)
        self.last = nn.Linear(2 * width, outputs)

    def forward(self, x):
        t, y = x[:, 0], x[:, 1]
        wave = torch.exp(-t) * torch.sin(2 * y)
        first, second = x.unbind(1)
        h = torch.cat([self.a(first.unsqueeze(1)).tanh(), torch.tanh(self.b(second[:, None]))], 1)
        left, right = h.chunk(2, dim=-1)
        h = torch.cat([left - right, left + 0.1 * right], 1)
        return self.last(h) + wave.unsqueeze(-1) - 2.0


class Odds(nn.Module):
    """A product read before and behind its activation, constants among the columns, arguments by name."""

    def __init__(self, outputs=1, width=5):
        super().__init__()
        self.first, self.middle = nn.Linear(2, width), nn.Linear(width + 2, width)
        self.last = nn.Linear(2 * width, outputs)

    def forward(self, x):
        z = self.first(x)
        h = z + torch.tanh(z)
        h = torch.cat(tensors=[h, torch.cat([torch.ones_like(x[:, :1]), 0.5 * x[:, 1:]], 1)], dim=1)
        h = torch.hstack([torch.sin(2 * self.middle(h)), self.middle(h) ** 2])
        return self.last(h / 3).sub(0.25)


def build(name, outputs=1, dtype=torch.float64, inputs=2):
    """A network by name, with weights of its own seed."""
    before = torch.get_default_dtype(), torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(len(name))
    try:
        if name in ACTIVATIONS:
            return mlp(inputs, 9, 6, outputs, activation=ACTIVATIONS[name]).to(dtype)
        return {"residual": Residual, "fourier": Fourier, "columns": Columns, "odds": Odds}[name](outputs=outputs).to(dtype)
    finally:
        torch.set_default_dtype(before[0])
        torch.set_rng_state(before[1])


NAMES = (*ACTIVATIONS, "residual", "fourier", "columns", "odds")
