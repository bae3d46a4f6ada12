"""Factors that are made once more when they are asked for, where keeping all of them would take too much memory."""

from __future__ import annotations


class Refactored:
    """U -> (damped matrix)^-1 J^T u of one of several solves, whose factor is made anew at its first use and then kept.

    It stays that of its own solve, whatever is solved later. name, options, rcond, wide: as the solve had them. problem: makes
    its Problem. shared: a list that the solves have in common; it holds the one of them that has a factor.
    """

    def __init__(self, name: str, problem, options, rcond: float, wide: bool, shared: list):
        self._arguments, self._shared, self._again = (name, problem, options, rcond, wide), shared, None

    def __call__(self, u):
        """(P,) of u, (M,)."""
        if self._again is None:
            from .choice import BY_NAME  # which has the solvers, and they this

            name, problem, options, rcond, wide = self._arguments
            for other in self._shared:
                other._again = None
            self._again = BY_NAME[name].solve(problem(), options, rcond, wide, None, 0).again
            self._shared[:] = [self]
        return self._again(u)
