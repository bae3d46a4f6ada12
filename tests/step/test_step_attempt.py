"""One attempt decided: on numbers, and by the same function on tensors, where the branch is data."""

import itertools
import math

import pytest
import torch

from pgdfast import Constant, Delayed, GainRatio, Longest, Sweep
from pgdfast.step import ATTEMPTS, STATUS, State, Trial, advance, demanded, judge

MUS = (1e-20, 3e-20, 1e-9, 0.01, 1.0, 1e5, 6e19, 1e20)
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
    for rho, nu in itertools.product((-math.inf, -2.0, 0.0, 0.1, 0.5, 0.77, 1.0, 3.0, math.nan), (2.0, 8.0, 1e20)):
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
    seen = set()
    for loss, after, predicted, found, dtype in itertools.product(
        LOSSES, AFTER, PREDICTED, (True, False), (torch.float32, torch.float64)
    ):
        eps = torch.finfo(dtype).eps
        on_host = judge(Trial(loss, after * loss, predicted * loss, usable, 0.1, found), first, tries, eps)
        there = Trial(number(loss), number(after * loss), number(predicted * loss), number(usable), number(0.1), found)
        on_device = judge(there, number(first), tries, eps)
        assert all(same(a, b) for a, b in zip(on_device, on_host, strict=True))
        seen.add(STATUS[on_host.status])
    expected = {"accepted", "rejected", *(["stalled"] if first else [])} if tries else {"accepted"}
    assert seen == (expected if usable else {"failed"})


@pytest.mark.parametrize(("trial", "first", "verdict"), [
    (Trial(1.0, 0.5, 0.4, True, 0.1), True, (True, False, 1.25, "accepted")),
    (Trial(1.0, 0.5, 0.4, True, 0.1, found=False), True, (False, False, 1.25, "rejected")),
    (Trial(1.0, 1.0, 0.4, True, 0.1), True, (False, False, 0.0, "rejected")),
    (Trial(1.0, math.nan, 0.4, True, 0.1), True, (False, False, -math.inf, "rejected")),
    (Trial(1.0, 0.5, -0.1, True, 0.1), True, (True, False, -math.inf, "accepted")),
    (Trial(1.0, 1.0, 1e-17, True, 0.1), True, (True, True, math.nan, "stalled")),
    (Trial(1.0, 1.1, 1e-17, True, 0.1), True, (False, True, math.nan, "stalled")),
    (Trial(1.0, 1.0, 1e-17, True, 0.1), False, (False, False, 0.0, "rejected")),
    (Trial(1.0, math.nan, math.nan, False, 0.1), True, (False, False, -math.inf, "failed")),
])
def test_verdicts_in_words(trial, first, verdict):
    found = judge(trial, first, True, EPS)
    assert (found.kept, found.stalled, STATUS[found.status]) == (verdict[0], verdict[1], verdict[3])
    assert same(found.ratio, verdict[2])


TRIALS = {
    "accepted": (1.0, 0.5, 0.4, True), "a poor descent": (1.0, 0.98, 0.4, True), "rejected": (1.0, 2.0, 0.4, True),
    "uphill in the model": (1.0, 2.0, -0.4, True), "not finite": (1.0, math.inf, 0.4, True),
    "stalled": (1.0, 1.0, 1e-17, True), "stalled, rising": (1.0, 1.1, 1e-17, True), "failed": (1.0, math.nan, math.nan, False),
}


