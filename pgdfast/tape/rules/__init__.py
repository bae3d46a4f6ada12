"""The derivative of every operation that may stand on a tape, one small function each, keyed by autograd node name."""

from __future__ import annotations

from . import elementwise, gathers, jets, linear_algebra, normalizing, pointwise, probed, selection, structural, writes
from .table import RULES, Rule

__all__ = [
    "RULES", "Rule", "elementwise", "gathers", "jets", "linear_algebra", "normalizing", "pointwise", "probed", "selection",
    "structural", "writes",
]
