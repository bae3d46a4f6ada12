"""The quadratic model of the loss along a step."""

from __future__ import annotations

import math

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
    return gradient_curvature(lin()) or 1.0


def gradient_curvature(lin) -> float:
    """The model's curvature along its gradient, g . H g / ||g||^2, the inverse of the length of Cauchy's step; 0 without one.

    The scale of mu for the identity: c^2 times it for c times the residuals, bit for bit where c is a power of two. Cost: a
    product with J and two with J^T.
    """
    g = lin.gradient()
    size = float(g.abs().max())
    if not 0 < size < math.inf:
        return 0.0
    d = g / size
    wide = d.double()
    found = float(torch.dot(wide, lin.ggn(d).double())) / float(torch.dot(wide, wide))
    return found if 0 < found < math.inf else 0.0
