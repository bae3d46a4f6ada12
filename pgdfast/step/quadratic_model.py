"""The quadratic model of the loss along a step."""

from __future__ import annotations

import torch


def predicted_reduction(lin, direction: torch.Tensor, t: float) -> float:
    """The reduction of the loss that the model promises of theta - t d, for any d, (P,). Cost: a product with J and J^T."""
    slope, curvature = torch.dot(lin.gradient(), direction), torch.dot(direction, lin.ggn(direction))
    return t * float(slope) - 0.5 * t * t * float(curvature)


def curvature(lin, solution) -> float:
    """Curvature along the step, g . delta / ||delta||^2, or along the gradient where there is no step.

    lin: a function that gives the linearization.
    """
    square = float(solution.step.double().square().sum())
    if square > 0 and solution.gain > 0:
        return solution.gain / square
    lin = lin()
    g = lin.gradient()
    square = float(torch.dot(g, g))
    return float(torch.dot(g, lin.ggn(g))) / square if square > 0 else 1.0
