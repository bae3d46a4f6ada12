"""Second-order corrections of a step, each at the price of a trial and of one more solve with the factor at hand.

With delta the damped step, e a displacement theta -> theta - e and

    m(e) = r(theta - e) - r + J e        what the linear model misses, about 1/2 r_ee,

A^-1 J^T m(e), A = mu D + J^T J, moves e to where the linear model would have been right. Residuals only: for a cross-entropy J
is not the derivative of r. A prior of momentum stands in delta, and nowhere else: e then ends where the damping pulls to the
prior.

A correction is a generator: it yields a displacement e, is sent the loss at theta - e, and returns the e that it settles on
with the loss there. So the members of an ensemble are corrected side by side.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

Proposal = Generator[torch.Tensor, float, tuple[torch.Tensor, float]]


class CorrectionModel(Protocol):
    """What a correction may ask of the step that it corrects."""

    def missed(self) -> torch.Tensor:
        """m(e) at the last displacement that was tried, (M,). Cost: one product with J."""

    def correction(self, m: torch.Tensor) -> torch.Tensor:
        """A^-1 J^T m, (P,), with the learning rates in it. Cost: two triangular solves and one product with J^T."""

    def size(self, e: torch.Tensor) -> float:
        """The length of a displacement in the norm of D."""

    def ratio(self, loss: float) -> float:
        """The gain ratio of the step itself, if the loss at its end is this."""


@runtime_checkable
class Acceleration(Protocol):
    """A correction of one's own: any object with this `correct`."""

    def correct(self, model: CorrectionModel, delta: torch.Tensor) -> Proposal:
        """Yield displacements e, receive the losses there, return (e, loss). delta: (P,), with the learning rates in it."""


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

    def correct(self, model: CorrectionModel, delta: torch.Tensor) -> Proposal:
        """See Acceleration."""
        loss = yield self.h * delta
        half = model.correction(model.missed() / self.h**2) if math.isfinite(loss) else None
        fits = half is not None and 4 * model.size(half) <= self.ratio * model.size(delta)
        e = delta + half if fits else delta
        return e, (yield e)


@dataclass(frozen=True, slots=True)
class Chord:
    """Chord iterations (simplified Newton) on the damped problem: e <- delta + A^-1 J^T m(e), from e = delta.

    They go on while each lowers the loss to `factor` of what it was, `rounds` times at most; the best point counts. A round
    that cannot do so is left out: it changes the residual by no more than what m has changed by; and so are all of them where
    the gain ratio of the step itself is `enough`. The first is geodesic acceleration with h = 1. A round costs one run of the
    closure, one product with J, one with J^T and two triangular solves: small beside a linearization and its factor.

    Source: Shamanskii (1967); Fan, J. Comput. Appl. Math. 254 (2013), for Levenberg-Marquardt.
    """

    rounds: int = 8
    factor: float = 0.9
    enough: float = math.inf

    def correct(self, model: CorrectionModel, delta: torch.Tensor) -> Proposal:
        """See Acceleration."""
        last, before = (yield delta), None
        best = delta, last
        if self.enough < math.inf and model.ratio(last) >= self.enough:
            return best
        for _ in range(self.rounds):
            if not math.isfinite(last):
                break
            missed = model.missed()
            reach = float(torch.linalg.vector_norm(missed if before is None else missed - before))
            if not reach > (1 - math.sqrt(self.factor)) * math.sqrt(2 * max(last, 0.0)):
                break
            e, before = delta + model.correction(missed), missed
            loss = yield e
            if loss < best[1]:
                best = e, loss
            if not loss < self.factor * last:
                break
            last = loss
        return best


ACCELERATIONS = {"geodesic": Geodesic, "chord": Chord}


def chosen_acceleration(given) -> Acceleration | None:
    """None, the acceleration of a name, or the given object if it has `correct`.

    Raises ValueError for an unknown name, TypeError for an object without `correct`.
    """
    if given is None:
        return None
    if isinstance(given, str):
        if given in ACCELERATIONS:
            return ACCELERATIONS[given]()
        names = ", ".join(repr(name) for name in ACCELERATIONS)
        raise ValueError(f"pgdfast.LM: unknown acceleration {given!r}; use 'auto', None, {names}, or an object with correct().")
    if isinstance(given, Acceleration):
        return given
    raise TypeError(
        f"pgdfast.LM: acceleration {given!r} has no correct(model, delta) method; see pgdfast.Acceleration."
    )
