"""Moving the parameters along a direction, and back bit for bit."""

from __future__ import annotations

import torch

from ..kernels import native


class Move:
    """theta - t d for parameters theta and a flat direction d, with a copy of theta to return to.

    params: tensors of P entries together. rates: per parameter, the learning rate that scales its part of d. moved: are
    the parameters away from theta?
    """

    def __init__(self, params: list[torch.Tensor], rates: list[float]):
        self.params, self.rates = params, rates
        self._given = rates
        self._one_rate = rates[0] if rates.count(rates[0]) == len(rates) else None
        self._square: float | None = None
        self._saved: list[torch.Tensor] | None = None
        self.moved = False

    @property
    def _sizes(self) -> list[int]:
        return [p.numel() for p in self.params]

    @property
    def one_rate(self) -> float | None:
        """The common learning rate, or None if groups differ."""
        return self._one_rate

    def scaled(self, direction: torch.Tensor) -> torch.Tensor:
        """The direction with each parameter's part times its learning rate, (P,)."""
        parts = direction.split(self._sizes)
        return torch.cat([rate * part for rate, part in zip(self.rates, parts, strict=True)])

    def constrain(self, direction: torch.Tensor, square: float | None) -> None:
        """Shorten the rates, all by one factor, so that ||rates * d||^2 <= square; as given where that holds, or for None.

        Displacements that `shift` is given later obey the same bound.
        """
        self._square = square
        if square is None:
            return
        self.rates, self._one_rate = self._given, self._given[0] if self._one_rate is not None else None
        factor = self._fits(self.scaled(direction))
        if factor < 1:
            self.rates = [factor * rate for rate in self._given]
            self._one_rate = None if self._one_rate is None else self.rates[0]

    def _fits(self, displacement: torch.Tensor) -> float:
        """The factor, at most 1, that makes a displacement obey the constraint."""
        if self._square is None:
            return 1.0
        length = float(torch.linalg.vector_norm(displacement, dtype=torch.float64))
        return self._square**0.5 / length if length * length > self._square else 1.0

    def save(self) -> None:
        """Copy the parameters, so that `undo` can return to them."""
        if self._saved is None:
            self._saved = [p.detach().clone() for p in self.params]

    def to(self, direction: torch.Tensor, t: float = 1.0) -> None:
        """Go to theta - t (rates * d), from wherever an earlier trial went."""
        self._subtract(direction, self.rates if t == 1.0 else [rate * t for rate in self.rates])

    def shift(self, displacement: torch.Tensor) -> torch.Tensor:
        """Go to theta - e, e (P,) a displacement that has the learning rates in it; return e, shortened if it had to be."""
        factor = self._fits(displacement)
        e = displacement if factor == 1 else factor * displacement
        self._subtract(e, [1.0] * len(self.params))
        return e

    def _subtract(self, direction: torch.Tensor, rates: list[float]) -> None:
        if self.moved:
            self.undo()
        if not native.subtract(self.params, rates, direction):
            with torch.no_grad():
                for p, part, rate in zip(self.params, direction.split(self._sizes), rates, strict=True):
                    p.add_(part.view(p.shape).to(p.dtype), alpha=-rate)
        self.moved = True

    @torch.no_grad()
    def undo(self) -> None:
        """Return to the saved parameters exactly."""
        if self.moved:
            for p, saved in zip(self.params, self._saved, strict=True):
                p.copy_(saved)
            self.moved = False

    @torch.no_grad()
    def decay(self, coefficients: list[float]) -> None:
        """Subtract coefficient * theta of before the move from each parameter (decoupled weight decay)."""
        for k, (p, c) in enumerate(zip(self.params, coefficients, strict=True)):
            if c != 0:
                p.add_(self._saved[k], alpha=-c)
