"""What a step did, for people and programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch


@dataclass(slots=True)
class Report:
    """The last step of an optimizer.

    loss: before the step. loss_after: of the point kept, None where no trial was evaluated. gain_ratio: actual over
    predicted reduction, None without a trial. damping: mu of the step; next_damping: mu to start from next.
    status: "accepted"; "rejected" (no trial descended; parameters as before); "failed" (no usable solve); "stalled" (the
    predicted reduction is at rounding level; a step that did not raise the loss was kept; or no step descends any more: three
    rejected in a row, or mu at its bound); "empty" (no residuals); "none" (before the first step).
    advice: what to do about it, or "". solver and reason: what solved and why it was chosen. solve_status, iterations,
    residual_norm: of the last solve (the norm is known for CG and LSMR; a truncated one is an earlier iterate of it).
    correction: length of the second-order correction over that of the step, with acceleration.
    attempts: steps tried, by a solve at another damping or truncation; trials: runs of the closure after the first;
    line_search: accepted t, None without a search. momentum: beta of the step; 0 where there was no last step, or where it was
    dropped because a trial with it did not descend. weights, terms: with `balance`, w_k and the unweighted 1/2 ||r_k||^2 of
    each residual tensor before the step; `loss` is the weighted sum. residuals, parameters: M and P. seconds: wall time of the
    phases linearize, solve, trial.
    """

    loss: float
    loss_after: float | None = None
    gain_ratio: float | None = None
    predicted_reduction: float | None = None
    damping: float = 0.0
    next_damping: float = 0.0
    status: str = "accepted"
    advice: str = ""
    solver: str = ""
    reason: str = ""
    solve_status: str = ""
    iterations: int = 0
    residual_norm: float | None = None
    attempts: int = 0
    trials: int = 0
    line_search: float | None = None
    momentum: float = 0.0
    correction: float | None = None
    weights: tuple[float, ...] = ()
    terms: tuple[float, ...] = ()
    residuals: int = 0
    parameters: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line, and the advice on a second if there is any."""
        after = "" if self.loss_after is None else f" -> {self.loss_after:.6g}"
        rho = "" if self.gain_ratio is None else f", gain ratio {self.gain_ratio:.3g}"
        work = ""
        if self.solve_status == "truncated":
            work = f" ({self.reason})"
        elif self.iterations and self.residual_norm is not None:
            work = f" ({self.iterations} iterations, residual {self.residual_norm:.1e})"
        text = f"{self.status}: loss {self.loss:.6g}{after}{rho}, mu {self.damping:.3g}, {self.solver}{work}"
        return text + (f"\n{self.advice}" if self.advice else "")


class LateReport:
    """A Report whose numbers stay on the device until one of its fields is read: then they come in one transfer.

    find: makes the Report.
    """

    def __init__(self, find: Callable[[], Report]):
        self._find, self._found = find, None

    def now(self) -> Report:
        """The Report, with its numbers."""
        return self._report

    @property
    def _report(self) -> Report:
        if self._found is None:
            self._found, self._find = self._find(), None
        return self._found

    def __getattr__(self, name: str):
        """A field of the Report."""
        if name not in Report.__slots__:
            raise AttributeError(f"a report has no {name!r}")
        return getattr(self._report, name)

    def __str__(self) -> str:
        """As the Report has it."""
        return str(self._report)


