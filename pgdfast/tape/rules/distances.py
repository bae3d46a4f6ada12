"""Distances between points: reductions over pairs of rows."""

from __future__ import annotations

import math

import torch

from ..program import UnsupportedStructure
from .local import MOST_BYTES
from .selection import kept
from .table import rule


def _slope(difference: torch.Tensor, distance: torch.Tensor, p: float) -> torch.Tensor:
    """D distance / d difference of the p-norm along the last dimension, with autograd's choices at 0."""
    distance = distance.unsqueeze(-1)
    if difference.numel() * difference.element_size() > MOST_BYTES:
        raise UnsupportedStructure(f"distances whose derivatives take more than {MOST_BYTES >> 20} MB")
    if p == 0:
        return torch.zeros_like(difference)
    if p == 1:
        return difference.sign()
    if math.isinf(p):
        return difference.sign() * (difference.abs() == distance)
    slope = difference.sign() * (difference.abs() / distance) ** (p - 1)
    return slope.masked_fill((distance == 0) | (difference == 0) if p < 2 else distance == 0, 0.0)


def _between(op, x1, x2, distance, p):
    slope = _slope(x1.unsqueeze(-2) - x2.unsqueeze(-3), distance, p)
    shape = slope.shape
    if op.needs[0]:
        op.view(0, lambda x: x.unsqueeze(-2).expand(shape), out="first")
        op.sum("first", (-1,), False, c=slope)
    if op.needs[1]:
        op.view(1, lambda x: x.unsqueeze(-3).expand(shape), out="second")
        op.sum("second", (-1,), False, c=slope, alpha=-1)


@rule("CdistBackward0", saved="p result x1 x2")
def cdist(op, p, distance, x1, x2):
    _between(op, x1, x2, distance, p)


@rule("EuclideanDistBackward0", saved="result x1 x2")
def euclidean_distance(op, distance, x1, x2):
    _between(op, x1, x2, distance, 2.0)


@rule("PdistBackward0", saved="p result self")
def pdist(op, p, distance, x):
    i, j = kept(_pairs, None, len(x), x.device, ())
    slope = _slope(x[i] - x[j], distance, p)
    for name, rows, sign in (("first", i, 1), ("second", j, -1)):
        op.temporary(name, slope.shape)
        op.gather(0, rows, 1, out=name, fixed=True)
        op.sum(name, (1,), False, c=slope, alpha=sign)


def _pairs(_, count, device, values) -> tuple[torch.Tensor, torch.Tensor]:
    i, j = torch.triu_indices(count, count, 1, device=device)
    return i, j
