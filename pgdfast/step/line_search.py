"""Line searches along a descent direction.

A search is a generator: it yields a length t, is sent the loss at theta - t d, and returns the length that it settles on, or
None. So the members of an ensemble search side by side, each of their rounds one run of the closure.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class LineSearch(Protocol):
    """A line search of one's own: any object with this `search`."""

    def search(self, loss: float, slope: float) -> Generator[float, float, float | None]:
        """Yield lengths t, receive the losses there, return one of those or None. slope: g . d > 0, the decrease per unit t."""


@dataclass(frozen=True, slots=True)
class Armijo:
    """Backtracking: the first t = factor^k, k < trials, with L(theta - t d) <= L - c t g.d (arXiv 2601.03162's values)."""

    c: float = 1e-4
    factor: float = 0.5
    trials: int = 10

    def search(self, loss: float, slope: float) -> Generator[float, float, float | None]:
        """See LineSearch."""
        t = 1.0
        for _ in range(self.trials):
            value = yield t
            if math.isfinite(value) and value <= loss - self.c * t * slope:
                return t
            t *= self.factor
        return None


def chosen_search(search) -> LineSearch | None:
    """None, the search of a name, or the given object if it has `search`.

    Raises ValueError for an unknown name, TypeError for an object without `search`.
    """
    if search is None:
        return None
    if isinstance(search, str):
        if search == "armijo":
            return Armijo()
        raise ValueError(f"pgdfast.LM: unknown line_search {search!r}; use None, 'armijo', or an object with search().")
    if isinstance(search, LineSearch):
        return search
    raise TypeError(f"pgdfast.LM: line_search {search!r} has no search(loss, slope) method; see pgdfast.LineSearch.")
