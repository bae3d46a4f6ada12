"""Scales that are learned beside a loss: variances, and weights of terms, as in L / s + log s or exp(-s) L + s.

A product of a loss and a scale has the loss's blocks, weighted by the scale, and a block for the scale; what couples the two is
left out, as in Fisher's matrix. Along the scale's logarithm u the function is a u + b exp(-u), with the gradient a - b exp(-u)
and the curvature b exp(-u), which vanishes with b; |f'| is added to it: then no step in u is longer than 1, and where f' = 0
nothing is added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..rules.table import plain
from .blocks import UnrecognizedLoss, diagonal_block
from .tail import Cut, Tail

_UNARY = {   # operations that a scale is a function of its parameter by: elementwise, or a choice of elements
    "ExpBackward0", "LogBackward0", "NegBackward0", "MulBackward0", "MulBackward1", "DivBackward0", "DivBackward1",
    "AddBackward0", "AddBackward1", "SubBackward0", "SubBackward1", "RsubBackward1", "PowBackward0", "CloneBackward0",
    "ViewBackward0", "SelectBackward0", "SliceBackward0", "SoftplusBackward0", "SqrtBackward0", "UnsqueezeBackward0",
    "SqueezeBackward0", "SqueezeBackward1", "ExpandBackward0", "PermuteBackward0", "TransposeBackward0", "TBackward0",
    "ToCopyBackward0", "ReciprocalBackward0", "ClampBackward1", "ClampMinBackward0", "SigmoidBackward0", "IndexBackward0",
}


@dataclass(slots=True)
class Slope:
    """What is known of the loss at a quantity: first and second derivative; is it a scale? value: where it is saved."""

    first: torch.Tensor
    second: torch.Tensor
    scale: bool
    value: torch.Tensor | None = None

    def plus(self, other: Slope | None) -> Slope:
        """The sum with another of the same quantity."""
        if other is None:
            return self
        value = self.value if other.value is None else other.value
        return Slope(self.first + other.first, self.second + other.second, self.scale or other.scale, value)


def factors(tape, position: int, weight: torch.Tensor) -> list:
    """(edge, Slope) of both inputs of a product or quotient of two quantities that depend on the parameters."""
    node, edges = tape.nodes[position], tape.edges[position]
    a, b = plain(node._saved_self).detach(), plain(node._saved_other).detach()
    zero = torch.zeros_like(weight)
    if tape.kind(position) == "MulBackward0":
        slopes = (weight * b, zero), (weight * a, zero)
    else:
        slopes = (weight / b, zero), (-weight * a / b**2, 2 * weight * a / b**3)
    return [
        (edge, Slope(*(t.sum_to_size(value.shape) for t in slope), True, value))
        for edge, slope, value in zip(edges, slopes, (a, b), strict=True)
    ]


def logarithm(tape, position: int, weight: torch.Tensor):
    """(edge, Slope) of the input of a logarithm."""
    v = plain(tape.nodes[position]._saved_self).detach()
    return tape.edges[position][0], Slope(weight / v, -weight / v**2, True, v)


def settle(tape, slopes: dict, form) -> None:
    """Add the blocks of all slopes to a form, each where the scale's own parameter or the model's output stands.

    Raises: UnrecognizedLoss for a slope that no scale explains: a linear term.
    """
    while slopes:
        edge = max(slopes)
        slope = slopes.pop(edge)
        if slope.scale:
            below = _below(tape, edge)
            if below is not None:
                slopes[below] = _pushed(tape, edge, below, slope).plus(slopes.get(below))
                form.consumed.update(e[0] for e in (edge, below) if tape.leaf[e[0]] < 0)
                continue
        if not slope.scale:
            if bool((slope.first == 0).all()):
                continue
            raise UnrecognizedLoss("it has a term that is linear in what the model computes, without a curved one beside it")
        form.blocks.append(diagonal_block((edge,), slope.first, _curvature(slope)))
        form.steady = False


def _below(tape, edge):
    position = edge[0]
    if tape.leaf[position] >= 0 or tape.kind(position) not in _UNARY:
        return None
    below = [e for e in tape.edges[position] if e is not None]
    return below[0] if len(below) == 1 else None


def _pushed(tape, edge, below, slope: Slope) -> Slope:
    """The slope of the one input of an operation."""
    position = edge[0]
    cut = Cut(below, (position,), (position,), ((position, tape.edges[position].index(below)),))
    tail = Tail(tape, edge, slope.first, cut)
    second = tail.product(torch.ones_like(tail.gradient))
    if tape.shape(*edge) == tape.shape(*below):
        second = second + Tail(tape, edge, torch.ones_like(slope.first), cut).gradient ** 2 * slope.second
    else:
        second = second + Tail(tape, edge, slope.second, cut).gradient
    return Slope(tail.gradient, second, True, tail.value())


def _curvature(slope: Slope) -> torch.Tensor:
    first, second, v = slope.first, slope.second, slope.value
    if v is None or v.shape != first.shape or not bool((v > 0).all()):
        return second.clamp_min(0) + first.abs()
    return ((v * v * second + v * first).clamp_min(0) + (v * first).abs()) / (v * v)
