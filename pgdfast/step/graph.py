"""One attempt at a step by operations on tensors alone, to be captured as a CUDA graph: nothing waits for the device.

The same rules and verdict as on the host (attempt.py); the accepted branch is a `where`, and mu a number on the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..linear import loss_at
from ..report import NO_RATE, Report, advice, holds_few_digits, loss_test, stall
from ..solve import ADVICE, Direct, solve_direct
from ..tape import real_views
from .attempt import STATUS, State, Trial, advance, demanded, judge, without_damping
from .convergence import Facts, Tolerances, rounding_of
from .rules import RESOLVED, DampingRule, bounded, bounds, largest

_NOT_FINITE = len(STATUS)   # the status of a step whose loss before it is not finite
_REPORTED = ("loss", "after", "ratio", "predicted", "damping", "status", "attempts", "in_a_row", "promised", "possible", "rate")


class StepPlan(NamedTuple):
    """What was found out before the first step: how to solve, and the problem's size."""

    solve: Direct
    residuals: int
    parameters: int


class GraphStep:
    """The numbers of a step on the device, and the operations that take one from the next.

    params: tensors that stay where they are. groups: for each its parameter group. rule, tolerances: of the optimizer.
    linearizer: a Linearizer of its own, since a graph holds its plans' memory.
    """

    def __init__(self, closure, params: list[torch.Tensor], groups: list[int], rule: DampingRule, linearizer,
                 tolerances: Tolerances):
        self._tolerances = tolerances
        self._closure, self._groups, self._rule, self._linearizer = closure, groups, rule, linearizer
        self._given, self._params = params, real_views(params)
        self.remembered = tuple(rule.memory())
        self.fields = ("mu", "start", "attempt", "rejected", "promised", "curvature", *self.remembered)
        # What a step leaves for the next one, and what it reports besides, side by side in one tensor.
        self.numbers = torch.zeros(len(self.fields) + len(_REPORTED), dtype=torch.float64, device=params[0].device)
        count = max(groups) + 1
        self.rates, self.decays, self.given = (self.numbers.new_zeros(n) for n in (count, count, 1))
        self.decaying = False   # a graph without weight decay is shorter
        self.plan: StepPlan | None = None

    def load(self, state: dict[str, float]) -> None:
        """Put the state of the host's optimizer on the device."""
        values = torch.tensor([float(state[name]) for name in self.fields], dtype=torch.float64)
        self.numbers[: len(self.fields)].copy_(values)

    def fetch(self) -> dict[str, float]:
        """The state as numbers. Waits for the device."""
        return dict(zip(self.fields, self.numbers.tolist(), strict=False))

    def take(self) -> None:
        """One attempt: linearize, solve, try, keep or undo, decide."""
        tries, rule, self._params = self._rule.tries, self._rule, real_views(self._given)   # which may lie elsewhere now
        old = self.numbers[: len(self.fields)]
        mu, start, attempt, rejected, promised, curvature, *remembered = old.unbind()
        with torch.enable_grad():
            result = self._closure()
        with torch.no_grad():
            lin = self._linearizer.read(result, allow_sync=False)
            del result
            loss, fresh = lin.loss.double(), attempt == 0
            alive = torch.isfinite(loss)
            mu = mu if tries else torch.where(fresh, self.given[0], mu)
            memory = dict(zip(self.remembered, remembered, strict=True))
            start, promised = torch.where(fresh, mu, start), torch.where(fresh, math.nan, promised)
            state = State(mu, memory, start, attempt, rejected, promised)
            found = solve_direct(lin, mu, self.plan.solve.method, self.plan.solve.wide)
            eps = torch.finfo(lin.loss.dtype).eps
            predicted, possible = self._predicted(lin, found, eps)
            before = [p.detach().clone() for p in self._params]
            self._move(found.step)
            after = self._loss_here(before, lin.scalar) if tries else torch.full_like(loss, math.nan)
            trial = Trial(loss, after, predicted, found.usable & alive, mu, possible=possible)
            verdict = judge(trial, torch.isnan(promised), tries, eps, state.rejected > 0, state.mu > rule.smallest)
            if rule.target:
                verdict = demanded(rule, state, verdict)
            self._keep_or_undo(verdict.kept, before)
            state, over = advance(rule, state, trial, verdict)
            if tries:
                curved = found.gain - found.damped
                curvature = torch.where(curved > RESOLVED * found.gain, mu * curved / found.damped, curvature)
                (low, high), top = bounds(state.start, curvature, lin.loss.dtype), largest(lin.loss.dtype)
                state = state._replace(mu=torch.where(over, bounded(state.mu, low, high), state.mu.clamp_max(top)))
            following = (
                state.mu, state.start, state.attempt, state.rejected, state.promised, curvature, *state.memory.values()
            )
            status = torch.where(alive, verdict.status, _NOT_FINITE)
            ratio = torch.where(trial.usable, verdict.ratio, math.nan)
            report = (loss, torch.where(verdict.kept, after, loss), ratio, trial.predicted, mu, status, attempt + 1,
                      torch.where(over, state.rejected, 0.0), state.promised, possible, self.rates.max())
            following, report = (torch.stack([x.double() for x in numbers]) for numbers in (following, report))
            self.numbers.copy_(torch.cat([torch.where(alive, following, old), report]))
            lin.release()

    def _predicted(self, lin, found, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The predicted reduction of theta - rates * delta, and that without damping."""
        if len(self.rates) == 1:
            rate, slope, bend = self.rates[0], found.gain, found.gain - found.damped
            reduction = rate * slope - 0.5 * rate * rate * bend
            reduction = torch.where(rate <= 2, reduction.clamp_min(0.0), reduction)   # where only rounding makes it negative
            return reduction, without_damping(slope, bend, rate, eps, lin.loss.double())
        parts = found.step.split([p.numel() for p in self._params])
        d = torch.cat([self.rates[k] * part for k, part in zip(self._groups, parts, strict=True)])
        slope, bend = torch.dot(lin.gradient(), d).double(), torch.dot(d, lin.ggn(d)).double()
        return slope - 0.5 * bend, without_damping(slope, bend, self.rates.max(), eps, lin.loss.double())

    def _move(self, step: torch.Tensor) -> None:
        parts = step.split([p.numel() for p in self._params])
        for p, part, k in zip(self._params, parts, self._groups, strict=True):
            p.sub_((self.rates[k] * part).view(p.shape).to(p.dtype))

    def _keep_or_undo(self, kept: torch.Tensor, before: list[torch.Tensor]) -> None:
        """Stay, with the weight decay that is wanted, or return bit for bit."""
        for p, old, k in zip(self._params, before, self._groups, strict=True):
            new = p - (self.decays[k] * old).to(p.dtype) if self.decaying else p
            p.copy_(torch.where(kept, new, old))

    def _loss_here(self, before: list[torch.Tensor], scalar: bool) -> torch.Tensor:
        """The loss where the parameters were moved to, 0-dim, float64; they return where the closure raises."""
        try:
            with torch.enable_grad():
                result = self._closure()
        except BaseException:
            if not (self._params[0].device.type == "cuda" and torch.cuda.is_current_stream_capturing()):   # that moves nothing
                for p, old in zip(self._params, before, strict=True):
                    p.copy_(old)
            raise
        return loss_at(result, scalar).double()

    def report(self, numbers: torch.Tensor) -> Report:
        """The Report of the step that left these numbers; one transfer."""
        seen = dict(zip((*self.fields, *(f"reported {name}" for name in _REPORTED)), numbers.tolist(), strict=True))
        plan, dtype, tries = self.plan, self._params[0].dtype, self._rule.tries
        next_mu, (_, high) = seen["mu"], bounds(seen["start"], seen["curvature"], dtype)
        seen = {name: seen[f"reported {name}"] for name in _REPORTED}
        number = int(seen["status"])
        failed = number == _NOT_FINITE or STATUS[number] == "failed"
        tried = tries and not failed
        report = Report(
            seen["loss"], seen["after"] if tries else None, None if math.isnan(seen["ratio"]) else seen["ratio"],
            seen["predicted"] if tried else None, seen["damping"], next_mu, "failed" if failed else STATUS[number],
            solver=plan.solve.method, reason=plan.solve.reason,
            solve_status="not_positive_definite" if failed else "solved", attempts=int(seen["attempts"]), trials=int(tries),
            residuals=plan.residuals, parameters=plan.parameters, scaling="identity",
        )
        if number == _NOT_FINITE:
            report.solve_status = "not_finite"
            report.advice = "the loss before the step is not finite; nothing was changed. Check the data and the parameters"
            return report
        report.advice = advice(report, _Solved(report.solve_status), 0)
        if not failed:
            self._convergence(report, seen, number, next_mu >= high)
        return report

    def _convergence(self, report: Report, seen: dict[str, float], number: int, at_bound: bool) -> None:
        """Put on record a step that converged by the loss test, or stalled; the other tests need products with J.

        at_bound: is mu at its upper bound?
        """
        dtype, ftol = self._params[0].dtype, self._tolerances.ftol
        eps, size, possible = torch.finfo(dtype).eps, abs(report.loss), seen["possible"]
        in_a_row, promised = int(seen["in_a_row"]), seen["promised"]
        change = 0.0 if report.loss_after is None else abs(report.loss - report.loss_after)
        predicted = math.inf if report.predicted_reduction is None else report.predicted_reduction
        facts = Facts(report.loss, possible, change, predicted, math.inf)
        kept, rounding = number % 2 == 1, STATUS[number] == "converged"
        if rounding and seen["rate"] == 0:
            report.status, report.advice = "accepted" if kept else "rejected", NO_RATE
            return
        if report.status == "rejected" and in_a_row and promised <= rounding_of(size, eps, True):
            rounding, facts = True, facts._replace(possible=promised)
        if ftol == 0:
            if rounding:
                report.status, report.advice = "accepted" if kept else "rejected", ""
        elif rounding:
            report.status, report.advice = "converged", loss_test(facts, None, dtype)
        elif ftol and kept and facts.level(ftol * size) and change <= 2 * facts.predicted:
            report.status, report.advice = "converged", loss_test(facts, ftol, dtype)
        if report.status == "rejected" and not rounding:
            why = stall(report, in_a_row, at_bound, eps)
            if why:
                report.status, report.advice = "stalled", why
        if report.status == "converged" and holds_few_digits(dtype):
            report.status = "stalled"


class _Solved:
    """As much of a Solution as advice asks for."""

    def __init__(self, status: str):
        self.status, self.advice = status, ADVICE.get(status, "")