class EnsembleReport(Sequence[Report]):
    """The last step of an ensemble: `report[b]` is member b's Report, and any of its fields read off the whole is a list of B.

    seconds: wall time of the phases linearize, solve and trial, of all members together.
    """

    def __init__(self, members: list[Report], seconds: dict[str, float]):
        self._members, self.seconds = members, seconds

    def __len__(self) -> int:
        return len(self._members)

    @overload
    def __getitem__(self, b: int) -> Report: ...

    @overload
    def __getitem__(self, b: slice) -> list[Report]: ...

    def __getitem__(self, b: int | slice) -> Report | list[Report]:
        """The Report of member b."""
        return self._members[b]

    def __getattr__(self, name: str) -> list[Any]:
        """A field of every member's report."""
        if name.startswith("_") or name not in Report.__slots__:
            raise AttributeError(f"neither a report nor one of an ensemble has {name!r}")
        return [getattr(member, name) for member in self._members]

    def __str__(self) -> str:
        """How many members ended how, the span of their losses, and the advice for each kind of trouble once."""
        statuses = [member.status for member in self._members]
        counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
        losses = sorted(m.loss if m.loss_after is None else m.loss_after for m in self._members if math.isfinite(m.loss))
        span = f": loss {losses[0]:.6g} to {losses[-1]:.6g}" if losses else ""
        lines = [f"{len(self)} members, {counts}{span}"]
        advised = {}
        for b, member in enumerate(self._members):
            if member.advice:
                advised.setdefault(member.status, []).append(b)
        lines += [f"member {which[0]}{_others(which)}: {self._members[which[0]].advice}" for which in advised.values()]
        return "\n".join(lines)


def _others(members: list[int]) -> str:
    return f" and {len(members) - 1} more" if len(members) > 1 else ""


_REJECTED_IN_A_ROW = 3   # steps without descent that are a stall
_ROUNDING = 1e3          # times the rounding unit: what sums of many squares lose


def advice(report: Report, solution, failures: int, dtype: torch.dtype) -> str:
    """What to do about a step; empty where nothing is to be done. failures: solves of it that gave no usable step."""
    if report.status == "stalled":
        return f"the predicted reduction is at rounding level: {_converged(dtype)}"
    if report.status == "rejected":
        return (
            f"no trial lowered the loss at {report.attempts} damping(s); the parameters are unchanged. If this repeats, "
            "check that the closure takes the same batch at every call, raise the damping, or use float64"
        )
    if report.status == "failed" or solution.status != "solved":
        return solution.advice
    if failures:
        return f"the factorization failed {failures} time(s) and the damping was raised to {report.damping:.3g} for this step"
    return ""


def stall(report: Report, promised: float, in_a_row: int, at_bound: bool, dtype: torch.dtype) -> str:
    """Why a step that was not kept, or moved nothing, means that the run has stalled, and what to do; "" where it may go on.

    promised: predicted reduction of the first, longest step tried, NaN if none was rejected. in_a_row: rejected steps up to
    this one, 0 if it was not. at_bound: is mu at its upper bound?
    """
    suspects = (
        "a closure that takes another batch at every call, from an iterator or a generator of its own (fetch it before the "
        "step), residuals that jump or have a kink here, or residuals of very different size (scale them, or use "
        "scaling='marquardt')"
    )
    if at_bound and report.status in ("rejected", "stalled"):
        return (
            f"the damping is at its bound, {report.next_damping:.0e}, where steps have no length left: start again from a "
            f"smaller damping; if it rises again, look for {suspects}"
        )
    if not in_a_row:
        return ""
    if abs(promised) <= _ROUNDING * torch.finfo(dtype).eps * abs(report.loss):
        return f"no step lowers the loss, and the longest promised {promised:.0e} of {report.loss:.0e}: {_converged(dtype)}"
    if in_a_row >= _REJECTED_IN_A_ROW:
        return f"{in_a_row} steps in a row found no descent at any of {report.attempts} dampings; look for {suspects}"
    return ""


def _converged(dtype: torch.dtype) -> str:
    if dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        return (
            f"this is not convergence: parameters and loss in {name} hold {2 if dtype == torch.bfloat16 else 3} digits, and "
            "shorter steps are lost. Keep the parameters in float32 (model.float()); torch.autocast may still run the "
            f"closure's products in {name}"
        )
    if dtype == torch.float64:
        return "converged for float64; a smaller loss takes another start, a larger model or other residuals"
    return f"converged for {str(dtype).removeprefix('torch.')}; use float64 to go further"
