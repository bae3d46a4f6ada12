"""Damping rules: how mu follows the gain ratio rho = actual / predicted reduction.

A rule is pure: each verb takes mu and what the rule remembers beside it, and returns both anew. So one rule object serves one
network, the members of an ensemble, and, as its arithmetic is the same on numbers and on 0-dim float64 tensors, a CUDA graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

SMALLEST, LARGEST = 1e-250, 1e250   # they keep mu and its products finite, and bind on no sensible scale
START, SCALED_START = 1e-3, 1e-4   # the first mu over its scale, where none is given; with Marquardt's D
RESOLVED = 1e-3   # part of g . delta that the loss's own curvature must make up to be told from rounding
RANGE = 1e20   # how far from the curvature along a step mu may go
HELD = 1e36    # that float32 holds, with its inverse

Memory = dict[str, float]


def select(condition, a, b):
    """`a` where the condition holds, else `b`: for numbers and for tensors."""
    return torch.where(condition, a, b) if isinstance(condition, torch.Tensor) else a if condition else b


def bounded(x, low: float, high: float):
    """x, but at least `low` and at most `high`: for numbers and for tensors."""
    return x.clamp(low, high) if isinstance(x, torch.Tensor) else min(max(x, low), high)


def largest(dtype: torch.dtype) -> float:
    """The largest mu that may be tried with parameters of this type."""
    return LARGEST if dtype == torch.float64 else HELD


def bounds(before, curvature, dtype: torch.dtype):
    """(least, largest) mu after a step that began at the mu `before`, for numbers and for tensors.

    curvature: of the loss along the last step, in the norm of the damping, the scale of mu; NaN where it is not known. From
    RANGE times it mu goes no further away; it is never moved by its bounds, as curvatures of single steps may be anything.
    """
    low, high = SMALLEST if dtype == torch.float64 else 1 / HELD, largest(dtype)
    if isinstance(before, torch.Tensor):
        least, most = (curvature / RANGE).clamp_min(low), (curvature * RANGE).clamp_max(high)
        return torch.minimum(before, least), torch.maximum(before, most)
    if curvature != curvature:
        return min(before, low), max(before, high)
    return min(before, max(curvature / RANGE, low)), max(before, min(curvature * RANGE, high))


def raised(mu, factor, curvature: Callable[[], float]):
    """The product of mu and a factor; where mu is 0, the model's curvature along the step, which is the scale of mu."""
    if isinstance(mu, float) and mu == 0:   # on a device mu is positive
        return bounded(curvature(), SMALLEST, LARGEST)
    return bounded(mu * factor, 0.0, LARGEST)


def first_damping(scale: float, rule: DampingRule, scaled: bool = False) -> float:
    """The first mu where none is given.

    scale: its scale, a curvature in the norm of D; 0 where there is none. scaled: is D Marquardt's?
    """
    return max((SCALED_START if scaled else START) * (scale or 1.0), rule.smallest)


class DampingRule(ABC):
    """A damping rule; subclass it, and define `accepted` and `rejected`, for one of your own.

    Every verb returns (mu, memory) for the next attempt. mu: the damping that was tried. memory: what `memory()` gave at the
    start, or the last verb; numbers by name. rho: the gain ratio, -inf where the step or the loss there was of no use, NaN
    where there is none. curvature: a function that computes the model's curvature along the step, g . delta / ||delta||^2, the
    scale of mu when mu itself is 0.

    Attributes: tries, may the rule reject a step? If not, every usable step is kept. sweeps, does it try several dampings at
    once? smallest: mu never falls below it. target, the gain ratio that a step must reach to be kept; 0: descent is enough, as
    it is at a step's last attempt. learns: is it told what each step gained and cost (see auto.py)?
    """

    tries = True
    sweeps = False
    smallest = SMALLEST
    target = 0.0
    learns = False

    def corrects(self, memory: Memory) -> bool:
        """Whether this step is to be corrected, where there is an acceleration."""
        return True

    @property
    def captured(self) -> DampingRule:
        """The rule of captured steps, whose memory is a part of this one's."""
        return self

    def interrupted(self, memory: Memory) -> Memory:
        """The memory after captured steps, of which the rule has seen nothing."""
        return memory

    def memory(self) -> Memory:
        """What the rule remembers beside mu before the first step."""
        return {}

    @abstractmethod
    def accepted(self, mu, memory: Memory, rho):
        """After a step that was kept."""

    @abstractmethod
    def rejected(self, mu, memory: Memory, rho, curvature: Callable[[], float]):
        """After a step that was undone."""

    def failed(self, mu, memory: Memory, curvature: Callable[[], float]):
        """After a solve that gave no usable step: as for a rejection."""
        return self.rejected(mu, memory, float("-inf"), curvature)

    def exhausted(self, mu, memory: Memory):
        """After the last attempt; mu: that of the first. Ten times it: a burst of rejections must not freeze the run.

        The step goes on from where its attempts stood instead, if that is more and their promises were still real.
        """
        return bounded(10 * mu, 0.0, LARGEST), memory

    def lowered(self, mu, memory: Memory):
        """After an attempt at a mu so far above the curvature that its promise is lost in the loss's rounding."""
        return bounded(mu / 1000, self.smallest, LARGEST), memory

    def dampings(self, mu: float) -> list[float]:
        """The dampings to try at once around mu, ascending, for a rule that `sweeps`."""
        return [mu]


def _checked(smallest: float) -> float:
    if not (isinstance(smallest, (int, float)) and 0 < smallest < LARGEST):
        raise ValueError(f"pgdfast.LM: a damping rule's smallest mu is {smallest!r}; it must be a positive number.")
    return float(smallest)


