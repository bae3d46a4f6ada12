"""One attempt at a step, decided: State x Trial -> State.

A pure function, the same for one network, for each member of an ensemble (numbers) and under a CUDA graph (0-dim float64
tensors). Which branch is taken is data: on numbers the branch alone is computed, on tensors both, and one selected.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .rules import DampingRule, Memory, select

ATTEMPTS = 12      # dampings tried in one step before it is given up
_ROUNDING = 8      # rounding units of the loss: a first step that promises less than these has converged

# By 4 usable + 2 stalled + kept.
STATUS = (*["failed"] * 4, "rejected", "accepted", "stalled", "stalled")


class State(NamedTuple):
    """Where a step stands between attempts.

    mu, memory: of the damping rule, for the next attempt. start: the mu of the step's first attempt. attempt: attempts that
    were made in vain. rejected: steps in a row that found no descent. promised: predicted reduction of the step's first
    rejected attempt, NaN for none.
    """

    mu: float
    memory: Memory
    start: float
    attempt: int = 0
    rejected: int = 0
    promised: float = float("nan")


class Trial(NamedTuple):
    """What was tried and seen.

    loss: before the step; after: at the trial point, NaN where nobody asked. predicted: reduction of the loss by the model.
    usable: did the solve give a step? mu: the damping it was solved at. found: did the line search, if any, end at a point?
    with_momentum, truncated: was there a prior; is the step an earlier iterate of CG?
    """

    loss: float
    after: float
    predicted: float
    usable: bool
    mu: float
    found: bool = True
    with_momentum: bool = False
    truncated: bool = False


class Verdict(NamedTuple):
    """kept: does the trial point stand? stalled: is the promise at rounding level? ratio: rho, NaN for none."""

    kept: bool
    stalled: bool
    ratio: float
    status: int   # its number in STATUS


def judge(trial: Trial, first, tries: bool, eps: float) -> Verdict:
    """Whether the trial point stands.

    first: is this the step's first damping? tries: are trial points judged by their loss? eps: rounding unit of the loss.

    A first step that promises less than the loss's rounding means convergence, and may stand if it does not climb. Later
    attempts are small because mu rose: they must descend. Promises of a rise, which different learning rates and momentum can
    make, are a poor model.
    """
    loss, after, predicted, usable = trial[:4]
    if not tries:
        return Verdict(usable, False, float("nan"), 4 * usable + usable)
    stalled = usable & first & (abs(predicted) <= _ROUNDING * eps * abs(loss))
    kept = usable & trial.found & ((after < loss) | (stalled & (after == loss)))
    comparable = (predicted > 0) & (abs(after) < float("inf"))
    ratio = select(comparable, (loss - after) / (predicted + (predicted == 0)), float("-inf"))
    return Verdict(kept, stalled, select(stalled, float("nan"), ratio), 4 * usable + 2 * stalled + kept)


def demanded(rule: DampingRule, state: State, verdict: Verdict) -> Verdict:
    """The verdict of a rule with a target: a step that descends by less is not kept, but by a step's last attempt."""
    kept = verdict.kept & ((state.attempt + 1 >= ATTEMPTS) | ((verdict.ratio < rule.target) == 0))   # NaN: at rounding level
    return verdict._replace(kept=kept, status=verdict.status - 1 * verdict.kept + kept)


def advance(rule: DampingRule, state: State, trial: Trial, verdict: Verdict, curvature=None):
    """(State after the attempt, is the step over?). curvature: see DampingRule."""
    last = state.attempt + 1 >= ATTEMPTS

    def accepted():
        # A truncated step leaves mu where the rejection put it: the step says nothing for less.
        mu, memory = (state.mu, state.memory) if trial.truncated else rule.accepted(trial.mu, state.memory, verdict.ratio)
        return State(mu, memory, state.start)

    def rejected():
        if trial.with_momentum:   # more damping would only lead to the prior: again without it
            return state.mu, state.memory
        return rule.rejected(trial.mu, state.memory, verdict.ratio, curvature)

    def in_vain():
        def more():
            mu, memory = cond(trial.usable, rejected, lambda: rule.failed(trial.mu, state.memory, curvature))
            first = state.promised != state.promised
            promised = select(trial.usable & first & (not trial.with_momentum), trial.predicted, state.promised)
            return State(mu, memory, state.start, state.attempt + 1, state.rejected, promised)

        def exhausted():
            mu, memory = rule.exhausted(state.start, state.memory)
            return more()._replace(mu=mu, memory=memory, attempt=0, rejected=select(trial.usable, state.rejected + 1, 0))

        return cond(last, exhausted, more)

    def unchanged():
        return state._replace(attempt=0, rejected=0)

    over = verdict.kept | verdict.stalled | (trial.usable & (not rule.tries and not trial.with_momentum))
    return cond(verdict.kept, accepted, lambda: cond(over, unchanged, in_vain)), over | last


def cond(condition, if_true, if_false):
    """if_true() or if_false(), of the same make: on numbers the one that is asked for, on tensors both, entry by entry."""
    if not isinstance(condition, torch.Tensor):
        return if_true() if condition else if_false()
    return _where(condition, if_true(), if_false())


def _where(condition, a, b):
    if isinstance(a, dict):
        return {name: _where(condition, a[name], b[name]) for name in a}
    if isinstance(a, State):
        return State(*(_where(condition, x, y) for x, y in zip(a, b, strict=True)))
    if isinstance(a, tuple):
        return tuple(_where(condition, x, y) for x, y in zip(a, b, strict=True))
    return torch.where(condition, a, b)
