"""The step of an ensemble: the algorithm of lm.py for B members at once, each with its own mu, trial and verdict.

One closure call linearises all members and one evaluates all their trials; one call solves their systems. A member that has
its step waits for the others, where it stands.
"""

from __future__ import annotations

import copy
import math
from operator import is_
from time import perf_counter

import torch

from . import globalize
from .globalize import judged
from .linear import EnsembleLinearizer, losses_of
from .report import EnsembleReport, Report, advice, stall
from .solve import MemberSolutions, solve_members

ATTEMPTS = 12   # dampings tried in one step before it is given up, by one network as by many


class Lockstep:
    """LM's step for `count` members; options as LM has them, one rule copied for each."""

    def __init__(self, count: int, rule, search, backend: str):
        self.count, self.search = count, search
        self.rules = [copy.deepcopy(rule) for _ in range(count)]
        self._backend, self._linearizer = backend, None

    def __getstate__(self) -> dict:
        """Copies start without plans, which belong to the original's parameters."""
        return self.__dict__ | {"_linearizer": None}

    @property
    def tries(self) -> bool:
        """Whether steps are tried before they are kept."""
        return self.rules[0].tries or self.search is not None

    def linearize(self, closure, params):
        """Linearise, keeping plans while the parameters stay the same tensors."""
        known = self._linearizer
        if known is None or len(known.params) != len(params) or not all(map(is_, known.params, params)):
            self._linearizer = known = EnsembleLinearizer(params, self.count, self._backend)
        return known(closure)

    def begin(self, memory: dict, damping) -> None:
        """Make room in the optimizer's memory at its first step; give the rules what it remembers."""
        if "step" not in memory:
            memory.update(
                step=0, damping=each_of(damping, self.count, "damping") if self.rules[0].tries else None,
                rules=[rule.state_dict() for rule in self.rules], wide=[False] * self.count,
                keep=[{} for _ in range(self.count)], rejected=[0] * self.count,
            )
        for rule, state in zip(self.rules, memory["rules"], strict=True):
            rule.load_state_dict(state)

    def step(self, closure, params, rates, decays, memory, generators, mus: list[float], scale_of, solver, cg, rcond):
        """Take one step for every member; (losses before it (B,), EnsembleReport).

        mus: each member's mu to begin with. scale_of: lin -> D, (B, P), or None. Members whose loss is not finite are left
        alone. Raises as LM.step does; the parameters are then as they were.
        """
        start = perf_counter()
        draws = generators.draws(closure, params[0].device) if self.tries else None
        lin = self.linearize(closure, params)
        if draws is not None:
            draws.linearised()
        reports = [Report(loss, residuals=lin.num_residuals, parameters=lin.num_parameters) for loss in lin.losses]
        seconds = {"linearize": perf_counter() - start, "solve": 0.0, "trial": 0.0}
        pending = self._fit(lin, reports)
        run = _Run(self, closure, lin, draws, globalize.MembersMove(params, rates), reports, seconds, memory)
        decaying = any(d for each in decays for d in each)
        if self.tries or decaying:
            run.move.save()
        try:
            run.descend(pending, list(mus), scale_of(lin) if pending else None, solver, cg, rcond)
        except BaseException:
            run.move.all_back()
            raise
        if decaying:
            run.move.decay(decays)
        memory["step"] += 1
        memory["rules"] = [rule.state_dict() for rule in self.rules]
        return lin.loss, EnsembleReport(reports, seconds)

    def _fit(self, lin, reports) -> list[int]:
        """The members that can take a step; the others are told why not."""
        pending = []
        for b, report in enumerate(reports):
            if not math.isfinite(report.loss):
                report.status = "failed"
                report.advice = (
                    f"its loss is {report.loss}: it is left as it is, and the others go on; check its data and parameters, or "
                    "give it new ones"
                )
            elif lin.num_residuals == 0 and not lin.penalties:
                report.status, report.advice = "empty", "the closure's batch has no residuals; nothing was changed"
            else:
                pending.append(b)
        return pending