@pytest.mark.parametrize("with_momentum", [False, True])
@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_states_agree(name, truncated, with_momentum):
    """Every branch, at the first, a middle and the last attempt of a step."""
    rule = RULES[name]
    memory = dict.fromkeys(rule.memory(), 4.0)
    before = dict(vars(rule))
    for mu, attempt, rejected, promised, (kind, seen) in itertools.product(
        (1e-20, 0.3, 1e20), (0, 5, ATTEMPTS - 1), (0, 3), (math.nan, 0.2), TRIALS.items()
    ):
        first = attempt == 0
        state = State(mu, memory, mu if first else 0.5, attempt, rejected, promised)
        trial = Trial(*seen, mu, True, with_momentum, truncated)
        verdict = demanded(rule, state, judge(trial, first, rule.tries, EPS))
        expected, over = advance(rule, state, trial, verdict, lambda: 1.0)
        there = State(*(number(x) if not isinstance(x, dict) else {k: number(v) for k, v in x.items()} for x in state))
        trial = Trial(*map(number, seen), number(mu), True, with_momentum, truncated)
        seen_there = demanded(rule, there, judge(trial, number(first), rule.tries, EPS))
        found, ended = advance(rule, there, trial, seen_there, lambda: 1.0)
        same_state(found, expected)
        assert bool(ended) == over and all(same(a, b) for a, b in zip(seen_there, verdict, strict=True)), kind
    assert vars(rule) == before and all(value == 4.0 for value in memory.values())


@pytest.mark.parametrize(("kind", "attempt", "kept", "status"), [
    ("accepted", 0, True, "accepted"), ("a poor descent", 0, False, "rejected"),
    ("a poor descent", ATTEMPTS - 2, False, "rejected"),
    ("a poor descent", ATTEMPTS - 1, True, "accepted"), ("rejected", ATTEMPTS - 1, False, "rejected"),
    ("stalled", 0, True, "stalled"), ("failed", 0, False, "failed"),
])
def test_a_target_undoes_poor_descents_but_the_last(kind, attempt, kept, status):
    rule, trial = RULES["longest, bounded"], Trial(*TRIALS[kind], 1.0)
    verdict = demanded(rule, State(1.0, {}, 1.0, attempt), judge(trial, True, True, EPS))
    assert (verdict.kept, STATUS[verdict.status]) == (kept, status)


def after(kind, state=None, rule=RULES["gain-ratio"], **options):
    """(state, over) after one attempt of a kind."""
    state = state or State(1.0, rule.memory(), 1.0)
    trial = Trial(*TRIALS[kind], state.mu, **options)
    return advance(rule, state, trial, judge(trial, state.mu == state.start, rule.tries, EPS), lambda: 1.0)


def test_an_accepted_attempt_ends_the_step():
    state, over = after("accepted", State(8.0, {"nu": 16.0}, 1.0, 3, 2, 0.3))
    assert over and (state.mu, state.memory) == (8.0 / 3, {"nu": 2.0})
    assert (state.start, state.attempt, state.rejected) == (1.0, 0, 0) and math.isnan(state.promised)


def test_rejections_raise_mu_and_keep_the_promise_of_the_first():
    state, over = after("rejected")
    assert not over and (state.mu, state.memory, state.attempt, state.promised) == (2.0, {"nu": 4.0}, 1, 0.4)
    state, over = after("uphill in the model", state)
    assert not over and (state.mu, state.memory, state.attempt, state.promised) == (8.0, {"nu": 8.0}, 2, 0.4)


def test_twelve_attempts_in_vain_end_the_step_at_ten_times_its_first_mu():
    state = State(1.0, {"nu": 2.0}, 1.0)
    for attempt in range(ATTEMPTS):
        state, over = after("rejected", state)
        assert over == (attempt == ATTEMPTS - 1)
    assert (state.mu, state.memory, state.attempt, state.rejected, state.promised) == (10.0, {"nu": 2.0}, 0, 1, 0.4)


def test_a_stall_ends_the_step_and_leaves_mu():
    state, over = after("stalled, rising", State(1.0, {"nu": 2.0}, 1.0, 0, 2))
    assert over and (state.mu, state.attempt, state.rejected) == (1.0, 0, 0)


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
    assert (state.mu, state.promised) == (2.0, 0.4)


def test_a_truncated_step_leaves_mu_where_the_rejection_put_it():
    state, over = after("accepted", State(2.0, {"nu": 4.0}, 1.0, 1), truncated=True)
    assert over and (state.mu, state.memory) == (2.0, {"nu": 4.0})
