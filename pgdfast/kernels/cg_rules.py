"""The control of conjugate gradients: what follows from the numbers that a product with A and its update have left.

Arrival is judged by the true residual, which is computed every CHECK_EVERY iterations and whenever the recurrence claims to
have arrived; CG restarts from it where the two differ, until that no longer helps, and goes back to the last check where the
model's value has fallen since. csrc/plan/cg_rules.h has the same rules, and a test holds the two together.

The rules are expressions without branches over `where`, so that this one source serves the numbers of one system, tensors of
many systems' and Triton's kernels: `rules_with` binds it to a `where`. One turn of CG is one product with A, of what `phase`
says:

    ITERATE   A p: x += step p, residual -= step A p        step: `step_length`
    START     A s, s a given start: x = t s                 t: `multiple_of_start`
    CHECK     A x: residual = b - A x; of iteration 0 without a product, x being zero and the residual b
    RESTORE   the same, for the x of the last check, to which CG went back
    ENDED     nothing

then `judge` and `go_on`. Truth values are combined by & and |, and denied by == 0, which means the same for all.
"""

from __future__ import annotations

import types

from .limits import CHECK_EVERY, CLAIM_RATIO, FALL, PROGRESS_LEAST, PROGRESS_PART, RESTART_RATIO

ITERATE, START, CHECK, RESTORE, ENDED = range(5)
SOLVED, MAX_ITERATIONS, BREAKDOWN, STAGNATED, PROGRESS = 0, 2, 3, 4, 5   # numbers of STATUS in protocol.py


def where(which, a, b):
    """A where `which` is true, else b."""
    return a if which else b


def multiple_of_start(along, curvature):
    """(is there one, t): the best multiple t of a start s, with along = <b, s> and curvature = <s, A s>."""
    fits = (along - along == 0) & (curvature > 0) & (curvature - curvature == 0)   # x - x is 0 for finite x alone
    return fits, where(fits, along / where(fits, curvature, 1.0), 0.0)


def step_length(phase, curvature, rz):
    """(step, broken): the length of the step along p, curvature = <p, A p>; broken where there is none.

    That is the exact solution in a singular direction, or rounding.
    """
    good = (phase == ITERATE) & (curvature > 0) & (rz > 0)
    return where(good, rz / where(good, curvature, 1.0), 0.0), (phase == ITERATE) & (good == 0)


def judge(
    phase, status, iteration, claimed, broken, step, before, norm, target, value, recurrence, last_claim, safe, reached,
):
    """What follows from a turn, but for what `go_on` says where the last item is true.

    status: as far as known. claimed: did the recurrence claim to have arrived? before: rz of the iteration before. norm: of the
    residual. value: the model's reduction by the recurrence; recurrence: the norm that it had when a check was called for;
    last_claim: the true norm at the last restart; safe: the model's reduction at the last check; reached: that of x by the
    true residual, in a check. Returns (phase, status, iteration, claimed, value, recurrence, last_claim, safe, whether x is to
    be kept to go back to, whether it is to be set back, whether the direction starts anew, goes on).
    """
    starts = phase == START
    checks = phase == CHECK
    arrived = norm <= target
    moved = (phase == ITERATE) & (broken == 0)
    iteration = iteration + where(moved, 1, 0)
    value = where(moved, value + 0.5 * step * before, value)
    due = moved & (arrived | (iteration % CHECK_EVERY == 0))
    claimed = (moved & arrived) | ((moved == 0) & claimed)
    recurrence = where(due, norm, recurrence)
    first = starts | (checks & (iteration == 0))
    judged = checks & (arrived == 0) & (first == 0)
    lost = judged & ((reached >= (1 - FALL) * safe) == 0)
    stays = judged & (lost == 0)
    regular = stays & (iteration % CHECK_EVERY == 0)
    restart = stays & (claimed | (norm > RESTART_RATIO * recurrence))
    stagnated = restart & (norm > CLAIM_RATIO * last_claim)
    last_claim = where(restart & (stagnated == 0), norm, last_claim)
    safe = where(regular, reached, where(starts, value, safe))
    keeps = regular | starts | (first & (arrived == 0))
    goes_on = (moved & (due == 0)) | (first & (arrived == 0)) | (stays & (stagnated == 0))
    status = where((phase == ITERATE) & (moved == 0), BREAKDOWN, status)
    status = where((checks | starts) & arrived, SOLVED, status)
    status = where(stagnated | (phase == RESTORE), STAGNATED, status)
    phase = where(due, CHECK, where(lost, RESTORE, where(goes_on, ITERATE, ENDED)))
    return phase, status, iteration, claimed, value, recurrence, last_claim, safe, keeps, lost, restart | first, goes_on


def progress_window(iteration):
    """Over how many iterations progress is judged."""
    return where(iteration // PROGRESS_PART > PROGRESS_LEAST, iteration // PROGRESS_PART, PROGRESS_LEAST)


def go_on(phase, status, goes_on, iteration, window, value, earlier, progress, max_iterations):
    """(phase, status) after the stops of an iteration that is complete; earlier: the value `window` iterations ago."""
    little = goes_on & (progress > 0) & (iteration > window) & (value - earlier < window * progress * value)
    limit = goes_on & (little == 0) & (iteration >= max_iterations)
    status = where(little, PROGRESS, where(limit, MAX_ITERATIONS, status))
    return where(little | limit, ENDED, phase), status


def direction_factor(restart, rz, before):
    """Beta of the next direction p = z + beta p."""
    fresh = restart | (before == 0)
    return where(fresh, 0.0, rz / where(fresh, 1.0, before))


RULES = multiple_of_start, step_length, judge, progress_window, go_on, direction_factor


def rules_with(where, wrap=lambda function: function, constant=lambda number: number, **seen) -> types.SimpleNamespace:
    """The rules bound to another `where`; `wrap` is applied to every function, `constant` to every number that they name.

    seen: other names that the functions are to see.
    """
    names = {"__name__": __name__} | {
        name: constant(value) if isinstance(value, (int, float)) else value
        for name, value in globals().items() if name.isupper() and name != "RULES"
    }
    made = {}
    for rule in RULES:
        made[rule.__name__] = wrap(types.FunctionType(rule.__code__, {**names, **seen, "where": where}, rule.__name__))
    return types.SimpleNamespace(**made)
