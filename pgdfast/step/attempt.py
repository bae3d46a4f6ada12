"""One attempt at a step, decided: State x Trial -> State.

A pure function, the same for one network, for each member of an ensemble (numbers) and under a CUDA graph (0-dim float64
tensors). Which branch is taken is data: on numbers the branch alone is computed, on tensors both, and one selected.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..report import PROMISE, SUMS
from .rules import LARGEST, DampingRule, Memory, bounded, select

ATTEMPTS = 12      # dampings tried in one step before it is given up
_INEXACT = 4.0     # times the slope: bends that no damped step has, its learning rates included
_FURTHEST = 1e4    # times the mu that a step began with: the next one goes on from there at most

# By 4 usable + 2 converged + kept; behind them what the host alone finds: a promise that nothing else explains, without and
# with a step that was kept.
STATUS = (*["failed"] * 4, "rejected", "accepted", "converged", "converged", "stalled", "stalled")


class State(NamedTuple):
    """Where a step stands between attempts.

    mu, memory: of the damping rule, for the next attempt. start: the mu of the step's first attempt. attempt: attempts that
    were made in vain. rejected: steps in a row that found no descent. promised: Trial.possible of the step's first rejected
    attempt, NaN for none.
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
    with_momentum, truncated: was there a prior; is the step an earlier iterate of CG? possible: `without_damping`, infinite
    where nobody asked since `predicted` is far above rounding.
    """

    loss: float
    after: float
    predicted: float
    usable: bool
    mu: float
    found: bool = True
    with_momentum: bool = False
    truncated: bool = False
    possible: float = float("inf")


class Verdict(NamedTuple):
    """What becomes of a trial.

    kept: does the trial point stand? ended: is the step over whether or not it does? tiny: is the promise at rounding level?
    hidden: is it so because of the damping alone, so that mu must fall? ratio: rho, NaN for none.
    """

    kept: bool
    ended: bool
    hidden: bool
    tiny: bool
    ratio: float
    status: int   # its number in STATUS


def without_damping(slope, bend, rate, eps, loss):
    """The reduction of the loss that the model without damping promises along the step d, at the learning rate.

    slope: g . d; bend: d . J^T J d. The best length of d promises slope^2 / (2 bend), of which a rate t < 1 takes t (2 - t).
    Infinite where a damping far above the curvature leaves no digit of the bend: then nothing is known. NaN where a solve lost
    its digits, with a bend well above the slope although that is above the rounding of the loss. Numbers or tensors.
    """
    t = bounded(rate, 0.0, 1.0)
    seen = (bend > PROMISE * eps * slope) & (bend < _INEXACT * slope)
    best = t * (2 - t) * 0.5 * slope * (slope / (bend + (bend == 0)))
    lost = (bend >= _INEXACT * slope) & (abs(slope) > SUMS * eps * abs(loss))
    return select(seen, best, select(lost, float("nan"), select(slope != 0, float("inf"), 0.0)))


def judge(trial: Trial, first, tries: bool, eps: float, again=False, falls=True) -> Verdict:
    """Whether the trial point stands.

    first: is this the step's first damping? tries: are trial points judged by their loss? eps: rounding unit of the loss.
    again: did the steps just before find no descent? Then promises at the rounding of sums have nothing left to show. falls:
    can mu fall?

    A first step that promises less than the loss's rounding, without damping, too, means convergence, and may stand if it
    does not climb. Where only the damping makes the promise so small, mu has to fall. Later attempts are small because mu
    rose: they must descend. Promises of a rise, which different learning rates and momentum can make, are a poor model.
    """
    loss, after, predicted, usable = trial[:4]
    size = eps * abs(loss)
    limit = (PROMISE + again * (SUMS - PROMISE)) * size
    nothing = usable & first & (trial.possible <= limit)
    if not tries:
        return Verdict(usable, nothing, False, False, float("nan"), 4 * usable + 2 * nothing + usable)
    tiny = usable & (abs(predicted) <= limit) & (trial.possible == trial.possible)
    converged = nothing & tiny & (abs(loss - after) <= SUMS * size)
    hidden = tiny & first & (trial.possible > limit) & falls
    kept = usable & trial.found & (hidden == 0) & ((after < loss) | (converged & (after == loss)))
    comparable = (predicted > 0) & (abs(after) < float("inf"))
    ratio = select(comparable, (loss - after) / (predicted + (predicted == 0)), float("-inf"))
    ratio = select(converged, float("nan"), ratio)
    return Verdict(kept, converged, hidden, tiny, ratio, 4 * usable + 2 * converged + kept)


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
        return State(mu, memory, state.start, 0, state.rejected * verdict.ended)

    def rejected():
        if trial.with_momentum:   # more damping would only lead to the prior: again without it
            return state.mu, state.memory
        return rule.rejected(trial.mu, state.memory, verdict.ratio, curvature)

    def lowered():
        mu, memory = rule.lowered(state.mu, state.memory)
        return State(mu, memory, mu, select(last, 0, state.attempt + 1), state.rejected)

    def in_vain():
        def more():
            mu, memory = cond(trial.usable, rejected, lambda: rule.failed(trial.mu, state.memory, curvature))
            first = state.promised != state.promised
            promised = select(trial.usable & first & (not trial.with_momentum), trial.possible, state.promised)
            return State(mu, memory, state.start, state.attempt + 1, state.rejected, promised)

        def exhausted():
            mu, memory = rule.exhausted(state.start, state.memory)
            state_of_more = more()
            if rule.tries:
                mu = _further(mu, state.start, state_of_more.mu, verdict.tiny)
            rejected = select(trial.usable, state.rejected + 1, 0)
            return state_of_more._replace(mu=mu, memory=memory, attempt=0, rejected=rejected)

        return cond(last, exhausted, more)

    def unchanged():
        return state._replace(attempt=0)

    over = verdict.kept | verdict.ended | (trial.usable & (not rule.tries and not trial.with_momentum))

    def not_kept():
        return cond(over, unchanged, lambda: cond(verdict.hidden, lowered, in_vain))

    return cond(verdict.kept, accepted, not_kept), over | last


def _further(mu, start, stood, tiny):
    """The mu to go on from after a step in vain: where its attempts stood, unless the last promised nothing any more.

    A rule whose steps grow geometrically goes far beyond what was asked for within one step; hence the bound.
    """
    reach = select(start > 0, bounded(_FURTHEST * start, 0.0, LARGEST), LARGEST)
    stood = select(stood < reach, stood, reach)
    return select(tiny | (stood < mu), mu, stood)


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
