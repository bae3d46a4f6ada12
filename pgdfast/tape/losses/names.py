"""What users wrote, for messages: the tape names operations by their autograd nodes."""

from __future__ import annotations

from .blocks import UnrecognizedLoss


def explained(first: UnrecognizedLoss, last: UnrecognizedLoss) -> UnrecognizedLoss:
    """The error to show of two: what the plain walk met, and what the search for a cut ended at."""
    return first
