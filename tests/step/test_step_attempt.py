"""One attempt decided: on numbers, and by the same function on tensors, where the branch is data."""

import itertools
import math

import pytest
import torch

from pgdfast import Constant, Delayed, GainRatio, Longest, Sweep
from pgdfast.step import ATTEMPTS, STATUS, State, Trial, advance, demanded, judge
from pgdfast.step.attempt import without_damping
from pgdfast.step.rules import LARGEST, SMALLEST

MUS = (SMALLEST, 3 * SMALLEST, 1e-20, 1e-9, 0.01, 1.0, 1e5, 0.6 * LARGEST, LARGEST)
RULES = {
    "gain-ratio": GainRatio(), "gain-ratio, bounded": GainRatio(1e-3), "delayed": Delayed(), "delayed, bounded": Delayed(1e-3),
    "constant": Constant(), "longest": Longest(), "longest, bounded": Longest(0.1, 1e-3), "sweep": Sweep(),
}
LOSSES = (1.0, 1e-30)
AFTER = (0.5, 1.0, 1 - 1e-16, 1 + 1e-9, 2.0, math.nan, math.inf, -math.inf)
PREDICTED = (0.4, 1e-16, 0.0, -1e-17, -0.3, math.nan)
EPS = torch.finfo(torch.float64).eps


def number(value):
    """A 0-dim tensor: float64, or bool."""
    return torch.tensor(value, dtype=torch.bool if isinstance(value, bool) else torch.float64)


def same(found, expected):
    """Is a number on the device that of the host? Bit for bit; NaN equals NaN."""
    found, expected = float(found), float(expected)
    return found == expected or (math.isnan(found) and math.isnan(expected))


def same_state(found, expected):
    assert set(found.memory) == set(expected.memory)
    for name in ("start", "attempt", "rejected", "promised"):
        assert same(getattr(found, name), getattr(expected, name)), name
    assert float(found.mu) == pytest.approx(expected.mu, rel=1e-15)
    assert all(same(found.memory[name], value) for name, value in expected.memory.items())


@pytest.mark.parametrize("name", sorted(set(RULES) - {"constant"}))
@pytest.mark.parametrize("mu", MUS)
def test_rules_agree(name, mu):
    rule = RULES[name]
    for rho, nu in itertools.product((-math.inf, -2.0, 0.0, 0.1, 0.5, 0.77, 1.0, 3.0, math.nan), (2.0, 8.0, LARGEST)):
        memory = dict.fromkeys(rule.memory(), nu)
        there = {key: number(value) for key, value in memory.items()}
        for verb in (
            lambda mu, memory, rho: rule.accepted(mu, memory, rho),
            lambda mu, memory, rho: rule.rejected(mu, memory, rho, lambda: 1.0),
            lambda mu, memory, rho: rule.failed(mu, memory, lambda: 1.0),
            lambda mu, memory, rho: rule.exhausted(mu, memory),
        ):
            (expected, remembered), (found, grown) = verb(mu, memory, rho), verb(number(mu), there, number(rho))
            assert float(found) == pytest.approx(expected, rel=1e-15)
            assert {key: float(value) for key, value in grown.items()} == remembered


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("usable", [True, False])
@pytest.mark.parametrize("tries", [True, False])
def test_verdicts_agree(tries, usable, first):
    seen, hidden = set(), 0
    for loss, after, predicted, possible, dtype, (found, again, falls) in itertools.product(
        LOSSES, AFTER, PREDICTED, (1e-16, 1e-13, math.inf), (torch.float32, torch.float64),
        ((True, False, True), (False, False, True), (True, True, True), (True, False, False)),
    ):
        eps = torch.finfo(dtype).eps
        trial = Trial(loss, after * loss, predicted * loss, usable, 0.1, found, possible=possible * loss)
        on_host = judge(trial, first, tries, eps, again, falls)
        there = Trial(*map(number, trial[:5]), found, possible=number(trial.possible))
        on_device = judge(there, number(first), tries, eps, number(again), number(falls))
        assert all(same(a, b) for a, b in zip(on_device, on_host, strict=True))
        seen.add(STATUS[on_host.status])
        hidden += on_host.hidden
    expected = {"accepted", *(["rejected"] if tries else []), *(["converged"] if first else [])}
    assert seen == (expected if usable else {"failed"}) and (hidden > 0) == (tries and usable and first)


