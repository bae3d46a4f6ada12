"""The slow and obviously right truth: an explicit Jacobian in float64, dense solves, textbook CG.

Letters: M residuals, P parameters, r residual (M,), J Jacobian (M, P), mu damping, delta step (P,).
This room imports nothing from the rest of the package; everything fast is checked against it.
"""

from .linearization import Linearization, linearize, residual
from .solve import Solution, solve

__all__ = ["Linearization", "Solution", "linearize", "residual", "solve"]
