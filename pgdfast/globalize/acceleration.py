"""Second-order corrections of a step, each at the price of a trial and of one more solve with the factor at hand.

With delta the damped step, e a displacement theta -> theta - e and

    m(e) = r(theta - e) - r + J e        what the linear model misses, about 1/2 r_ee,

A^-1 J^T m(e), A = mu D + J^T J, moves e to where the linear model would have been right. Residuals only: for a cross-entropy J
is not the derivative of r. `Trials` evaluates m; an acceleration is any object with `take(trials, delta) -> (e, loss)`.
A prior of momentum stands in delta, and nowhere else: e then ends where the damping pulls to the prior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .trial import Trials


@dataclass(frozen=True, slots=True)
class Geodesic:
    """Geodesic acceleration: the step follows the parabola whose second derivative keeps the model's path straight.

    e = delta - a/2 with a = A^-1 J^T r'', r'' the second derivative of the residual along delta by the finite difference
    -2 m(h delta) / h^2; taken where 2 ||a|| <= ratio ||delta||, in the norm of D. Elsewhere the plain step is tried.
    Cost: two runs of the closure instead of one, one solve with the factor.

    Source: Transtrum and Sethna, arXiv 1201.5885, section 5 and equation (12).
    """

    h: float = 0.1
    ratio: float = 0.75

    def take(self, trials: Trials, delta: torch.Tensor) -> tuple[torch.Tensor, float]:
        """(e, loss at theta - e); delta: (P,), with the learning rates in it."""
        loss = trials.at(self.h * delta)
        half = trials.correction(trials.missed() / self.h**2) if math.isfinite(loss) else None
        fits = half is not None and 4 * trials.size(half) <= self.ratio * trials.size(delta)
        e = delta + half if fits else delta
        return e, trials.at(e)


@dataclass(frozen=True, slots=True)
class Chord:
    """Chord iterations (simplified Newton) on the damped problem: e <- delta + A^-1 J^T m(e), from e = delta.

    They go on while each lowers the loss to `factor` of what it was, `rounds` times at most; the best point counts. A round
    that cannot do so is left out: it changes the residual by no more than what m has changed by. The first is geodesic
    acceleration with h = 1. A round costs one run of the closure, one product with J, one with J^T and two triangular solves:
    small beside a linearisation and its factor.

    Source: Shamanskii (1967); Fan, J. Comput. Appl. Math. 254 (2013), for Levenberg-Marquardt.
    """

    rounds: int = 8
    factor: float = 0.9

    def take(self, trials: Trials, delta: torch.Tensor) -> tuple[torch.Tensor, float]:
        """(e, loss at theta - e); delta: (P,), with the learning rates in it."""
        last, before = trials.at(delta), None
        best = delta, last
        for _ in range(self.rounds):
            if not math.isfinite(last):
                break
            missed = trials.missed()
            reach = float(torch.linalg.vector_norm(missed if before is None else missed - before))
            if not reach > (1 - math.sqrt(self.factor)) * math.sqrt(2 * max(last, 0.0)):
                break
            e, before = delta + trials.correction(missed), missed
            loss = trials.at(e)
            if loss < best[1]:
                best = e, loss
            if not loss < self.factor * last:
                break
            last = loss
        return best


ACCELERATIONS = {"geodesic": Geodesic, "chord": Chord}


def acceleration(given):
    """None, the acceleration of a name, or the given object if it has `take`.

    Raises ValueError for an unknown name, TypeError for an object without `take`.
    """
    if given is None or hasattr(given, "take"):
        return given
    if isinstance(given, str):
        if given in ACCELERATIONS:
            return ACCELERATIONS[given]()
        names = ", ".join(repr(name) for name in ACCELERATIONS)
        raise ValueError(f"pgdfast.LM: unknown acceleration {given!r}; use None, {names}, or an object with take().")
    raise TypeError(f"pgdfast.LM: acceleration {given!r} has no take(trials, delta) method.")