SMALL = {"possible": 1e-16}   # beside a promise of 1e-17, without damping


@pytest.mark.parametrize(("trial", "first", "verdict"), [
    (Trial(1.0, 0.5, 0.4, True, 0.1), True, (True, False, 1.25, "accepted")),
    (Trial(1.0, 0.5, 0.4, True, 0.1, found=False), True, (False, False, 1.25, "rejected")),
    (Trial(1.0, 1.0, 0.4, True, 0.1), True, (False, False, 0.0, "rejected")),
    (Trial(1.0, math.nan, 0.4, True, 0.1), True, (False, False, -math.inf, "rejected")),
    (Trial(1.0, 0.5, -0.1, True, 0.1), True, (True, False, -math.inf, "accepted")),
    (Trial(1.0, 1.0, 1e-17, True, 0.1, **SMALL), True, (True, True, math.nan, "converged")),
    (Trial(1.0, 1 + 1e-14, 1e-17, True, 0.1, **SMALL), True, (False, True, math.nan, "converged")),
    (Trial(1.0, 1 + 1e-9, 1e-17, True, 0.1, **SMALL), True, (False, False, -1e8, "rejected")),   # what else moves the loss?
    (Trial(1.0, 1.0, 1e-17, True, 0.1, **SMALL), False, (False, False, 0.0, "rejected")),
    (Trial(1.0, math.nan, math.nan, False, 0.1), True, (False, False, -math.inf, "failed")),
])
def test_verdicts_in_words(trial, first, verdict):
    found = judge(trial, first, True, EPS)
    assert (found.kept, found.ended, STATUS[found.status]) == (verdict[0], verdict[1], verdict[3])
    assert same(found.ratio, verdict[2]) or found.ratio == pytest.approx(verdict[2], rel=1e-6)
    assert not found.hidden


def test_a_promise_that_only_the_damping_makes_small_says_that_mu_must_fall():
    hidden = Trial(1.0, 1 - 1e-16, 1e-17, True, 1e9, possible=1e-3)
    assert judge(hidden, True, True, EPS)[:4] == (False, False, True, True)
    assert not judge(hidden, True, True, EPS, falls=False).hidden and not judge(hidden, False, True, EPS).hidden


def test_a_promise_at_the_rounding_of_sums_counts_after_a_step_in_vain():
    trial = Trial(1.0, 1 + 1e-14, 1e-14, True, 0.1, possible=1e-14)
    assert not judge(trial, True, True, EPS).ended and judge(trial, True, True, EPS, again=True).ended


@pytest.mark.parametrize(("slope", "bend", "rate", "expected"), [
    (2.0, 2.0, 1.0, 1.0), (2.0, 1.0, 1.0, 2.0), (2.0, 2.0, 0.5, 0.75), (2.0, 2.0, 3.0, 1.0), (2.0, 1e-20, 1.0, math.inf),
    (2.0, 0.0, 1.0, math.inf), (2.0, -1e-16, 1.0, math.inf), (0.0, 0.0, 1.0, 0.0), (1e-9, 1.0, 1.0, math.nan),
    (-1e-9, 1e-9, 1.0, math.nan), (-1e-17, -1e-17, 1.0, math.inf), (1e-17, 1e-16, 1.0, math.inf),
])
def test_the_promise_without_damping(slope, bend, rate, expected):
    assert same(without_damping(slope, bend, rate, EPS, 1.0), expected)
    assert same(without_damping(number(slope), number(bend), number(rate), EPS, number(1.0)), expected)


