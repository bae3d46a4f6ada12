"""Trials draw the random numbers of the linearisation, and rejections leave the later batches alone."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import flat, mlp, rand
from torch import nn

import pgdfast
from pgdfast.globalize import Generators, draws

BACKENDS = ("native", "torch", "reference")
SOURCES = {
    "torch": lambda: torch.rand(8, 2, dtype=torch.float64),
    "torch normal": lambda: torch.randn(8, 2, dtype=torch.float64),
    "permutation": lambda: rand(20, 2)[torch.randperm(20)[:8]],
    "numpy": lambda: torch.from_numpy(np.random.uniform(size=(8, 2))),
    "numpy normal": lambda: torch.from_numpy(np.random.randn(8, 2)),
    "python": lambda: torch.tensor([[random.random(), random.gauss(0, 1)] for _ in range(8)], dtype=torch.float64),
}


def seed(number=0):
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def states():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def same(a, b):
    return torch.equal(a[0], b[0]) and a[1] == b[1] and np.array_equal(a[2][1], b[2][1]) and a[2][2:] == b[2][2:]


def resampled(source, jump=0.0):
    """A regression on points that every call draws, its batches, and a loss that trials find larger by a jump."""
    model, seen = mlp(2, 6, 1), []
    start = flat(model.parameters())

    def closure():
        x = SOURCES[source]()
        seen.append(x)
        moved = float(not torch.equal(flat(model.parameters()), start))
        return torch.cat([model(x) - torch.sin(3 * x[:, :1]), torch.full((1, 1), jump * moved, dtype=x.dtype)])

    return list(model.parameters()), closure, seen


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_trials_see_the_batch_of_the_linearisation(backend, source):
    params, closure, seen = resampled(source)
    optimizer = pgdfast.LM(params, damping=0.1, line_search="armijo", backend=backend)
    seed()
    for _ in range(4):
        del seen[:]
        optimizer.step(closure)
        assert len(seen) == 1 + optimizer.report.trials >= 2
        assert all(torch.equal(x, seen[0]) for x in seen)
        last, _ = seen[0], closure()
        assert not torch.equal(seen[-1], last)


@pytest.mark.parametrize("jump", [0.0, 100.0])
@pytest.mark.parametrize("source", SOURCES)
def test_generators_end_where_one_evaluation_leaves_them(source, jump):
    for k in range(3):
        params, closure, _ = resampled(source, jump)
        optimizer = pgdfast.LM(params, damping=0.1)
        seed(k)
        closure()
        expected = states()
        seed(k)
        optimizer.step(closure)
        assert optimizer.report.trials > 1 or not jump
        assert same(states(), expected)


def test_dropout_keeps_its_mask_at_the_trial():
    model = nn.Sequential(mlp(2, 8, 8), nn.Dropout(0.4), mlp(8, 1)).train()
    x, y = rand(12, 2, seed=1), rand(12, 1, seed=2)
    optimizer = pgdfast.LM(model.parameters(), damping=0.1)
    torch.manual_seed(0)
    for _ in range(5):
        before = torch.get_rng_state()
        optimizer.step(lambda: F.mse_loss(model(x), y))
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        assert F.mse_loss(model(x), y).item() == pytest.approx(optimizer.report.loss_after, rel=1e-13)
        assert torch.equal(torch.get_rng_state(), after)


def test_a_trial_that_raises_leaves_the_generators_of_one_evaluation():
    params, inner, seen = resampled("torch")

    def closure():
        residual = inner()
        if len(seen) > 1:
            raise RuntimeError("no")
        return residual

    torch.manual_seed(1)
    torch.rand(8, 2, dtype=torch.float64)
    expected = torch.get_rng_state()
    torch.manual_seed(1)
    with pytest.raises(RuntimeError, match="no"):
        pgdfast.LM(params).step(closure)
    assert torch.equal(torch.get_rng_state(), expected)


def test_states_that_are_dear_to_ask_for_are_asked_once(monkeypatch):
    asked = []
    params, closure, _ = resampled("torch")
    get = random.getstate
    monkeypatch.setattr(draws._Python, "get", staticmethod(lambda: asked.append(1) or get()))
    optimizer = pgdfast.LM(params, damping=0.1)
    for _ in range(3):
        optimizer.step(closure)
    assert len(asked) == 2   # before and after the first linearisation


def test_steps_that_try_nothing_ask_for_nothing(monkeypatch):
    params, closure, _ = resampled("torch")
    monkeypatch.setattr(Generators, "draws", lambda *_: pytest.fail("a constant step has no trial"))
    pgdfast.LM(params, damping_rule="constant").step(closure)


def test_closures_without_code_are_asked_every_time():
    source = np.random.mtrand.RandomState.random_sample
    made = Generators().draws(source, torch.device("cpu"))
    before = np.random.get_state()
    made.linearised()
    np.random.rand(3)
    made.rewind()
    assert np.array_equal(np.random.get_state()[1], before[1])
