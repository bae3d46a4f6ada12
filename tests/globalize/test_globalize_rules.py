"""Damping rules, line search and the move, without an optimizer around them."""

import math

import pytest
import torch
from helpers import rand
from hypothesis import given, settings
from hypothesis import strategies as st

from pgdfast.globalize import (
    RULES,
    Armijo,
    Constant,
    Delayed,
    GainRatio,
    Move,
    damping_rule,
    line_search,
)

ratios = st.floats(-1e300, 1e300) | st.sampled_from([-math.inf, 0.0, 0.5, 1.0, 1e-300])
dampings = st.floats(0, 1e20)
bounded = settings(max_examples=200, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize(
    "rho, factor",
    [(1.0, 1 / 3), (2.0, 1 / 3), (0.75, 0.875), (0.5, 1.0), (0.25, 1.125), (0.0, 2.0)],
)
def test_nielsens_factor(rho, factor):
    assert GainRatio().accepted(1.0, rho) == pytest.approx(factor, rel=1e-14)


def test_nielsens_growth():
    rule, mu = GainRatio(), 1.0
    for factor in (2, 4, 8):
        following = rule.rejected(mu, -1.0, 1.0)
        assert following == factor * mu
        mu = following
    rule.accepted(mu, 1.0)
    assert rule.rejected(1.0, -1.0, 1.0) == 2.0


def test_other_rules():
    assert Constant().accepted(3.0, None) == Constant().rejected(3.0, -1.0, 1.0) == 3.0
    assert Constant().invalid(3.0, 1.0) == 30.0
    assert Delayed().accepted(1.0, 1.0) == 0.2 and Delayed().rejected(1.0, -1.0, 1.0) == 2.0


@bounded
@given(st.sampled_from(sorted(RULES)), dampings, ratios, st.floats(1e-300, 1e300))
def test_mu_stays_finite_and_never_negative(name, mu, rho, curvature):
    rule = damping_rule(name)
    for _ in range(3):
        for following in (
            rule.accepted(mu, rho),
            rule.rejected(mu, rho, curvature),
            rule.invalid(mu, curvature),
        ):
            assert 0 <= following < math.inf
        if rule.tries:
            assert rule.rejected(mu, rho, curvature) > mu or mu >= 1e20


@pytest.mark.parametrize("name", sorted(RULES))
def test_state_round_trip(name):
    a, b = damping_rule(name), damping_rule(name)
    mu = 1.0
    for _ in range(3):
        mu = a.rejected(mu, -1.0, 1.0)
    b.load_state_dict(a.state_dict())
    assert a.rejected(mu, -1.0, 1.0) == b.rejected(mu, -1.0, 1.0)


def test_armijo_takes_the_first_step_that_descends_enough():
    seen = []

    def evaluate(t):
        seen.append(t)
        return {1.0: math.nan, 0.5: 5.0, 0.25: 1.0 - 1e-5 * 0.25}.get(t, 1.0 - 2e-4 * t)

    assert Armijo().search(evaluate, 1.0, 1.0) == (0.125, 1.0 - 2e-4 * 0.125, 4)
    assert seen == [1.0, 0.5, 0.25, 0.125]
    assert Armijo(trials=2).search(evaluate, 1.0, 1.0) == (None, 1.0, 2)
    assert line_search("armijo") == Armijo() and line_search(None) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rates", [[0.3, 0.3], [0.3, 0.7]])
def test_move_and_back(rates, dtype):
    params = [
        rand(3, 2, dtype=dtype).requires_grad_(),
        rand(4, 2, seed=1, dtype=dtype).t().requires_grad_(),
    ]
    before, d = [p.detach().clone() for p in params], rand(14, seed=2, dtype=dtype)
    move = Move(params, rates)
    move.save()
    for t in (1.0, 0.5, 1e6):
        move.to(d, t)
        for p, q, part, rate in zip(params, before, d.split([6, 8]), rates, strict=True):
            assert torch.allclose(p, q - rate * t * part.view(p.shape), rtol=1e-6, atol=0)
    move.undo()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    move.undo()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
