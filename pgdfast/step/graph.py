"""One attempt at a step by operations on tensors alone, to be captured as a CUDA graph: nothing waits for the device.

The same rules and verdict as on the host (attempt.py); the accepted branch is a `where`, and mu a number on the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..report import Report, advice, stall
from ..solve import ADVICE, Direct, solve_direct
from ..tape import real_views
from .attempt import STATUS, State, Trial, advance, demanded, judge
from .evaluate import loss_at
from .rules import LARGEST, DampingRule

_NOT_FINITE = len(STATUS)   # the status of a step whose loss before it is not finite
_REPORTED = ("loss", "after", "ratio", "predicted", "damping", "status", "attempts", "in_a_row", "promised")


class StepPlan(NamedTuple):
    """What was found out before the first step: how to solve, and the problem's size."""

    solve: Direct
    residuals: int
    parameters: int


class GraphStep:
    """The numbers of a step on the device, and the operations that take one from the next.

    params: tensors that stay where they are. groups: for each its parameter group. rule: of the optimizer. linearizer: a
    Linearizer of its own, since a graph holds its plans' memory.
    """

    def __init__(self, closure, params: list[torch.Tensor], groups: list[int], rule: DampingRule, linearizer):
        self._closure, self._groups, self._rule, self._linearizer = closure, groups, rule, linearizer
        self._given, self._params = params, real_views(params)
        self._remembered = tuple(rule.memory())
        self.fields = ("mu", "start", "attempt", "rejected", "promised", *self._remembered)
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
        mu, start, attempt, rejected, promised, *remembered = old.unbind()
        with torch.enable_grad():
            result = self._closure()
        with torch.no_grad():
            lin = self._linearizer.read(result, allow_sync=False)
            del result
            loss, fresh = lin.loss.double(), attempt == 0
            alive = torch.isfinite(loss)
            mu = mu if tries else torch.where(fresh, self.given[0], mu)
            memory = dict(zip(self._remembered, remembered, strict=True))
            start, promised = torch.where(fresh, mu, start), torch.where(fresh, math.nan, promised)
            state = State(mu, memory, start, attempt, rejected, promised)
            found = solve_direct(lin, mu, self.plan.solve.method, self.plan.solve.wide)
            predicted = self._predicted(lin, found)
            before = [p.detach().clone() for p in self._params]
            self._move(found.step)
            after = self._loss_here(before, lin.scalar) if tries else torch.full_like(loss, math.nan)
            trial = Trial(loss, after, predicted, found.usable & alive, mu)
            verdict = judge(trial, state.mu == state.start, tries, torch.finfo(lin.loss.dtype).eps)
            if rule.target:
                verdict = demanded(rule, state, verdict)
            self._keep_or_undo(verdict.kept, before)
            state, over = advance(rule, state, trial, verdict)
            following = (state.mu, state.start, state.attempt, state.rejected, state.promised, *state.memory.values())
            status = torch.where(alive, verdict.status, _NOT_FINITE)
            ratio = torch.where(trial.usable, verdict.ratio, math.nan)
            report = (loss, torch.where(verdict.kept, after, loss), ratio, trial.predicted, mu, status, attempt + 1,
                      torch.where(over, state.rejected, 0.0), state.promised)
            following, report = (torch.stack([x.double() for x in numbers]) for numbers in (following, report))
            self.numbers.copy_(torch.cat([torch.where(alive, following, old), report]))
            lin.release()

    def _predicted(self, lin, found) -> torch.Tensor:
        """The predicted reduction of theta - rates * delta."""
        if len(self.rates) == 1:
            rate = self.rates[0]
            reduction = rate * found.gain - 0.5 * rate * rate * (found.gain - found.damped)
            return torch.where(rate <= 2, reduction.clamp_min(0.0), reduction)   # where only rounding makes it negative
        parts = found.step.split([p.numel() for p in self._params])
        d = torch.cat([self.rates[k] * part for k, part in zip(self._groups, parts, strict=True)])
        return torch.dot(lin.gradient(), d).double() - 0.5 * torch.dot(d, lin.ggn(d)).double()

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
        next_mu, seen = seen["mu"], {name: seen[f"reported {name}"] for name in _REPORTED}
        plan, dtype, tries = self.plan, self._params[0].dtype, self._rule.tries
        number = int(seen["status"])
        failed = number == _NOT_FINITE or STATUS[number] == "failed"
        tried = tries and not failed
        report = Report(
            seen["loss"], seen["after"] if tries else None, None if math.isnan(seen["ratio"]) else seen["ratio"],
            seen["predicted"] if tried else None, seen["damping"], next_mu, "failed" if failed else STATUS[number],
            solver=plan.solve.method, reason=plan.solve.reason,
            solve_status="not_positive_definite" if failed else "solved", attempts=int(seen["attempts"]), trials=int(tries),
            residuals=plan.residuals, parameters=plan.parameters,
        )
        if number == _NOT_FINITE:
            report.solve_status = "not_finite"
            report.advice = "the loss before the step is not finite; nothing was changed. Check the data and the parameters"
            return report
        report.advice = advice(report, _Solved(report.solve_status), 0, dtype)
        why = stall(report, seen["promised"], int(seen["in_a_row"]), next_mu >= LARGEST, dtype)
        if why:
            report.status, report.advice = "stalled", why
        return report


class _Solved:
    """As much of a Solution as advice asks for."""

    def __init__(self, status: str):
        self.status, self.advice = status, ADVICE.get(status, "")
