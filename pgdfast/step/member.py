"""One network in a step."""

from __future__ import annotations

import math

import torch

from ..report import Report
from .attempt import State
from .rules import RESOLVED, bounded, bounds


class Member:
    """One network in a step: its report, where its damping stands, and its last solution."""

    __slots__ = (
        "curvature", "failures", "keep", "memory", "number", "prior", "report", "scaled", "solution", "state", "trial", "why",
        "wide",
    )

    def __init__(self, number: int, memory: dict, mu: float, report: Report):
        self.number, self.memory, self.report = number, memory, report
        self.state = State(mu, memory["rule"], mu, 0, memory["rejected"])
        self.wide, self.keep, self.failures = memory["wide"], memory["keep"], 0
        self.curvature, self.scaled = memory.get("curvature", math.nan), memory.get("scaled")   # states of old have none
        self.prior = self.solution = self.trial = None
        self.why = ""   # advice beside that of advice()

    def settled(self, dtype: torch.dtype) -> tuple[float, bool]:
        """(mu for the next step, is it at its upper bound?); from here on `curvature` is that along this step, if it shows."""
        solution, mu = self.solution, self.report.damping
        curved = solution.gain - solution.damped - solution.slack
        if curved > RESOLVED * solution.gain and solution.damped > 0:
            self.curvature = mu * curved / solution.damped
        low, high = bounds(self.state.start, self.curvature, dtype)
        mu = bounded(self.state.mu, low, high)
        return mu, mu >= high