TRIALS = {
    "accepted": (1.0, 0.5, 0.4, True), "rejected": (1.0, 2.0, 0.4, True), "uphill in the model": (1.0, 2.0, -0.4, True),
    "not finite": (1.0, math.inf, 0.4, True), "converged": (1.0, 1.0, 1e-17, True, 1e-16), "hidden": (1.0, 1.1, 1e-17, True),
    "converged, rising": (1.0, 1 + 1e-14, 1e-17, True, 1e-16), "failed": (1.0, math.nan, math.nan, False),
    "a poor descent": (1.0, 0.98, 0.4, True),
}


def trial_of(seen, mu, *rest, wrap=lambda x: x):
    """The Trial of one of TRIALS at a damping."""
    loss, after, predicted, usable, *possible = map(wrap, seen)
    return Trial(loss, after, predicted, usable, wrap(mu), *rest, possible=possible[0] if possible else wrap(math.inf))


@pytest.mark.parametrize("with_momentum", [False, True])
@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_states_agree(name, truncated, with_momentum):
    """Every branch, at the first, a middle and the last attempt of a step."""
    rule = RULES[name]
    memory = dict.fromkeys(rule.memory(), 4.0)
    before = dict(vars(rule))
    for mu, attempt, rejected, promised, (kind, seen) in itertools.product(
        (SMALLEST, 0.3, LARGEST), (0, 5, ATTEMPTS - 1), (0, 3), (math.nan, 0.2), TRIALS.items()
    ):
        first = attempt == 0
        state = State(mu, memory, mu if first else 0.5, attempt, rejected, promised)
        trial = trial_of(seen, mu, True, with_momentum, truncated)
        verdict = demanded(rule, state, judge(trial, first, rule.tries, EPS, rejected > 0))
        expected, over = advance(rule, state, trial, verdict, lambda: 1.0)
        there = State(*(number(x) if not isinstance(x, dict) else {k: number(v) for k, v in x.items()} for x in state))
        trial = trial_of(seen, mu, True, with_momentum, truncated, wrap=number)
        seen_there = demanded(rule, there, judge(trial, number(first), rule.tries, EPS, there.rejected > 0))
        found, ended = advance(rule, there, trial, seen_there, lambda: 1.0)
        same_state(found, expected)
        assert bool(ended) == over and all(same(a, b) for a, b in zip(seen_there, verdict, strict=True)), kind
    assert vars(rule) == before and all(value == 4.0 for value in memory.values())


@pytest.mark.parametrize(("kind", "attempt", "kept", "status"), [
    ("accepted", 0, True, "accepted"), ("a poor descent", 0, False, "rejected"),
    ("a poor descent", ATTEMPTS - 2, False, "rejected"),
    ("a poor descent", ATTEMPTS - 1, True, "accepted"), ("rejected", ATTEMPTS - 1, False, "rejected"),
    ("converged", 0, True, "converged"), ("failed", 0, False, "failed"),
])
def test_a_target_undoes_poor_descents_but_the_last(kind, attempt, kept, status):
    rule, trial = RULES["longest, bounded"], trial_of(TRIALS[kind], 1.0)
    verdict = demanded(rule, State(1.0, {}, 1.0, attempt), judge(trial, True, True, EPS))
    assert (verdict.kept, STATUS[verdict.status]) == (kept, status)


def after(kind, state=None, rule=RULES["gain-ratio"], **options):
    """(state, over) after one attempt of a kind."""
    state = state or State(1.0, rule.memory(), 1.0)
    trial = trial_of(TRIALS[kind], state.mu)._replace(**options)
    return advance(rule, state, trial, judge(trial, math.isnan(state.promised), rule.tries, EPS), lambda: 1.0)


def test_an_accepted_attempt_ends_the_step():
    state, over = after("accepted", State(8.0, {"nu": 16.0}, 1.0, 3, 2, 0.3))
    assert over and (state.mu, state.memory) == (8.0 / 3, {"nu": 2.0})
    assert (state.start, state.attempt, state.rejected) == (1.0, 0, 0) and math.isnan(state.promised)