class Constant(DampingRule):
    """mu as given; every finite step is taken (the paper's plain LM). A failed factorization tries 10 mu, this step only."""

    tries = False
    smallest = LARGEST   # it never falls

    def accepted(self, mu, memory, rho):
        """Unchanged."""
        return mu, memory

    def rejected(self, mu, memory, rho, curvature):
        """Unchanged: a line search that failed does not move mu."""
        return mu, memory

    def failed(self, mu, memory, curvature):
        """Ten times mu, for another factorization of the same step."""
        return raised(mu, 10.0, curvature), memory

    def exhausted(self, mu, memory):
        """Unchanged."""
        return mu, memory


class GainRatio(DampingRule):
    """Nielsen's rule (Damping parameter in Marquardt's method, IMM-REP-1999-05, eq. 3.5).

    Accepted: mu * max(1/3, 1 - (2 rho - 1)^3), nu = 2. Rejected: mu * nu, nu doubles. smallest: mu never falls below it. A
    model that is linear in its parameters is predicted exactly, and mu falls for ever: on small noisy batches that fits each
    one's noise, unless this bounds it.
    """

    def __init__(self, smallest: float = SMALLEST):
        self.smallest = _checked(smallest)

    def memory(self) -> Memory:
        """nu, by which the next rejection raises mu."""
        return {"nu": 2.0}

    def accepted(self, mu, memory, rho):
        """Down by at most 3; up when the model was poor."""
        if isinstance(mu, float) and mu == 0:
            return mu, {"nu": 2.0}
        factor = bounded(1 - (2 * bounded(rho, 0.0, 1.0) - 1) ** 3, 1 / 3, 2.0)
        return select(rho != rho, mu, bounded(mu * factor, self.smallest, LARGEST)), {"nu": 2.0}

    def rejected(self, mu, memory, rho, curvature):
        """Up by 2, 4, 8, ... in a row."""
        nu = memory["nu"]
        return raised(mu, nu, curvature), {"nu": bounded(2 * nu, 0.0, LARGEST)}

    def exhausted(self, mu, memory):
        """Ten times the mu that the step began with, nu = 2."""
        return super().exhausted(mu, {"nu": 2.0})


class Delayed(DampingRule):
    """Delayed gratification (Transtrum and Sethna, arXiv 1201.5885, section 4): accepted mu / 5, rejected 2 mu.

    smallest: as for GainRatio.
    """

    def __init__(self, smallest: float = SMALLEST):
        self.smallest = _checked(smallest)

    def accepted(self, mu, memory, rho):
        """Down by 5."""
        return (mu if isinstance(mu, float) and mu == 0 else bounded(mu / 5, self.smallest, LARGEST)), memory

    def rejected(self, mu, memory, rho, curvature):
        """Up by 2."""
        return raised(mu, 2.0, curvature), memory


class Longest(DampingRule):
    """The longest acceptable step: mu as small as a gain ratio of at least `target` allows.

    A step below the target is undone, though it may descend, and 4 mu is tried, from the same matrix. Accepted:
    mu * 0.1^e, e = (rho - target) / (1 - target) from 0 to 1, so that mu rests where rho is the target.

    Args:
        target (float in (0, 1), default 0.25): small ones suit corrections; without one 0.5 is faster, and less apt to end in a
            poor minimum.
        smallest: as for GainRatio.

    Source: the target ratio of DSGNAR, arXiv 2607.02194.
    """

    def __init__(self, target: float = 0.25, smallest: float = SMALLEST):
        if not (isinstance(target, (int, float)) and 0 < target < 1):
            raise ValueError(f"pgdfast.LM: Longest's target is {target!r}; it is a gain ratio, between 0 and 1.")
        self.target, self.smallest = float(target), _checked(smallest)

    def accepted(self, mu, memory, rho):
        """Down by at most 10, by less the nearer rho is to the target."""
        if isinstance(mu, float) and mu == 0:
            return mu, memory
        excess = bounded((rho - self.target) / (1 - self.target), 0.0, 1.0)
        return select(rho != rho, mu, bounded(mu * 0.1**excess, self.smallest, LARGEST)), memory

    def rejected(self, mu, memory, rho, curvature):
        """Up by 4."""
        return raised(mu, 4.0, curvature), memory


class Sweep(DampingRule):
    """Several mu at every step, mu times each factor; the one with the least loss becomes the next step's mu.

    factors: positive numbers; the solves share a linearization, and where the closure runs under torch.func.vmap the trial
    losses share one run. None better than the loss before: mu is raised until its least factor lies beyond all that were tried.
    smallest: as for GainRatio. mu = 0 is tried alone. Greedy: the best next loss is not the best path (bench/NOTES.md).
    """

    sweeps = True

    def __init__(self, factors=(0.1, 10**-0.5, 1.0, 10**0.5, 10.0), smallest: float = SMALLEST):
        factors = tuple(factors)
        if not factors or not all(isinstance(f, (int, float)) and 0 < f < LARGEST for f in factors):
            raise ValueError(f"pgdfast.LM: Sweep's factors are {factors!r}; they must be positive numbers, at least one.")
        self.factors, self.smallest = tuple(sorted(map(float, factors))), _checked(smallest)

    def dampings(self, mu: float) -> list[float]:
        """Those to try around mu, ascending, each once."""
        return sorted({bounded(mu * f, self.smallest, LARGEST) for f in self.factors}) if mu > 0 else [0.0]

    def accepted(self, mu, memory, rho):
        """The winner's mu."""
        return mu, memory

    def rejected(self, mu, memory, rho, curvature):
        """Beyond the largest that was tried."""
        return raised(mu, max(2.0, 2.0 / self.factors[0]), curvature), memory
