"""Damping rules: how mu follows the gain ratio rho = actual / predicted reduction.

A rule is any object with `tries` (may it reject a step?), `accepted(mu, rho)`, `rejected(mu, rho, curvature)`,
`invalid(mu, curvature)` and `exhausted(mu)`, each returning the next mu, and `state_dict()` / `load_state_dict()`.
`curvature` is the model's curvature along the step, g . delta / ||delta||^2: the scale of mu when mu itself is 0. A rule that
also has `dampings(mu)`, a list, has all of those tried; the others are then given the mu of the best.
"""

from __future__ import annotations

SMALLEST, LARGEST = 1e-20, 1e20


def _checked(smallest: float) -> float:
    if not (isinstance(smallest, (int, float)) and 0 < smallest < LARGEST):
        raise ValueError(f"pgdfast.LM: a damping rule's smallest mu is {smallest!r}; it must be a positive number.")
    return float(smallest)


def _raised(mu: float, factor: float, curvature: float) -> float:
    if mu == 0:
        return min(max(curvature, SMALLEST), LARGEST)
    return min(mu * factor, LARGEST)


class Constant:
    """mu as given; every finite step is taken (the paper's plain LM). A failed factorisation tries 10 mu, this step only."""

    tries = False

    def accepted(self, mu: float, rho: float | None) -> float:
        """Unchanged."""
        return mu

    def rejected(self, mu: float, rho: float, curvature: float) -> float:
        """Unchanged: a line search that failed does not move mu."""
        return mu

    def invalid(self, mu: float, curvature: float) -> float:
        """Ten times mu, for another factorisation of the same step."""
        return _raised(mu, 10.0, curvature)

    def exhausted(self, mu: float) -> float:
        """Unchanged."""
        return mu

    def state_dict(self) -> dict:
        """Nothing to remember."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore."""


class GainRatio:
    """Nielsen's rule (Damping parameter in Marquardt's method, IMM-REP-1999-05, eq. 3.5).

    Accepted: mu * max(1/3, 1 - (2 rho - 1)^3), nu = 2. Rejected: mu * nu, nu doubles. smallest: mu never falls below it. A
    model that is linear in its parameters is predicted exactly, and mu falls for ever: on small noisy batches that fits each
    one's noise, unless this bounds it.
    """

    tries = True

    def __init__(self, smallest: float = SMALLEST):
        self.nu, self.smallest = 2.0, _checked(smallest)

    def accepted(self, mu: float, rho: float | None) -> float:
        """Down by at most 3; up when the model was poor."""
        self.nu = 2.0
        if rho is None:
            return mu
        factor = max(1 / 3, 1 - (2 * min(max(rho, 0.0), 1.0) - 1) ** 3)
        return min(max(mu * factor, self.smallest), LARGEST) if mu > 0 else 0.0

    def rejected(self, mu: float, rho: float, curvature: float) -> float:
        """Up by 2, 4, 8, ... in a row."""
        mu = _raised(mu, self.nu, curvature)
        self.nu = min(2 * self.nu, LARGEST)
        return mu

    def invalid(self, mu: float, curvature: float) -> float:
        """As for a rejection."""
        return self.rejected(mu, 0.0, curvature)

    def exhausted(self, mu: float) -> float:
        """Ten times the mu that the step began with, nu = 2: a burst of rejections must not freeze the run."""
        self.nu = 2.0
        return min(10 * mu, LARGEST)

    def state_dict(self) -> dict:
        """The growth factor nu."""
        return {"nu": self.nu}

    def load_state_dict(self, state: dict) -> None:
        """Restore nu."""
        self.nu = float(state["nu"])


class _Memoryless:
    """What rules that try steps and remember nothing but mu have in common."""

    tries = True

    def invalid(self, mu: float, curvature: float) -> float:
        """As for a rejection."""
        return self.rejected(mu, 0.0, curvature)

    def exhausted(self, mu: float) -> float:
        """Ten times the mu that the step began with: a burst of rejections must not freeze the run."""
        return min(10 * mu, LARGEST)

    def state_dict(self) -> dict:
        """Nothing to remember."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore."""


class Delayed(_Memoryless):
    """Delayed gratification (Transtrum and Sethna, arXiv 1201.5885, section 4): accepted mu / 5, rejected 2 mu.

    smallest: as for GainRatio.
    """

    def __init__(self, smallest: float = SMALLEST):
        self.smallest = _checked(smallest)

    def accepted(self, mu: float, rho: float | None) -> float:
        """Down by 5."""
        return max(mu / 5, self.smallest) if mu > 0 else 0.0

    def rejected(self, mu: float, rho: float, curvature: float) -> float:
        """Up by 2."""
        return _raised(mu, 2.0, curvature)


class Sweep(_Memoryless):
    """Several mu at every step, mu times each factor; the one with the least loss becomes the next step's mu.

    factors: positive numbers; the solves share a linearisation, and where the closure runs under torch.func.vmap the trial
    losses share one run. None better than the loss before: mu is raised until its least factor lies beyond all that were tried.
    smallest: as for GainRatio. mu = 0 is tried alone. Greedy: the best next loss is not the best path (bench/NOTES.md).
    """

    def __init__(self, factors=(0.1, 10**-0.5, 1.0, 10**0.5, 10.0), smallest: float = SMALLEST):
        factors = tuple(factors)
        if not factors or not all(isinstance(f, (int, float)) and 0 < f < LARGEST for f in factors):
            raise ValueError(f"pgdfast.LM: Sweep's factors are {factors!r}; they must be positive numbers, at least one.")
        self.factors, self.smallest = tuple(sorted(map(float, factors))), _checked(smallest)

    def dampings(self, mu: float) -> list[float]:
        """Those to try around mu, ascending, each once."""
        return sorted({min(max(mu * f, self.smallest), LARGEST) for f in self.factors}) if mu > 0 else [0.0]

    def accepted(self, mu: float, rho: float | None) -> float:
        """The winner's mu."""
        return mu

    def rejected(self, mu: float, rho: float, curvature: float) -> float:
        """Beyond the largest that was tried."""
        return _raised(mu, max(2.0, 2.0 / self.factors[0]), curvature)


RULES = {"constant": Constant, "gain-ratio": GainRatio, "delayed": Delayed, "sweep": Sweep}
_VERBS = ("tries", "accepted", "rejected", "invalid", "exhausted", "state_dict", "load_state_dict")


def damping_rule(rule):
    """The rule of a name, or the given object if it has a rule's verbs.

    Raises ValueError for an unknown name and TypeError for an object that lacks a verb.
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(
                f"pgdfast.LM: damping_rule {rule!r} is not available; use one of {', '.join(RULES)}, or an object with "
                f"{', '.join(_VERBS)}."
            )
        return RULES[rule]()
    missing = [verb for verb in _VERBS if not hasattr(rule, verb)]
    if missing:
        raise TypeError(f"pgdfast.LM: damping_rule {rule!r} lacks {', '.join(missing)}; see pgdfast.globalize.damping.")
    return rule
