"""Trials draw the random numbers of the linearization, and rejections leave the later batches alone."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import DRAWS, EVERYWHERE, generator_states, mlp, rand, resampled, seed_all
from torch import nn

import pgdfast
from pgdfast.step import MovedGenerators, RandomReplay, rng_replay


@pytest.mark.parametrize("source", DRAWS)
@pytest.mark.parametrize("backend", EVERYWHERE)
def test_trials_see_the_batch_of_the_linearization(backend, source):
    params, closure, seen = resampled(source)
    optimizer = pgdfast.LM(params, damping=0.1, line_search="armijo", backend=backend)
    seed_all()
    for _ in range(4):
        del seen[:]
        optimizer.step(closure)
        assert len(seen) == 1 + optimizer.report.trials >= 2
        assert all(torch.equal(x, seen[0]) for x in seen)
        last, _ = seen[0], closure()
        assert not torch.equal(seen[-1], last)


@pytest.mark.parametrize("jump", [0.0, 100.0])
@pytest.mark.parametrize("source", DRAWS)
def test_generators_end_where_one_evaluation_leaves_them(source, jump):
    for k in range(3):
        params, closure, _ = resampled(source, jump)
        optimizer = pgdfast.LM(params, damping=0.1)
        seed_all(k)
        closure()
        expected = generator_states()
        seed_all(k)
        optimizer.step(closure)
        assert optimizer.report.trials > 1 or not jump
        assert generator_states() == expected


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
    monkeypatch.setattr(rng_replay._Python, "get", staticmethod(lambda: asked.append(1) or get()))
    optimizer = pgdfast.LM(params, damping=0.1)
    for _ in range(3):
        optimizer.step(closure)
    assert len(asked) == 2   # before and after the first linearization


def test_steps_that_try_nothing_ask_for_nothing(monkeypatch):
    params, closure, _ = resampled("torch")
    monkeypatch.setattr(RandomReplay, "__init__", lambda *_: pytest.fail("a constant step has no trial"))
    pgdfast.LM(params, damping_rule="constant").step(closure)


FROM = {
    "torch": lambda: int(torch.randint(1000, ())), "numpy": lambda: int(np.random.randint(1000)),
    "python": lambda: random.randrange(1000),
}


class Batches:
    """A closure by `__call__`, whose code all instances share; with a source, one that draws."""

    def __init__(self, model, source):
        self.model, self.source, self.seen = model, source, []

    def __call__(self):
        x = rand(8, 2, seed=0 if self.source is None else FROM[self.source]())
        self.seen.append(x)
        return self.model(x) - torch.sin(3 * x[:, :1])


def function(model, source):
    """A closure out of a factory, whose code is that of every other; its cells are not."""
    made = Batches(model, source)

    def closure():
        return made()

    closure.seen = made.seen
    return closure


@pytest.mark.parametrize("make", [Batches, function], ids=["instance", "function"])
@pytest.mark.parametrize("source", FROM)
@pytest.mark.parametrize("options", [{}, {"damping_rule": "sweep"}, {"acceleration": "chord"}], ids=str)
def test_code_that_is_shared_tells_nothing_of_what_another_closure_draws(options, source, make):
    """The first draws nothing, so nothing is learnt of numpy; the second, of equal code, draws, and its trials see it again."""
    model = mlp(2, 6, 1)
    still, drawing = make(model, None), make(model, source)
    optimizer = pgdfast.LM(model.parameters(), damping=0.1, **options)
    optimizer.step(still)
    for k in range(3):
        seed_all(k)
        drawing()
        after, drawn = generator_states(), drawing.seen.pop()
        seed_all(k)
        optimizer.step(drawing)
        assert len(drawing.seen) == 1 + optimizer.report.trials >= 2 and all(torch.equal(x, drawn) for x in drawing.seen)
        assert generator_states() == after
        del drawing.seen[:]
        optimizer.step(still)


def test_closures_without_code_are_asked_every_time():
    source = np.random.mtrand.RandomState.random_sample
    made = RandomReplay(MovedGenerators(), source, torch.device("cpu"))
    before = np.random.get_state()
    made.linearized()
    np.random.rand(3)
    made.rewind()
    assert np.array_equal(np.random.get_state()[1], before[1])
