"""What a second-order correction may ask of the step that it corrects."""

from __future__ import annotations

import math

import torch

from .parameters import Parameters


class CorrectedStep:
    """What a correction asks of a step; see correction.CorrectionModel. tried, residual: the last displacement and r there.

    loss: before the step.
    """

    def __init__(self, lin, solution, parameters: Parameters, b: int, loss: float):
        self._lin, self._solution, self._parameters, self._b, self._before = lin, solution, parameters, b, loss
        self.tried = self.residual = None

    def missed(self) -> torch.Tensor:
        """M(e) at the last displacement."""
        return self.residual - self._lin.residual + self._lin.jvp(self.tried)

    def correction(self, m: torch.Tensor) -> torch.Tensor:
        """A^-1 J^T m."""
        found, parameters, b = self._solution.solve_with_same_factor(m), self._parameters, self._b
        return found if parameters.common_rates[b] is not None else parameters.scaled(b, found) / max(parameters.rates(b))

    def ratio(self, loss: float) -> float:
        """The gain ratio of the step itself, at its learning rate; of several rates at the largest."""
        rate = self._parameters.common_rates[self._b]
        promised = self._solution.reduction(max(self._parameters.rates(self._b)) if rate is None else rate)
        return (self._before - loss) / promised if promised > 0 else -math.inf

    def size(self, e: torch.Tensor) -> float:
        """The length in the norm of D."""
        D, e = self._solution.damping_diagonal, e.double()
        scaled = isinstance(D, torch.Tensor) and bool(D.any())   # mu = 0 has no norm of its own
        return math.sqrt(float(torch.dot(D.double() * e if scaled else e, e)))