class _Run:
    """One step's work: `lin` and `move` of all members, and a report for each."""

    def __init__(self, lockstep, closure, lin, draws, move, reports, seconds, memory):
        self.rules, self.search, self.tries = lockstep.rules, lockstep.search, lockstep.tries
        self.closure, self.lin, self.draws, self.move = closure, lin, draws, move
        self.reports, self.seconds, self.memory = reports, seconds, memory

    def descend(self, pending, mu, scale, solver, cg, rcond) -> None:
        """Try dampings until every member has a step that is kept, or has tried enough."""
        lin, reports, memory, first = self.lin, self.reports, self.memory, list(mu)
        members, failures = list(pending), dict.fromkeys(pending, 0)
        promised, last = {}, {}
        for attempt in range(1, ATTEMPTS + 1):
            start = perf_counter()
            there = self._return()
            solutions = solve_members(
                lin, {b: mu[b] for b in pending}, scale=scale, solver=solver, cg=cg, rcond=rcond, wide=memory["wide"],
                keep=memory["keep"], time=memory["step"],
            )
            self.seconds["solve"] += perf_counter() - start
            self.move.again(there)
            last |= solutions
            for b, solution in solutions.items():
                memory["wide"][b], memory["keep"][b] = solution.wide, solution.keep
                reports[b].attempts, reports[b].damping = attempt, mu[b]
                reports[b].of(solution)
            start = perf_counter()
            kept = self._try(_usable(solutions), {b for b in pending if mu[b] == first[b]})
            self.seconds["trial"] += perf_counter() - start
            again = []
            for b in pending:
                rule, report, solution = self.rules[b], reports[b], solutions[b]
                if b in kept:
                    mu[b] = rule.accepted(mu[b], report.gain_ratio)
                elif not solution.usable:
                    failures[b] += 1
                    report.status = "failed"
                    mu[b] = rule.invalid(mu[b], self._curvature(b, solution))
                    again.append(b)
                elif report.status != "stalled" and rule.tries:
                    promised.setdefault(b, report.predicted_reduction)
                    mu[b] = rule.rejected(mu[b], report.gain_ratio, self._curvature(b, solution))
                    again.append(b)
            pending = again
            if not pending:
                break
        for b in pending:
            mu[b] = self.rules[b].exhausted(first[b])
        self._conclude(members, mu, last, failures, promised)

    def _conclude(self, members, mu, last, failures, promised) -> None:
        memory, dtype = self.memory, self.lin.dtype
        for b in members:
            report, tries = self.reports[b], self.rules[b].tries
            report.next_damping = mu[b] if tries else report.damping
            if tries:
                memory["damping"][b] = mu[b]
            report.advice = advice(report, last[b], failures[b], dtype)
            memory["rejected"][b] = memory["rejected"][b] + 1 if report.status == "rejected" and tries else 0
            stalled = stall(report, promised.get(b), memory["rejected"][b], mu[b] >= globalize.LARGEST, dtype)
            if stalled:
                report.status, report.advice = "stalled", stalled

    def _return(self):
        """Make the linearisation usable again. Members that have their step must go back for it only where all share it."""
        there = None if self.lin.separates else self.move.set_aside()
        self.lin.parameters_unchanged()
        return there

    def _curvature(self, b: int, solution) -> float:
        if solution.gain > 0:   # then the step says it
            return globalize.curvature(None, solution)
        there = self._return()
        curvature = globalize.curvature(self.lin.member(b), solution)
        self.move.again(there)
        return curvature

    def _try(self, solutions, first) -> set[int]:
        """Take these members' steps, or what a search along them finds; the members whose steps are kept."""
        if not solutions:
            return set()
        if not self.tries:
            self.move.to({b: s.step for b, s in solutions.items()}, dict.fromkeys(solutions, 1.0), solutions.steps)
            for b in solutions:
                self.reports[b].loss_after, self.reports[b].status = None, "accepted"
            return set(solutions)
        models = {b: globalize.predictions(self._member(b), self.move.of(b), s) for b, s in solutions.items()}
        if self.search is None:
            after = self._losses(solutions, dict.fromkeys(solutions, 1.0))
            found = {b: (1.0, after[b]) for b in solutions}
        else:
            found = self._search(solutions, {b: slope for b, (_, slope) in models.items()})
        kept = set()
        for b, (t, loss) in found.items():
            report = self.reports[b]
            report.line_search = t if self.search is not None else None
            if judged(report, loss, models[b][0](t or 1.0), t is not None, b in first, self.lin.dtype):
                kept.add(b)
        self.move.back([b for b in solutions if b not in kept])
        return kept

    def _member(self, b: int):
        """Member b's linearisation where predictions need products with it, which groups of different rates do."""
        return self.lin.member(b) if self.move.one_rate(b) is None else None

    def _losses(self, solutions, lengths: dict[int, float]) -> list[float]:
        """Go to theta - t d and stay: all members' losses. Cost: one run of the closure."""
        self.move.to({b: solutions[b].step for b in lengths}, lengths, solutions.steps)
        for b in lengths:
            self.reports[b].trials += 1
        with self.draws:
            result = globalize.run_trial(self.closure, self.move.params, self.lin.tapeless, self.draws)
        return losses_of(result, self.lin.count)

    def _search(self, solutions, slopes) -> dict[int, tuple[float | None, float]]:
        """{member: (t, loss there)}, t None where no trial descends enough: backtracking side by side."""
        search, found = self.search, {b: (None, self.reports[b].loss) for b in solutions}
        lengths = dict.fromkeys(solutions, 1.0)
        for _ in range(search.trials):
            losses = self._losses(solutions, lengths)
            for b, t in list(lengths.items()):
                if search.enough(losses[b], self.reports[b].loss, t, slopes[b]):
                    found[b] = t, losses[b]
                    del lengths[b]
                else:
                    lengths[b] = t * search.factor
            if not lengths:
                break
        return found