def test_rejections_raise_mu_and_keep_the_promise_of_the_first():
    state, over = after("rejected")
    assert not over and (state.mu, state.memory, state.attempt, state.promised) == (2.0, {"nu": 4.0}, 1, math.inf)
    state, over = after("uphill in the model", state, possible=0.3)
    assert not over and (state.mu, state.memory, state.attempt, state.promised) == (8.0, {"nu": 8.0}, 2, math.inf)


@pytest.mark.parametrize(("rule", "last", "mu"), [
    ("delayed", "rejected", 2.0**12),       # goes on from where the attempts stood
    ("gain-ratio", "rejected", 1e4),        # whose nu grows too fast for that
    ("sweep", "rejected", 1e4),
    ("gain-ratio", "hidden", 10.0),         # down to promises of nothing: ten times the first, on another grid
    ("delayed", "hidden", 10.0),
    ("delayed", "failed", 2.0**12),
    ("constant", "failed", 1.0),
])
def test_where_a_step_goes_on_from_after_twelve_attempts_in_vain(rule, last, mu):
    rule = RULES[rule]
    state = State(1.0, rule.memory(), 1.0)
    for attempt in range(ATTEMPTS):
        kind = "failed" if last == "failed" else "rejected" if attempt < ATTEMPTS - 1 else last
        state, over = after(kind, state, rule)
        assert over == (attempt == ATTEMPTS - 1)
    assert (state.mu, state.memory, state.attempt, state.rejected) == (mu, rule.memory(), 0, last != "failed")


def test_gauss_newton_in_vain_goes_on_from_the_curvature():
    state = State(0.0, {}, 0.0)
    for _ in range(ATTEMPTS):
        state, _ = after("rejected", state, RULES["delayed"])
    assert state.mu == 2.0**11


def test_convergence_ends_the_step_and_leaves_mu():
    state, over = after("converged, rising", State(1.0, {"nu": 2.0}, 1.0, 0, 2))
    assert over and (state.mu, state.attempt, state.rejected) == (1.0, 0, 2)


@pytest.mark.parametrize("rule", ["gain-ratio", "delayed", "sweep"])
def test_a_hidden_promise_lowers_mu_within_the_step(rule):
    state, over = after("hidden", State(1e9, RULES[rule].memory(), 1e9, 0, 2), RULES[rule])
    assert not over and (state.mu, state.start, state.attempt, state.rejected) == (1e6, 1e6, 1, 2)
    assert math.isnan(state.promised)   # so that the next attempt counts as a first one
    state, over = after("hidden", State(1e9, RULES[rule].memory(), 1e9, ATTEMPTS - 1), RULES[rule])
    assert over and (state.mu, state.attempt) == (1e6, 0)
    assert GainRatio(1e7).lowered(1e9, {"nu": 2.0}) == (1e7, {"nu": 2.0})


def test_failed_solves_promise_nothing_and_are_no_rejections_in_a_row():
    state, over = after("failed")
    assert not over and state.mu == 2.0 and math.isnan(state.promised)
    state, over = after("failed", State(1.0, {"nu": 2.0}, 0.5, ATTEMPTS - 1, 2))
    assert over and (state.mu, state.rejected) == (5.0, 0)
    state, over = after("failed", rule=RULES["constant"], state=State(1.0, {}, 1.0))
    assert not over and state.mu == 10.0


def test_a_rejected_prior_is_dropped_at_the_same_mu():
    state, over = after("rejected", with_momentum=True)
    assert not over and (state.mu, state.attempt) == (1.0, 1) and math.isnan(state.promised)
    state, over = after("rejected", state)   # then without it
    assert (state.mu, state.promised) == (2.0, math.inf)


def test_a_truncated_step_leaves_mu_where_the_rejection_put_it():
    state, over = after("accepted", State(2.0, {"nu": 4.0}, 1.0, 1), truncated=True)
    assert over and (state.mu, state.memory) == (2.0, {"nu": 4.0})
