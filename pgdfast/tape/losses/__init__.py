"""Reading the loss off the end of a tape: which outputs it is a convex function of, and their scaled residuals."""

from .blocks import Form, UnrecognizedLoss, residual_form
from .names import written
from .reader import RECOGNISED, one_element, scalar_form

__all__ = ["RECOGNISED", "Form", "UnrecognizedLoss", "one_element", "residual_form", "scalar_form", "written"]