_OF_MEMBERS = {"damping": "damping", "rules": "rule", "wide": "wide", "keep": "keep", "rejected": "rejected"}
"""What the optimizer remembers of every member, and what LM calls it that trains one network alone."""


def share_of(state: dict, b: int) -> dict:
    """Member b's share of an ensemble's state_dict: the state_dict of an LM that trains it alone."""
    shares = {}
    for k, values in state["state"].items():
        shares[k] = {
            _OF_MEMBERS.get(name, name): value if name == "step" or value is None else copy.copy(value[b])
            for name, value in values.items()
        }
    groups = [group | {"lr": group["lr"] if _one(group["lr"]) else float(group["lr"][b])} for group in state["param_groups"]]
    return {"state": shares, "param_groups": groups}


def joined(states: list[dict]) -> dict:
    """The inverse of `share_of`: one state_dict for an ensemble of these members.

    Raises ValueError for members that have taken different numbers of steps.
    """
    first = states[0]["state"]
    steps = [[values.get("step") for values in state["state"].values()] for state in states]
    if any(taken != steps[0] for taken in steps):
        told = ", ".join(str(max(filter(None, taken), default=0)) for taken in steps)
        raise ValueError(
            f"pgdfast.LM: members that have taken {told} steps cannot go on as one ensemble; join those with equally many."
        )
    alone = {own: of_all for of_all, own in _OF_MEMBERS.items()}
    memory: dict = {}
    for k, values in first.items():
        memory[k] = {}
        for name in (*values, "rejected") if "step" in values and "rejected" not in values else values:
            each = [state["state"][k].get(name, 0 if name == "rejected" else None) for state in states]
            alike = name == "step" or all(value is None for value in each)
            memory[k][alone.get(name, name)] = (
                each[0] if alike else torch.stack(each) if isinstance(each[0], torch.Tensor) else each)
    groups = []
    for k, group in enumerate(states[0]["param_groups"]):
        rates = [state["param_groups"][k]["lr"] for state in states]
        groups.append(group | {"lr": rates[0] if all(rate == rates[0] for rate in rates) else rates})
    return {"state": memory, "param_groups": groups}


def _one(rate) -> bool:
    """Whether all members have this learning rate."""
    return rate.dim() == 0 if isinstance(rate, torch.Tensor) else not isinstance(rate, (list, tuple))


def _usable(solutions: MemberSolutions) -> MemberSolutions:
    if all(s.usable for s in solutions.values()):
        return solutions
    return MemberSolutions({b: s for b, s in solutions.items() if s.usable})


def each_of(value, count: int, name: str) -> list[float]:
    """B numbers from one number or from B. Raises ValueError for another count, negative ones and what is not finite."""
    values = value.tolist() if isinstance(value, torch.Tensor) else value
    values = list(values) if isinstance(values, (list, tuple)) else [values] * count
    if len(values) != count or not all(isinstance(v, (int, float)) and 0 <= v < math.inf for v in values):
        raise ValueError(
            f"pgdfast.LM: {name} of an ensemble of {count} is {value!r}; it must be a finite number that is not negative, or "
            f"{count} of them."
        )
    return [float(v) for v in values]
