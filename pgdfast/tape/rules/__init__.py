"""The derivative of every operation that may stand on a tape, one small function each, keyed by autograd node name."""

from __future__ import annotations

from . import (
    convolution,
    elementwise,
    gathers,
    jets,
    linear_algebra,
    normalizing,
    pooling,
    recurrent,
    sparse,
    statistics,
    structural,
)
from .table import RULES, Rule

__all__ = [
    "RULES", "Rule", "convolution", "elementwise", "gathers", "jets", "linear_algebra", "normalizing", "pooling", "recurrent",
    "sparse", "statistics", "structural",
]
