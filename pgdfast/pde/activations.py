"""Activations with three derivatives, by their numbers in the core."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

# Numbered as Activation in csrc/cpu/jet.h.
KINDS = ("identity", "tanh", "sigmoid", "sin", "cos", "exp", "square", "relu", "softplus", "silu", "gelu")


def derivatives(kind: str, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(g, g', g'') at z, differentiable."""
    return _DERIVATIVES[kind](z)


def _tanh(z):
    y = torch.tanh(z)
    slope = 1 - y * y
    return y, slope, -2 * y * slope


def _sigmoid(z):
    y = torch.sigmoid(z)
    slope = y * (1 - y)
    return y, slope, slope * (1 - 2 * y)


def _sin(z):
    y = torch.sin(z)
    return y, torch.cos(z), -y


def _cos(z):
    y = torch.cos(z)
    return y, -torch.sin(z), -y


def _exp(z):
    y = torch.exp(z)
    return y, y, y


def _square(z):
    return z * z, 2 * z, torch.full_like(z, 2)


def _relu(z):
    return torch.relu(z), (z > 0).to(z.dtype), torch.zeros_like(z)


def _softplus(z):
    linear, s = z > 20, torch.sigmoid(z)   # F.softplus's threshold
    return F.softplus(z), torch.where(linear, 1.0, s).to(z.dtype), torch.where(linear, 0.0, s * (1 - s)).to(z.dtype)


def _silu(z):
    s = torch.sigmoid(z)
    slope = s * (1 - s)
    return z * s, s + z * slope, slope * (2 + z * (1 - 2 * s))


def _gelu(z):
    cumulative = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return z * cumulative, cumulative + z * density, density * (2 - z * z)


_DERIVATIVES = {
    "tanh": _tanh, "sigmoid": _sigmoid, "sin": _sin, "cos": _cos, "exp": _exp, "square": _square, "relu": _relu,
    "softplus": _softplus, "silu": _silu, "gelu": _gelu,
}
