"""The derivative of every operation that may stand on a tape, one small function each, keyed by autograd node name."""

from __future__ import annotations

from . import (
    distances,
    elementwise,
    gathers,
    jets,
    linear_algebra,
    linear_maps,
    local,
    matrices,
    normalizing,
    pointwise,
    probed,
    scatters,
    selection,
    structural,
    writes,
)
from .table import RULES, Rule

__all__ = [
    "RULES",
    "Rule",
    "distances",
    "elementwise",
    "gathers",
    "jets",
    "linear_algebra",
    "linear_maps",
    "local",
    "matrices",
    "normalizing",
    "pointwise",
    "probed",
    "scatters",
    "selection",
    "structural",
    "writes",
]
