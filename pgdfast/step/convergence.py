"""Has a run converged? MINPACK's loss, step and gradient tests (lmder's ftol, xtol, gtol), relative and free of units.

They ask for products with J, so they are made only at steps where the numbers that a step has anyway allow them to hold.
Source: More, Garbow, Hillstrom, User Guide for MINPACK-1 (ANL-80-74), section 2.3, LMDER. Beyond MINPACK, no test holds where
the damping, or a step along one parameter alone, shows that the model promises more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..report import PROMISE, SUMS, exact, loss_test, no_descent, slope_test, step_test

_ROUNDING = 8   # rounding units: what products with J lose, and parameters


@dataclass(frozen=True, slots=True)
class Tolerances:
    """LM's ftol, xtol and gtol: None for the loss's rounding, 0 for no test."""

    ftol: float | None = None
    xtol: float | None = None
    gtol: float | None = None

    def __post_init__(self):
        for name in ("ftol", "xtol", "gtol"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 <= value < 1):
                raise ValueError(
                    f"pgdfast.LM: {name} is {value!r}; it must be None for what rounding allows, 0 for no such test, or a "
                    "number below 1, such as 1e-8."
                )

    @property
    def asked(self) -> bool:
        """Whether any is more than rounding, so that steps above it are to be looked at, too."""
        return bool(self.ftol or self.xtol or self.gtol)

    def looked_at(self, eps: float) -> float:
        """Relative promises up to this may meet a test. eps: rounding unit of the loss."""
        return math.inf if self.xtol else max(SUMS * eps, self.ftol or 0.0, self.gtol or 0.0)


class Facts(NamedTuple):
    """What a step says of itself, without products.

    loss: before it. possible: what the model promises along it without damping. change: the loss's, in absolute value; 0 where
    nobody looked. predicted: by the model. undamped: length of the step without damping over its own, infinite where unknown.
    """

    loss: float
    possible: float
    change: float
    predicted: float
    undamped: float

    def level(self, limit: float) -> bool:
        """Whether the loss is flat to this much, by what was seen and by the model without damping."""
        return self.possible <= limit and self.change <= limit


class Measures(NamedTuple):
    """How stationary a point is, in the norm of D, the lengths ||J_j|| of the columns of J.

    steepest: max_j |g_j| / ||J_j||, so that a step along parameter j alone gains half its square; longest: max_j ||J_j||;
    residual: ||r||; parameters, step: ||D theta||, ||D delta||.
    """

    steepest: float
    longest: float
    residual: float
    parameters: float
    step: float


def measured(lin, loss: float, theta: torch.Tensor, step: torch.Tensor, moves: torch.Tensor | None) -> Measures:
    """The measures at a linearization's parameters theta, (P,), for a step (P,). moves: which parameters may, None for all.

    Cost: the gradient and diag(J^T J).
    """
    g, squares = lin.gradient().double(), lin.diagonal().double().clamp_min(0)
    steepest = torch.where(squares > 0, g.abs() / squares.sqrt(), 0.0)
    if moves is not None:
        steepest = torch.where(moves, steepest, 0.0)
    lengths = [(squares * x.double().square()).sum().sqrt() for x in (theta, step)]
    residual = lin.residual.double().square().sum()   # of a loss that is no sum of squares: those of its convex model
    numbers = torch.stack([steepest.max(), squares.max().sqrt(), residual.sqrt(), *lengths]).tolist()
    if lin.has_squares_only:   # penalties included
        numbers[2] = math.sqrt(2 * abs(loss))
    return Measures(*numbers)


def worth_measuring(facts: Facts, tolerances: Tolerances) -> bool:
    """Whether a step that was kept may meet a test wider than rounding."""
    wider = max(tolerances.ftol or 0.0, tolerances.gtol or 0.0)
    return facts.level(wider * abs(facts.loss)) or bool(tolerances.xtol) and facts.undamped < math.inf


def met(
    facts: Facts, m: Measures, tolerances: Tolerances, limit: float, dtype: torch.dtype, squares: bool, in_vain: bool = False
) -> str:
    """Which test is met, in words; "" for none.

    limit: what of the loss is rounding. in_vain: did steps in a row, down to promises of rounding, find no descent? Then what
    the model promises along them is its own rounding.
    """
    eps, size = torch.finfo(dtype).eps, abs(facts.loss)
    ftol, xtol, gtol = tolerances.ftol, tolerances.xtol, tolerances.gtol
    if not all(map(math.isfinite, m)):
        return ""
    vanishing = squares and m.residual <= _ROUNDING * eps * m.parameters
    if xtol != 0 and vanishing or facts.loss == 0 and (m.steepest == 0 or in_vain):
        return exact(facts.loss, dtype)
    wide = _ROUNDING * eps if gtol is None else max(gtol, _ROUNDING * eps)
    rounding = m.steepest <= _ROUNDING * eps * m.residual
    if gtol != 0 and m.steepest <= wide * m.residual and (rounding or facts.level(wide * size)):
        return slope_test(m.steepest / (m.residual or 1.0), gtol, rounding, dtype)
    wide = max(limit, (ftol or 0.0) * size)
    if ftol != 0 and facts.possible <= wide and 0.5 * m.steepest**2 <= wide:
        if facts.possible <= limit and facts.change <= SUMS * eps * size:
            return loss_test(facts, None, dtype)
        if facts.change <= wide and facts.change <= 2 * facts.predicted:
            return loss_test(facts, ftol, dtype)
    if ftol != 0 and in_vain and 0.5 * m.steepest**2 <= wide:
        return no_descent(0.5 * m.steepest**2 / size, dtype)
    if xtol and m.step * facts.undamped <= xtol * m.parameters and m.steepest <= xtol * m.parameters:
        return step_test(m.step * facts.undamped / m.parameters, xtol)
    return ""


def rounding_of(loss: float, eps: float, sums: bool) -> float:
    """How much of a loss is rounding. sums: of its sums, as steps without descent show it, or of one number."""
    return (SUMS if sums else PROMISE) * eps * abs(loss)
