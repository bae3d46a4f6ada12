"""Second-order corrections of a step, each at the price of a trial and of one more solve with the factor at hand.

With delta the damped step, e a displacement theta -> theta - e and

    m(e) = r(theta - e) - r + J e        what the linear model misses, about 1/2 r_ee,

A^-1 J^T m(e), A = mu D + J^T J, moves e to where the linear model would have been right. Residuals only: for a cross-entropy J
is not the derivative of r. `Trials` evaluates m; an acceleration is any object with `take(trials, delta) -> (e, loss)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .trial import trial_residual


class Trials:
    """Trial points around a linearisation; between calls the parameters are those of the linearisation.

    closure, lin, draws, move, solution: as in LM's step; move must have saved its parameters. count: points evaluated.
    """

    def __init__(self, closure, lin, draws, move, solution):
        self._closure, self._lin, self._draws, self._move, self._solution = closure, lin, draws, move, solution
        self.count = 0

    def at(self, e: torch.Tensor) -> float:
        """The loss at theta - e, for e (P,), or as far that way as the norm constraint goes. Cost: one run of the closure.

        The closure draws the random numbers of the linearisation.
        """
        self.count += 1
        e = self._move.shift(e)
        with self._draws:
            loss, residual = trial_residual(self._closure, self._move.params, self._lin, self._draws)
        self._move.undo()
        self._lin.parameters_unchanged()
        self._last = e, residual
        return loss

    def missed(self) -> torch.Tensor:
        """M (M,) at the last point. Cost: one product with J."""
        e, residual = self._last
        return residual - self._lin.residual + self._lin.jvp(e)

    def correction(self, m: torch.Tensor) -> torch.Tensor:
        """A^-1 J^T m, (P,), each group's part times its learning rate over the largest: at rate 0 nothing moves.

        Without the prior of momentum, which is in delta already. Cost: two triangular solves and one product with J^T.
        """
        correction, move = self._solution.again(m), self._move
        return correction if move.one_rate is not None else move.scaled(correction) / max(move.rates)

    def size(self, e: torch.Tensor) -> float:
        """The length of a displacement in the norm of D."""
        D, e = self._solution.damping_diagonal, e.double()
        scaled = isinstance(D, torch.Tensor) and bool(D.any())   # mu = 0 has no norm of its own
        return math.sqrt(float(torch.dot(D.double() * e if scaled else e, e)))


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
