"""What a step means for the run, where it promises no more than rounding or found no descent: converged, stalled, or go on.

Looked into at such steps alone, since it takes products with J and runs of the closure. step: a HostStep; m: one of its
Members.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from ..report import (
    NO_EFFECT,
    NO_RATE,
    advice,
    holds_few_digits,
    left_out,
    no_more_promised,
    not_repeatable,
    stall,
    too_damped,
)
from .attempt import STATUS, Verdict, without_damping
from .convergence import Facts, Tolerances, measured, met, rounding_of, worth_measuring
from .quadratic_model import slope_and_bend

_NONE = float("nan")
_NOT_KEPT, _CONVERGED, _STALLED = map(STATUS.index, ("rejected", "converged", "stalled"))   # 1 more: the step was kept


def promised_without_damping(step, m, solution) -> float:
    """`without_damping` along a solution's step. Cost: none; of different learning rates three products with J."""
    b, parameters = m.number, step.parameters
    rate = parameters.common_rates[b]
    if rate is not None:
        return without_damping(solution.gain, solution.gain - solution.damped - solution.slack, rate, step.eps, m.report.loss)
    direction = parameters.scaled(b, solution.step)
    slope, bend = step.at_theta(m, lambda: slope_and_bend(step.networks.member(b), direction))
    return without_damping(slope, bend, max(parameters.rates(b)), step.eps, m.report.loss)


def looked_into(step, m, verdict: Verdict, falls: bool) -> Verdict:
    """The verdict on a first attempt that promises no more than rounding, or from a loss of 0.

    falls: can mu fall?
    """
    trial, options = m.trial, step.options
    m.why, meaning = _met(step, m, rounding_of(trial.loss, step.eps, m.state.rejected > 0), trial.possible)
    if m.why:
        return verdict._replace(ended=True, hidden=False, ratio=_NONE, status=meaning + verdict.kept)
    if not verdict.ended and not verdict.tiny:
        return verdict
    cut = m.solution.cut and left_out(m.solution.cut, min(m.report.residuals, m.report.parameters), options.rcond)
    if not options.predicts:
        m.why = cut or ""
        return verdict._replace(ended=False, status=_NOT_KEPT + 1)
    if not abs(trial.loss - trial.after) <= rounding_of(trial.loss, step.eps, True) and not _repeats(step, m):
        return verdict._replace(kept=False, ended=True, hidden=False, ratio=_NONE, status=_STALLED)
    if falls:
        return verdict._replace(kept=False, ended=False, hidden=True, status=_NOT_KEPT)
    if cut:
        m.why = cut
        return verdict._replace(ended=True, ratio=_NONE, status=_STALLED + verdict.kept)
    kept = trial.found and trial.after < trial.loss
    return verdict._replace(kept=kept, ended=False, status=_NOT_KEPT + kept)


def tested(step, m, verdict: Verdict) -> Verdict:
    """The verdict on a step that was kept, where tests wider than rounding were asked for."""
    if worth_measuring(_facts(step, m, m.trial.possible), step.options.tolerances):
        words, meaning = _met(step, m, rounding_of(m.trial.loss, step.eps, False), m.trial.possible)
        if words and meaning == _CONVERGED:
            m.why, verdict = words, verdict._replace(status=_CONVERGED + 1)
    return verdict


def in_vain(step, m) -> None:
    """Put on record why no attempt of a step descended."""
    promised, rounding = m.state.promised, rounding_of(m.trial.loss, step.eps, True)
    m.trial = m.trial._replace(after=m.trial.loss)
    flat = no_more_promised(m.report, m.state.rejected, step.eps)
    m.why, meaning = _met(step, m, rounding, math.inf if promised != promised else promised, flat)
    if m.why:
        m.report.status = STATUS[meaning]
    elif m.state.rejected > 1:   # the second step in a row
        if not _repeats(step, m):
            m.report.status = "stalled"
        elif m.state.start <= step.options.rule.smallest and abs(m.trial.predicted) <= rounding < promised:
            m.why, m.report.status = too_damped(m.state.start), "stalled"


def say(m, at_bound: bool, eps: float, dtype: torch.dtype) -> None:
    """Put on record what to do about a step that was not simply accepted.

    at_bound: is mu at its upper bound?
    """
    report = m.report
    report.advice = m.why or advice(report, m.solution, m.failures)
    if report.status == "rejected" and not m.why:
        why = stall(report, m.state.rejected, at_bound, eps)
        if why:
            report.status, report.advice = "stalled", why
    elif report.status == "converged" and holds_few_digits(dtype):
        report.status = "stalled"


def _facts(step, m, possible: float) -> Facts:
    trial, solution, predicts = m.trial, m.solution, step.options.predicts
    bend = solution.gain - solution.damped - solution.slack
    return Facts(
        trial.loss, possible, abs(trial.loss - trial.after) if predicts else 0.0, trial.predicted if predicts else math.inf,
        solution.gain / bend if possible < math.inf and bend > 0 else math.inf,
    )


def _met(step, m, limit: float, possible: float, in_vain: bool = False) -> tuple[str, int]:
    """(what ends the member's step here, in words, or ""; the status that it means).

    A test of convergence that was asked for; one that was turned off; or that no parameter can move or has an effect. Cost: the
    gradient and diag(J^T J).
    """
    b, parameters, loss, tolerances = m.number, step.parameters, m.trial.loss, step.options.tolerances
    network, move = partial(step.networks.member, b), parameters.scaled(b, m.solution.step)
    moving = parameters.moving(b)
    if moving is not None and not moving.any():
        return NO_RATE, _NOT_KEPT
    measures = step.at_theta(m, lambda: measured(network(), loss, parameters.theta(b), move, moving))
    if measures.longest == 0 and measures.residual > 0:
        return NO_EFFECT, _STALLED
    facts, kind = _facts(step, m, possible), (step.loss.dtype, step.networks.lin.has_squares_only)
    words = met(facts, measures, tolerances, limit, *kind, in_vain)
    if words or not met(facts, measures, Tolerances(), limit, *kind, in_vain):
        return words, _CONVERGED
    return "nothing more than rounding can be gained, and the test that says so is turned off", _NOT_KEPT


def _repeats(step, m) -> bool:
    """Whether the closure returns the same loss again at theta; if not, the member's advice says so. Cost: one run."""
    m.report.trials += 1
    with step.parameters.home(m.number):
        try:
            again = step.networks.losses_at(step.run())[m.number]
        except StopIteration:   # an iterator that has run out of batches
            again = math.nan
    if abs(again - m.trial.loss) <= rounding_of(m.trial.loss, step.eps, True):
        return True
    m.why = not_repeatable(m.trial.loss, again)
    return False
