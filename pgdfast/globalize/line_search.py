"""Line searches along a descent direction."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Armijo:
    """Backtracking: the first t = factor^k, k < trials, with L(theta - t d) <= L - c t g.d (arXiv 2601.03162's values)."""

    c: float = 1e-4
    factor: float = 0.5
    trials: int = 10

    def search(self, evaluate, loss: float, slope: float):
        """(t, loss there, trials), with t None if no trial descends enough.

        evaluate: t -> loss. slope: g.d > 0, the decrease per unit t.
        """
        t = 1.0
        for trial in range(1, self.trials + 1):
            value = evaluate(t)
            if self.enough(value, loss, t, slope):
                return t, value, trial
            t *= self.factor
        return None, loss, self.trials

    def enough(self, value: float, loss: float, t: float, slope: float) -> bool:
        """Whether `value`, reached from `loss` by a step of t, is a sufficient decrease."""
        return math.isfinite(value) and value <= loss - self.c * t * slope


def line_search(search):
    """None, the search of a name, or the given object if it has `search`.

    Raises ValueError for an unknown name, TypeError for an object without `search`.
    """
    if search is None or hasattr(search, "search"):
        return search
    if search == "armijo":
        return Armijo()
    if isinstance(search, str):
        raise ValueError(f"pgdfast.LM: unknown line_search {search!r}; use None, 'armijo', or an object with search().")
    raise TypeError(f"pgdfast.LM: line_search {search!r} has no search(evaluate, loss, slope) method.")
