"""Reading the loss off the end of a tape: which outputs it is a convex function of, and their scaled residuals."""

from .blocks import Form, UnrecognizedLoss, residual_form
from .names import written
from .reader import RECOGNISED, one_element, scalar_form
from .shares import Share, known_shares, residual_shares, shares_of, with_statistics
from .values import half_squares, term_values

__all__ = [
    "RECOGNISED", "Form", "Share", "UnrecognizedLoss", "half_squares", "known_shares", "one_element", "residual_form",
    "residual_shares", "scalar_form", "shares_of", "term_values", "with_statistics", "written",
]
