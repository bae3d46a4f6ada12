"""One network in a step."""

from __future__ import annotations

import math

import torch

from ..report import Report
from .attempt import State
from .rules import RESOLVED, DampingRule, bounded, bounds


class Member:
    """One network in a step: its report, where its damping stands, and its last solution."""

    __slots__ = (
        "acceleration", "cost", "curvature", "failures", "keep", "memory", "number", "prior", "report", "scaled", "solution",
        "state", "trial", "why", "wide",
    )

    def __init__(self, number: int, memory: dict, mu: float, report: Report):
        self.number, self.memory, self.report = number, memory, report
        self.state = State(mu, memory["rule"], mu, 0, memory["rejected"])
        self.wide, self.keep, self.failures = memory["wide"], memory["keep"], 0
        self.curvature = memory.get("curvature", math.nan)   # former states have neither
        self.scaled = memory.get("scaled", False)
        self.prior = self.solution = self.trial = self.acceleration = self.cost = None
        self.why = ""   # advice beside that of advice()

    def begin(self, rule: DampingRule, correctable: bool) -> None:
        """Let a rule that learns look at the loss before it is asked for more."""
        mu, memory = rule.begins(self.state.mu, self.state.memory, self.report.loss, correctable)
        self.state = self.state._replace(mu=mu, memory=memory, start=mu)
        self.report.mode = rule.mode(memory)

    def learn(self, rule: DampingRule, comparable: bool) -> State:
        """The state, of whose memory the rule has learned what the step did and cost; see Auto.ended."""
        self.state = self.state._replace(memory=rule.ended(self.state.memory, self.report, self.cost, comparable))
        return self.state

    def settled(self, dtype: torch.dtype) -> tuple[float, bool]:
        """(mu for the next step, is it at its upper bound?); from here on `curvature` is that along this step, if it shows."""
        solution, mu = self.solution, self.report.damping
        curved = solution.gain - solution.damped - solution.slack
        if curved > RESOLVED * solution.gain and solution.damped > 0:
            self.curvature = mu * curved / solution.damped
        low, high = bounds(self.state.start, self.curvature, dtype)
        mu = bounded(self.state.mu, low, high)
        return mu, mu >= high
