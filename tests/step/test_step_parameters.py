"""Moves of the parameters of one network and of many, and back bit for bit."""

import pytest
import torch
from helpers import rand, snapshot, unchanged

from pgdfast.step import Parameters, Point


def two(dtype=torch.float64):
    """Parameters of one network, the second of which is not contiguous: 14 numbers."""
    return [rand(3, 2, dtype=dtype).requires_grad_(), rand(4, 2, seed=1, dtype=dtype).t().requires_grad_()]


def stacked(count=3):
    """Parameters of three networks: 5 numbers each."""
    return [rand(count, 2, seed=2).requires_grad_(), rand(count, 3, 1, seed=3).requires_grad_()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rates", [[0.3, 0.3], [0.3, 0.7]])
def test_there_and_back(rates, dtype):
    params = two(dtype)
    before, d, parameters = snapshot(params), rand(14, seed=2, dtype=dtype), Parameters(params, None)
    parameters.begin([rates], None)
    for t in (1.0, 0.5, 1e6):   # each from where the last one ended
        parameters.go({0: Point(d, t)})
        assert parameters.away == {0} and parameters.touched
        for p, q, part, rate in zip(params, before, d.split([6, 8]), rates, strict=True):
            assert torch.allclose(p, q - rate * t * part.view(p.shape), rtol=1e-6, atol=0)
    for _ in range(2):
        parameters.all_back()
        assert unchanged(params, before) and not parameters.away
    parameters.go({0: Point(d, displacement=True)})   # has its rates in it
    assert torch.allclose(params[0], before[0] - d[:6].view(3, 2), rtol=1e-6, atol=0)
    assert all(p.requires_grad for p in params)


def test_members_move_and_return_apart():
    params = stacked()
    before, parameters = snapshot(params), Parameters(params, 3)
    parameters.begin([[1.0, 1.0], [0.5, 0.25], [2.0, 2.0]], None)
    d = {b: rand(5, seed=10 + b) for b in range(3)}

    def moved(b, rates, t=1.0):
        return all(
            torch.allclose(p[b].reshape(-1), q[b].reshape(-1) - t * rate * part, rtol=1e-14, atol=1e-15)
            for p, q, part, rate in zip(params, before, d[b].split([2, 3]), rates, strict=True)
        )

    def at_home(b):
        return all(torch.equal(p[b], q[b]) for p, q in zip(params, before, strict=True))

    parameters.go({0: Point(d[0]), 1: Point(d[1], 0.5)})
    assert moved(0, [1.0, 1.0]) and moved(1, [0.5, 0.25], 0.5) and at_home(2) and parameters.away == {0, 1}
    parameters.go({1: Point(d[1]), 2: Point(d[2], displacement=True)})
    assert moved(0, [1.0, 1.0]) and moved(1, [0.5, 0.25]) and moved(2, [1.0, 1.0]) and parameters.away == {0, 1, 2}
    there = snapshot(params)
    aside = parameters.set_aside()
    assert unchanged(params, before)
    parameters.forward(aside)
    assert unchanged(params, there) and parameters.touched
    parameters.back((1, 2))
    assert moved(0, [1.0, 1.0]) and at_home(1) and at_home(2) and parameters.away == {0}
    parameters.back((1,))   # where it is already
    parameters.back((0,))
    assert unchanged(params, before) and parameters.set_aside() is None
    parameters.forward(None)
    assert unchanged(params, before)


def test_one_call_moves_members_as_calls_of_their_own_do():
    ends = []
    for together in (True, False):
        params = stacked()
        parameters = Parameters(params, 3)
        parameters.begin([[0.3, 0.3]] * 3, None)
        rows = rand(3, 5, seed=4)
        points = {b: Point(rows[b]) for b in range(3)}   # rows of one matrix
        if together:
            parameters.go(points)
        else:
            for b in range(3):
                parameters.go({b: Point(rows[b].clone())})
        ends.append(snapshot(params))
    assert all(torch.allclose(a, b, rtol=1e-15, atol=0) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("count", [None, 3])
def test_the_norm_constraint_shortens_all_rates_of_a_member_by_one_factor(count):
    parameters, rates = Parameters(two() if count is None else stacked(), count), [0.5, 0.25]
    parameters.begin([rates] * (count or 1), 0.01)
    b, P = (0, 14) if count is None else (2, 5)
    assert parameters.common_rates[b] is None
    d = rand(P, seed=3)
    parameters.constrain(b, d)
    assert float(parameters.scaled(b, d).square().sum()) == pytest.approx(0.01, rel=1e-14)
    assert parameters.rates(b)[0] == pytest.approx(2 * parameters.rates(b)[1], rel=1e-15)
    if count is not None:
        assert parameters.rates(0) == rates
    parameters.constrain(b, 1e-3 * d)
    assert parameters.rates(b) == rates
    assert float(parameters.fitting(d).square().sum()) == pytest.approx(0.01, rel=1e-14)
    assert parameters.fitting(1e-3 * d) is not d and torch.equal(parameters.fitting(1e-3 * d), 1e-3 * d)


@pytest.mark.parametrize("count", [None, 3])
def test_decay_takes_from_those_that_moved_a_part_of_what_they_were(count):
    params = two() if count is None else stacked()
    before, parameters = snapshot(params), Parameters(params, count)
    parameters.begin([[1.0, 1.0]] * (count or 1), None)
    b, P = (0, 14) if count is None else (2, 5)
    parameters.go({b: Point(rand(P, seed=3))})
    there = snapshot(params)
    parameters.decay([[0.1, 0.0]] * (count or 1))
    assert torch.equal(params[1].detach(), there[1])
    own = slice(None) if count is None else b
    assert torch.allclose(params[0][own], there[0][own] - 0.1 * before[0][own], rtol=1e-15, atol=1e-15)
    if count is not None:
        assert torch.equal(params[0][:2].detach(), before[0][:2])
    parameters.release()
    parameters.all_back()   # where the members are is where they stay
    assert not unchanged(params, before)
