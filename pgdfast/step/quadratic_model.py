"""The quadratic model of the loss along a step."""

from __future__ import annotations

import math

import torch


def predictions(lin, parameters, b: int, solution):
    """(t -> predicted reduction of theta - t d, slope g . d) for d = rates * delta, of member b.

    lin: a function that gives the member's linearisation, asked where its parameters' learning rates differ: two products.
    """
    rate = parameters.one_rate(b)
    if rate is not None:
        # Up to a rate of 2 and without a prior only rounding makes this negative.
        least = 0.0 if solution.prior is None and rate <= 2 else -math.inf
        return (lambda t: max(solution.reduction(rate * t), least)), rate * solution.gain
    lin, direction = lin(), parameters.scaled(b, solution.step)
    slope = float(torch.dot(lin.gradient(), direction))
    curvature = float(torch.dot(direction, lin.ggn(direction)))
    return (lambda t: t * slope - 0.5 * t * t * curvature), slope


def curvature(lin, solution) -> float:
    """Curvature along the step, g . delta / ||delta||^2, or along the gradient where there is no step.

    lin: a function that gives the linearisation.
    """
    square = float(solution.step.double().square().sum())
    if square > 0 and solution.gain > 0:
        return solution.gain / square
    lin = lin()
    g = lin.gradient()
    square = float(torch.dot(g, g))
    return float(torch.dot(g, lin.ggn(g))) / square if square > 0 else 1.0
