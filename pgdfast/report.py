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
    status: "accepted"; "rejected" (no trial descended; parameters as before); "failed" (no usable solve); "converged";
    "stalled"; "empty" (no residuals); "none" (before the first step).
    Converged: the loss, step or gradient test holds, so by the model without damping nothing more than the tolerances can be
    gained; a last step that did not raise the loss was kept. Stalled: no step descends, and this is not
    convergence.
    advice: which test was met, or what to do about a step; "" where there is nothing to say. solver and reason: what solved
    and why it was chosen. solve_status, iterations, residual_norm: of the last solve (the norm is known for CG and LSMR; a
    truncated one is an earlier iterate of it). cut: directions that the pseudo-inverse of damping 0 left out.
    correction: length of the second-order correction over that of the step, with acceleration. mode: of the rule "auto":
    "plain", "probing" or "corrected"; "" under other rules and of captured steps.
    attempts: steps tried, by a solve at another damping or truncation; trials: runs of the closure after the first;
    line_search: accepted t, None without a search. momentum: beta of the step; 0 where there was no last step, or where it was
    dropped because a trial with it did not descend. weights, terms: with `balance`, w_k and the unweighted 1/2 ||r_k||^2 of
    each residual tensor before the step; `loss` is the weighted sum. residuals, parameters: M and P. scaling: D. seconds: wall
    time of the phases linearize, solve, trial.
    parts: of a step over batches or in a process group, how many there were; kept: of those, how many held what products with J
    need; reruns: closures that ran again in this process for products of the others; sent: numbers that it sent to others.
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
    mode: str = ""
    cut: int = 0
    weights: tuple[float, ...] = ()
    terms: tuple[float, ...] = ()
    residuals: int = 0
    parameters: int = 0
    scaling: str = ""
    parts: int = 0
    kept: int = 0
    reruns: int = 0
    sent: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether further steps are expected to gain nothing: converged or stalled. The optimizer goes on if it is asked."""
        return self.status in ("converged", "stalled")

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


_FIELDS = (*Report.__slots__, "finished")


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
        if name not in _FIELDS:
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
        if name.startswith("_") or name not in _FIELDS:
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


PROMISE = 8              # rounding units of the loss: a step that promises less has nothing to gain
SUMS = 1e3               # rounding units of the loss: what sums of many squares lose
_REJECTED_IN_A_ROW = 3   # steps without descent that are a stall

_SUSPECTS = (
    "a closure that takes another batch at every call, from an iterator or a generator of its own (fetch it before the step), "
    "residuals that jump or have a kink here, or residuals of very different size (scale them, or use scaling='marquardt')"
)


NO_RATE = "every learning rate is 0, so that steps move nothing; this is not convergence"
NO_EFFECT = (
    "this is not convergence: every derivative of the residuals is 0 here, so that no step changes them (dead or saturated "
    "units, underflow, tiny units). Start elsewhere, scale the residuals up, or use float64"
)


def advice(report: Report, solution, failures: int) -> str:
    """What to do about a step; empty where nothing is to be done. failures: solves of it that gave no usable step."""
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


def stall(report: Report, in_a_row: int, at_bound: bool, eps: float) -> str:
    """Why a step that was rejected means that the run has stalled, and what to do; "" where it may go on.

    in_a_row: rejected steps up to this one. at_bound: is mu at its upper bound? Steps in vain whose last promise was still
    above rounding are none: mu goes on rising.
    """
    if at_bound:
        return (
            f"the damping is at its bound, {report.next_damping:.0e}, where steps have no length left: start again from a "
            f"smaller damping; if it rises again, look for {_SUSPECTS}"
        )
    if not no_more_promised(report, in_a_row, eps):
        return ""
    return f"{in_a_row} steps in a row found no descent at any of {report.attempts} dampings; look for {_SUSPECTS}"


def no_more_promised(report: Report, in_a_row: int, eps: float) -> bool:
    """Whether steps in a row found no descent, the last of them down to promises of rounding."""
    promised, size = report.predicted_reduction, abs(report.loss)   # a loss of exactly 0 has no rounding to compare with
    return in_a_row >= _REJECTED_IN_A_ROW and promised is not None and (size == 0 or abs(promised) <= SUMS * eps * size)


def not_repeatable(first: float, second: float) -> str:
    """Advice where the closure gave two losses at the same parameters."""
    return (
        f"the closure returned the loss {first:.6g} and then {second:.6g} at the same parameters: it takes another batch at "
        "every call, from an iterator or a generator of its own, or changes what it reads. Fetch the batch before the step"
    )


def left_out(count: int, size: int, rcond: float) -> str:
    """Advice where the pseudo-inverse left out directions along which the loss still falls."""
    return (
        f"this is not convergence: damping=0 takes a pseudo-inverse, which leaves out {count} of {size} directions "
        f"(eigenvalues below rcond = {rcond:.0e} of the largest), and the loss still falls along them. Lower rcond, use "
        "scaling='marquardt', or a damping above 0"
    )


def too_damped(mu: float) -> str:
    """Advice where the smallest mu that the rule allows is still far above the curvature."""
    return (
        f"the damping, {mu:.0e}, is the least that its rule allows, and so far above the curvature that steps have no length: "
        "the model hardly answers to its parameters here (saturated, underflow, tiny units). Start elsewhere, scale the "
        "residuals up, or allow less by the rule's `smallest`"
    )


# --- which test of convergence was met ----------------------------------------------------------------------------------------


def exact(loss: float, dtype: torch.dtype) -> str:
    """The residuals vanish."""
    what = "the loss is 0" if loss == 0 else "the residuals are zero to rounding"
    return f"{what}: {_converged(dtype, further=False)}"


def slope_test(cosine: float, gtol: float | None, rounding: bool, dtype: torch.dtype) -> str:
    """The gradient test. cosine: the largest of the residuals with a column of J."""
    what = f"the largest cosine of the residuals with a column of J is {cosine:.0e}"
    if rounding:
        return f"the gradient is zero to rounding ({what}): {_converged(dtype)}"
    return f"converged by the gradient test: {what}, at most gtol = {gtol:g}{_FURTHER}"


def loss_test(facts, ftol: float | None, dtype: torch.dtype) -> str:
    """The loss test. ftol: None where it was met by rounding."""
    loss = abs(facts.loss)
    if ftol is None:
        return f"the predicted reduction, {facts.possible:.0e} of {loss:.3g}, is at rounding level: {_converged(dtype)}"
    return (
        f"converged by the loss test: the loss changed by {facts.change / loss:.0e} of itself, and the model without damping "
        f"promises {facts.possible / loss:.0e}, at most ftol = {ftol:g}{_FURTHER}"
    )


def no_descent(alone: float, dtype: torch.dtype) -> str:
    """The loss test after steps in vain. alone: what the best step along one parameter promises of the loss."""
    return (
        f"no step lowers the loss, and a step along any one parameter promises at most {alone:.0e} of it, which is at rounding "
        f"level: {_converged(dtype)}"
    )


def step_test(share: float, xtol: float) -> str:
    """The step test."""
    return (
        f"converged by the step test: without damping, the step is {share:.0e} of the parameters, each in units of its column "
        f"of J, at most xtol = {xtol:g}{_FURTHER}"
    )


_FURTHER = "; further steps may be taken, and smaller tolerances, or None, ask for more"


def holds_few_digits(dtype: torch.dtype) -> bool:
    """Whether rounding at this precision says nothing about convergence."""
    return dtype in (torch.float16, torch.bfloat16)


def _converged(dtype: torch.dtype, further: bool = True) -> str:
    """What rounding level means in a precision, and how to go on.

    further: is there any loss left?
    """
    if holds_few_digits(dtype):
        name = str(dtype).removeprefix("torch.")
        return (
            f"this is not convergence: parameters and loss in {name} hold {2 if dtype == torch.bfloat16 else 3} digits, and "
            "shorter steps are lost. Keep the parameters in float32 (model.float()); torch.autocast may still run the "
            f"closure's products in {name}"
        )
    name = str(dtype).removeprefix("torch.")
    way_on = "; a smaller loss takes another start, a larger model or other residuals" if further else ""
    if dtype != torch.float64:
        way_on = "; use float64 to go further"
    return f"converged for {name}. Check the error on fresh points or data, of which this loss says nothing{way_on}"
