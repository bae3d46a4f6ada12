"""The damped problem in the form that every solver starts from, so that all of them mean the same matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from ..kernels.limits import NARROW_TOLERANCE, WIDE_FACTOR
from ..kernels.protocol import Outcome
from ..linear.protocol import SolvableLinearization
from .options import CG
from .sizes import Sizes


class Found(NamedTuple):
    """What a solver hands back.

    outcome: of kernels.protocol. again: u -> (damped matrix)^-1 J^T u, (M,) -> (P,), see Solution.solve_with_same_factor.
    wide: did a float32 problem take float64 sums, and will the next? keep: what the next solve may start from. path: earlier
    iterates as (iteration, step, gain, square, slack), the shortest first. cut: directions left out by a pseudo-inverse.
    """

    outcome: Outcome
    again: Callable | None = None
    wide: bool = False
    keep: dict | None = None
    path: tuple = ()
    cut: int = 0


class Solver(Protocol):
    """One way to solve a Problem. SOLVERS of choice.py has them by name.

    automatic: does "auto" consider it, and for how many dampings at least?
    """

    name: str
    automatic: int | None

    def operations(self, sizes: Sizes) -> float:
        """Predicted, of all steps asked for."""

    def bytes(self, sizes: Sizes) -> float:
        """Predicted, at the peak, beyond the linearization itself."""

    def solve(self, problem: Problem, options: CG, rcond: float, wide: bool, keep: dict | None, time: int) -> Found:
        """The step; the arguments are those of pgdfast.solve."""

    def solve_all(self, problem: Problem, mus: list[float], options: CG, rcond: float) -> Sequence[Found] | None:
        """The steps of the ascending mus in one go, or None where one is solved for after another."""


class OnDemand(Sequence):
    """A list whose items are made when they are asked for, and then kept: what is not looked at costs nothing.

    items: None where one is still to be made. make: its number -> the item.
    """

    def __init__(self, items: list, make: Callable):
        self._items, self._make = items, make

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, k: int):
        if self._items[k] is None:
            self._items[k] = self._make(range(len(self))[k])
        return self._items[k]


@dataclass(slots=True)
class Problem:
    """(diag(d) + J^T J) delta = J^T r + q, with d = mu * scale + c and q = c theta.

    mu: damping, a number or a 0-dim tensor; scale: (P,) or None for the identity; penalty c: (P,) or None; uniform: d is the
    number mu.

    A prior p, to which the damping pulls instead of to zero, adds mu D p on the right. With delta = p + psi it leaves the
    same equation for psi with r - J p for r and q - c p for q, which every solver solves as it is; mu = 0 included, where
    delta is the least-squares solution nearest to p.
    """

    linearization: SolvableLinearization
    mu: float | torch.Tensor
    scale: torch.Tensor | None
    r: torch.Tensor
    penalty: torch.Tensor | None = None
    q: torch.Tensor | None = None
    prior: torch.Tensor | None = None

    @classmethod
    def of(cls, linearization, mu, scale: torch.Tensor | None = None, prior: torch.Tensor | None = None) -> Problem:
        """A linearization's problem at a damping. A prior costs one product with J."""
        lin, r = linearization, linearization.residual
        if prior is None and not lin.penalties:
            return cls(lin, mu, scale, r)
        penalty, q = lin.penalty, lin.penalty_gradient
        if prior is not None:
            prior = prior.to(lin.dtype)
            r = r - lin.jvp(prior)
            q = q if penalty is None else q - penalty * prior
        return cls(lin, mu, scale, r, penalty, q, prior)

    def at(self, mu: float) -> Problem:
        """The same at another damping."""
        return Problem(self.linearization, mu, self.scale, self.r, self.penalty, self.q, self.prior)

    def widened(self) -> Problem:
        """The same problem in float64 (see Linearization.widened)."""
        wide = self.linearization.widened()
        if wide is self.linearization:
            return self
        if self.penalty is None and self.prior is None:
            return Problem(wide, self.mu, self.scale, wide.residual)
        return Problem.of(wide, self.mu, self.scale, self.prior)

    def for_iterations(self, options: CG) -> Problem:
        """The same, in float64 where an iterative solve to this tolerance needs it."""
        return self if for_iterations(self.linearization, options) is self.linearization else self.widened()

    def gradient(self) -> torch.Tensor:
        """The right-hand side J^T r + q, (P,)."""
        g = self.linearization.vjp(self.r)
        return g if self.q is None else g + self.q

    def from_prior(self, outcome: Outcome) -> Outcome:
        """What was found for psi, turned into delta = p + psi with the gain, length and slack of that. Costs one JVP."""
        lin = self.linearization
        step = outcome.step + self.prior.to(outcome.step.dtype)
        pushed, wide = lin.jvp(step).double(), step.double()
        gain, curvature = float(torch.dot(lin.residual.double(), pushed)), float(torch.dot(pushed, pushed))
        if self.penalty is not None:
            gain += float(torch.dot(lin.penalty_gradient.double(), wide))
            curvature += float(torch.dot(self.penalty.double() * wide, wide))
        square = float(torch.dot(wide, wide))
        slack = gain - self.damped(step, square) - curvature
        return outcome._replace(step=step, gain=gain, square=square, slack=slack)

    @property
    def uniform(self) -> bool:
        """True where the diagonal is one number."""
        return self.scale is None and self.penalty is None

    @property
    def damping_diagonal(self):
        """Mu D: a number, or (P,)."""
        return self.mu if self.scale is None else self.mu * self.scale

    def diagonal(self) -> torch.Tensor:
        """d, (P,); 0-dim where it is uniform and mu is a tensor."""
        lin = self.linearization
        if isinstance(self.mu, torch.Tensor):   # without a look at it
            return self.mu if self.penalty is None else self.mu + self.penalty
        if self.scale is None:
            d = torch.full((lin.num_parameters,), self.mu, dtype=lin.dtype, device=lin.device)
        else:
            d = self.mu * self.scale.to(lin.dtype)
        return d if self.penalty is None else d + self.penalty

    def damped(self, step: torch.Tensor, square: float) -> float:
        """Delta . mu D delta, given ||delta||^2."""
        if self.scale is None or self.mu == 0:
            return self.mu * square
        wide = step.double()
        return self.mu * float(torch.dot(wide, self.scale.double() * wide))

    def weights_by_parameter(self) -> torch.Tensor:
        """1/d, one number per parameter tensor, for the identity scaling."""
        lin = self.linearization
        values = [1 / (self.mu + lin.penalties.get(k, 0.0)) for k in range(len(lin.params))]
        return torch.tensor(values, dtype=lin.dtype)


def for_iterations(lin, options: CG):
    """The linearization, in float64 where an iterative solve to this tolerance needs it."""
    return lin.widened() if affords_float64(lin) and options.tolerance < NARROW_TOLERANCE else lin


def affords_float64(lin) -> bool:
    """Whether this is a float32 problem that is small enough to be summed and factored in float64."""
    return lin.dtype == torch.float32 and min(lin.num_residuals, lin.num_parameters) <= WIDE_FACTOR
