"""Damping rules: the sequence of mu, on numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pgdfast
from pgdfast import Constant, Delayed, GainRatio, Longest, Sweep
from pgdfast.step.choice import RULES, chosen_rule
from pgdfast.step.rules import LARGEST, SMALLEST, bounds

ratios = st.floats(-1e300, 1e300) | st.sampled_from([-math.inf, math.nan, 0.0, 0.5, 1.0, 1e-300])
dampings = st.floats(0, LARGEST)
bounded = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def curvature():
    """That of a model along a step."""
    return 1.0


@pytest.mark.parametrize("rho, factor", [(1.0, 1 / 3), (2.0, 1 / 3), (0.75, 0.875), (0.5, 1.0), (0.25, 1.125), (0.0, 2.0)])
def test_nielsens_factor(rho, factor):
    mu, memory = GainRatio().accepted(1.0, {"nu": 8.0}, rho)
    assert mu == pytest.approx(factor, rel=1e-14) and memory == {"nu": 2.0}


def test_no_gain_ratio_leaves_mu():
    assert GainRatio().accepted(0.3, {"nu": 8.0}, math.nan) == (0.3, {"nu": 2.0})


def test_nielsens_growth():
    rule, mu = GainRatio(), 1.0
    memory = rule.memory()
    for factor in (2, 4, 8):
        following, memory = rule.rejected(mu, memory, -1.0, curvature)
        assert following == factor * mu and memory == {"nu": 2.0 * factor}
        mu = following
    assert rule.exhausted(mu, memory) == (10 * mu, {"nu": 2.0})
    _, memory = rule.accepted(mu, memory, 1.0)
    assert rule.rejected(1.0, memory, -1.0, curvature)[0] == 2.0


def test_other_rules():
    assert Constant().accepted(3.0, {}, math.nan) == Constant().rejected(3.0, {}, -1.0, curvature) == (3.0, {})
    assert Constant().failed(3.0, {}, curvature) == (30.0, {}) and Constant().exhausted(3.0, {}) == (3.0, {})
    assert Delayed().accepted(1.0, {}, 1.0) == (0.2, {}) and Delayed().rejected(1.0, {}, -1.0, curvature) == (2.0, {})
    assert Sweep().accepted(3.0, {}, 0.1) == (3.0, {})
    assert Sweep(factors=(0.1, 10.0)).rejected(1.0, {}, -1.0, curvature) == (20.0, {})


@pytest.mark.parametrize(("target", "rho", "factor"), [
    (0.5, 1.0, 0.1), (0.5, 3.0, 0.1), (0.5, 0.75, 10**-0.5), (0.5, 0.5, 1.0), (0.2, 0.4, 10**-0.25), (0.2, -math.inf, 1.0),
    (0.2, math.nan, 1.0),
])
def test_longest_rests_where_the_ratio_is_the_target(target, rho, factor):
    rule = Longest(target)
    mu, memory = rule.accepted(3.0, {}, rho)
    assert mu == pytest.approx(3.0 * factor, rel=1e-14) and memory == {}
    assert rule.rejected(3.0, {}, rho, curvature) == (12.0, {})
    assert Longest(target, smallest=2.9).accepted(3.0, {}, rho)[0] == max(2.9, mu)


@pytest.mark.parametrize("bad", [0, 1.0, -0.5, math.nan, "half", None])
def test_targets_that_are_none(bad):
    with pytest.raises(ValueError, match="target is .*; it is a gain ratio, between 0 and 1"):
        Longest(target=bad)


@pytest.mark.parametrize("name", ["auto", "gain-ratio", "delayed", "longest", "sweep"])
def test_mu_of_zero_grows_to_the_curvature_along_the_step(name):
    rule = chosen_rule(name)
    assert rule.accepted(0.0, rule.memory(), 1.0)[0] == 0.0
    for verb in (rule.rejected, lambda mu, memory, _, curvature: rule.failed(mu, memory, curvature)):
        assert verb(0.0, rule.memory(), -1.0, lambda: 7.0)[0] == 7.0
        assert verb(0.0, rule.memory(), -1.0, lambda: 0.0)[0] == SMALLEST
        assert verb(0.0, rule.memory(), -1.0, lambda: 1e300)[0] == LARGEST
        verb(1.0, rule.memory(), -1.0, lambda: pytest.fail("the curvature costs two products, and mu is not 0"))


@bounded
@given(st.sampled_from(sorted(RULES)), dampings, ratios, st.floats(0, 1e300))
def test_mu_stays_finite_and_never_negative(name, mu, rho, curvature):
    rule = chosen_rule(name)
    memory = rule.memory()
    for _ in range(3):
        higher, following = rule.rejected(mu, memory, rho, lambda: curvature)
        for found in (rule.accepted(mu, memory, rho), (higher, following), rule.failed(mu, memory, lambda: curvature),
                      rule.exhausted(mu, memory)):
            assert 0 <= found[0] < math.inf and set(found[1]) == set(rule.memory())
        assert higher > mu or mu >= LARGEST or not rule.tries
        memory = following


@pytest.mark.parametrize("name", sorted(RULES))
def test_rules_are_pure(name):
    """The object keeps nothing, and the memory that it is given is not written to."""
    rule = chosen_rule(name)
    before, memory = dict(vars(rule)), rule.memory()
    given_memory = dict(memory)
    for _ in range(2):
        for mu in (0.0, 1.0, 1e20):
            rule.accepted(mu, memory, 0.3)
            rule.rejected(mu, memory, -1.0, curvature)
            rule.failed(mu, memory, curvature)
            rule.exhausted(mu, memory)
            rule.dampings(mu)
    assert vars(rule) == before and memory == given_memory


class Half(pgdfast.DampingRule):
    """A rule with the two verbs that it must have."""

    def accepted(self, mu, memory, rho):
        return mu / 2, memory

    def rejected(self, mu, memory, rho, curvature):
        return 3 * mu, memory


def test_a_rule_of_ones_own_has_the_other_verbs_by_itself():
    rule = Half()
    assert (rule.tries, rule.sweeps, rule.memory()) == (True, False, {})
    assert rule.failed(1.0, {}, curvature) == (3.0, {}) and rule.exhausted(2.0, {}) == (20.0, {})
    assert rule.dampings(2.0) == [2.0] and chosen_rule(rule) is rule


def test_rules_that_are_none():
    names = "auto, constant, gain-ratio, delayed, longest, sweep"
    with pytest.raises(ValueError, match=f"'fixed' is not available; use one of {names}"):
        chosen_rule("fixed")
    for bad in (object(), 3, Half):
        with pytest.raises(TypeError, match="is no pgdfast.DampingRule; use one of .* subclass pgdfast.DampingRule and define"):
            chosen_rule(bad)

    class Lacking(pgdfast.DampingRule):
        def accepted(self, mu, memory, rho):
            return mu, memory

    with pytest.raises(TypeError, match="rejected"):
        Lacking()


@pytest.mark.parametrize(("before", "curvature", "dtype", "least", "most"), [
    (1.0, 7.0, torch.float64, 7e-20, 7e20),
    (1.0, math.nan, torch.float64, SMALLEST, LARGEST),
    (1e-30, 1e5, torch.float64, 1e-30, 1e25),    # never moved by its bounds
    (1e30, 1e5, torch.float64, 1e-15, 1e30),
    (1.0, 1e20, torch.float32, 1.0, 1e36),       # that float32 holds
    (1.0, 1e-20, torch.float32, 1e-36, 1.0),
    (0.0, 1.0, torch.float64, 0.0, 1e20),
])
def test_bounds_of_mu(before, curvature, dtype, least, most):
    assert bounds(before, curvature, dtype) == pytest.approx((least, most), rel=1e-15)
    if curvature == curvature:   # a graph's is known
        there = bounds(*(torch.tensor(x, dtype=torch.float64) for x in (before, curvature)), dtype)
        assert [float(x) for x in there] == pytest.approx((least, most), rel=1e-15)
