"""The derivative of every operation that may stand on a tape, one small function each, keyed by autograd node name."""

from __future__ import annotations

from . import (
    bags,
    convolution,
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
    pooling,
    probed,
    recurrent,
    scatters,
    selection,
    statistics,
    structural,
    writes,
)
from .table import RULES, Rule

__all__ = [
    "RULES",
    "Rule",
    "bags",
    "convolution",
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
    "pooling",
    "probed",
    "recurrent",
    "scatters",
    "selection",
    "statistics",
    "structural",
    "writes",
]
