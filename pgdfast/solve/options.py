"""Options of solvers that have any."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CG:
    """Conjugate gradients: stop after `max_iterations` or at ||b - A x|| <= tolerance ||b||.

    The defaults are those of arXiv 2601.03162. Raises ValueError for values that are not positive.
    """

    max_iterations: int = 150
    tolerance: float = 1e-6

    def __post_init__(self):
        if not isinstance(self.max_iterations, int) or self.max_iterations < 1:
            raise ValueError(f"pgdfast.CG: max_iterations is {self.max_iterations!r}; it must be a positive integer.")
        if not self.tolerance > 0:
            raise ValueError(f"pgdfast.CG: tolerance is {self.tolerance!r}; it must be a positive number.")
