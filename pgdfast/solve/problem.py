"""The damped problem in the form that every solver starts from, so that all of them mean the same matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

WIDE_FACTOR = 2048    # up to this order a float32 problem may be summed and factored in float64
DOUBLE_FACTOR = 192   # up to this order the core factors a float32 matrix in float64 in any case (csrc/cpu/solve.h)


class Found(NamedTuple):
    """What a solver hands back.

    gain is g . step; trace that of J D^-1 J^T, which bounds the condition from above; slack (g - A step) . step, 0 for solves
    that are exact; path earlier iterates as (iteration, step, gain, square, slack), the shortest first; again: (M,) -> (P,),
    see Solution.again.
    """

    step: torch.Tensor
    status: str
    iterations: int = 0
    residual_norm: float | None = None
    gain: float = 0.0
    square: float = 0.0
    trace: float = 0.0
    slack: float = 0.0
    path: tuple = ()
    again: Callable | None = None
    factor: object = None   # of a direct solve by the kernels (kernels.protocol.Factor)

    @classmethod
    def failed(cls, lin) -> Found:
        """No step: the matrix is not positive definite, or not finite."""
        return cls(torch.zeros(lin.num_parameters, dtype=lin.dtype, device=lin.device), "not_positive_definite")


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

    mu: damping; scale: (P,) or None for the identity; penalty c: (P,) or None; uniform: d is the number mu.

    A prior p, to which the damping pulls instead of to zero, adds mu D p on the right. With delta = p + psi it leaves the
    same equation for psi with r - J p for r and q - c p for q, which every solver solves as it is; mu = 0 included, where
    delta is the least-squares solution nearest to p.
    """

    linearization: object
    mu: float
    scale: torch.Tensor | None
    penalty: torch.Tensor | None
    r: torch.Tensor
    q: torch.Tensor | None
    prior: torch.Tensor | None = None

    @classmethod
    def of(cls, linearization, mu: float, scale: torch.Tensor | None, prior: torch.Tensor | None = None) -> Problem:
        """Gather the penalty of a linearisation beside a damping, scale and prior. A prior costs one product with J."""
        penalty, r, q = linearization.penalty, linearization.residual, linearization.penalty_gradient
        if prior is not None:
            prior = prior.to(linearization.dtype)
            r = r - linearization.jvp(prior)
            q = q if penalty is None else q - penalty * prior
        return cls(linearization, mu, scale, penalty, r, q, prior)

    def at(self, mu: float) -> Problem:
        """The same at another damping."""
        return Problem(self.linearization, mu, self.scale, self.penalty, self.r, self.q, self.prior)

    def widened(self) -> Problem:
        """The same problem in float64 (see Linearization.widened)."""
        wide = self.linearization.widened()
        return self if wide is self.linearization else Problem.of(wide, self.mu, self.scale, self.prior)

    def gradient(self) -> torch.Tensor:
        """The right-hand side J^T r + q, (P,)."""
        g = self.linearization.vjp(self.r)
        return g if self.q is None else g + self.q

    def from_prior(self, found: Found) -> Found:
        """What was found for psi, turned into delta = p + psi with the gain, length and slack of that. Costs one JVP.

        Earlier iterates are left out: they lead away from p, not from zero.
        """
        lin = self.linearization
        step = found.step + self.prior.to(found.step.dtype)
        pushed, wide = lin.jvp(step).double(), step.double()
        gain, curvature = float(torch.dot(lin.residual.double(), pushed)), float(torch.dot(pushed, pushed))
        if self.penalty is not None:
            gain += float(torch.dot(lin.penalty_gradient.double(), wide))
            curvature += float(torch.dot(self.penalty.double() * wide, wide))
        square = float(torch.dot(wide, wide))
        slack = gain - self.damped(step, square) - curvature
        return found._replace(step=step, gain=gain, square=square, slack=slack, path=())

    @property
    def uniform(self) -> bool:
        """True where the diagonal is one number."""
        return self.scale is None and self.penalty is None

    @property
    def damping_diagonal(self):
        """Mu D: a number, or (P,)."""
        return self.mu if self.scale is None else self.mu * self.scale

    def diagonal(self) -> torch.Tensor:
        """d, (P,)."""
        lin = self.linearization
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

    def buffer_weights(self) -> torch.Tensor | None:
        """1/d per parameter tensor where d is constant on each (identity scaling with a penalty), else None."""
        if self.scale is not None or self.mu == 0:
            return None
        lin = self.linearization
        values = [1 / (self.mu + lin.penalties.get(k, 0.0)) for k in range(len(lin.params))]
        return torch.tensor(values, dtype=lin.dtype)
