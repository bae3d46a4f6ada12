"""The quadratic model of the loss along a step."""

from __future__ import annotations

import torch


def slope_and_bend(lin, direction: torch.Tensor) -> tuple[float, float]:
    """(g . d, d . (J^T J + penalty) d) of any direction d, (P,): the model promises t g.d - t^2/2 d.J^T J d of theta - t d.

    Cost: a product with J and two with J^T.
    """
    return float(torch.dot(lin.gradient(), direction)), float(torch.dot(direction, lin.ggn(direction)))


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
