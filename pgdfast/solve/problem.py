"""The damped problem in the form that every solver starts from, so that all of them mean the same matrix."""

from __future__ import annotations

from collections.abc import Callable
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


@dataclass(slots=True)
class Problem:
    """(diag(d) + J^T J) delta = J^T r + q, with d = mu * scale + c and q = c theta.

    mu: damping; scale: (P,) or None for the identity; penalty c: (P,) or None; uniform: d is the number mu.
    """

    linearization: object
    mu: float
    scale: torch.Tensor | None
    penalty: torch.Tensor | None
    q: torch.Tensor | None

    @classmethod
    def of(cls, linearization, mu: float, scale: torch.Tensor | None) -> Problem:
        """Gather the penalty of a linearisation beside a damping and scale."""
        return cls(linearization, mu, scale, linearization.penalty, linearization.penalty_gradient)

    def widened(self) -> Problem:
        """The same problem in float64 (see Linearization.widened)."""
        wide = self.linearization.widened()
        return self if wide is self.linearization else Problem.of(wide, self.mu, self.scale)

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
