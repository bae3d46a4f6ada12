"""Trial points are evaluated without a tape where that gives the same bits, and as before elsewhere."""

import gc

import pytest
import torch
import torch.nn.functional as F
from helpers import fit, flat, gradient, mlp, rand, snapshot, unchanged
from torch import nn

import pgdfast
from pgdfast.globalize import trial, trial_loss

X, Y = rand(12, 3, seed=1), rand(12, 2, seed=2)
STACK = rand(4, 5, 3, seed=3)


def pinn(model):
    x = rand(9, 3, seed=4).requires_grad_()
    slopes = gradient(model(x)[:, :1], x)
    return sum(gradient(slopes[:, d], x)[:, d] for d in range(3)), 10 * model(X)


def dropout(model):
    generator = torch.Generator().manual_seed(5)
    return F.mse_loss(model(X * torch.bernoulli(torch.full_like(X, 0.8), generator=generator)), Y)


def deep():
    return mlp(3, 16, 16, 2)


def encoder(training):
    def make():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(3, 1, 8, dropout=0.0, batch_first=True).double().train(training)
        return nn.Sequential(layer, nn.Linear(3, 2).double())

    return make


CASES = {   # model, closure of it, does it run without a tape?
    "mean squared error": (deep, lambda f: F.mse_loss(f(X), Y), True),
    "residuals": (deep, lambda f: f(X) - Y, True),
    "cross-entropy": (deep, lambda f: F.cross_entropy(f(X), Y.argmax(1)), True),
    "penalty": (deep, lambda f: f(X).square().mean() + 0.1 * f[0].weight.square().sum(), True),
    "stack of inputs": (deep, lambda f: f(STACK), True),
    "dropout with its own generator": (deep, dropout, True),
    "dropout": (lambda: nn.Sequential(deep(), nn.Dropout(0.3), mlp(2, 4, 2)), lambda f: f(X), True),
    "derivatives": (deep, pinn, True),
    "transformer": (encoder(True), lambda f: f(STACK), False),
    "transformer in evaluation": (encoder(False), lambda f: f(STACK), False),
    "product that folds": (deep, lambda f: (STACK.mT @ f[0].weight.T[:1].expand(5, 16)).tanh(), False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_loss_is_bit_identical(name, dtype):
    make, compute, tapeless = CASES[name]
    model = make()
    params, needed = list(model.parameters()), []

    def closure():
        needed.append(params[0].requires_grad)
        return compute(model)

    lin = pgdfast.linearize(closure, params)
    assert lin.tapeless == tapeless
    losses = []
    for allowed in (False, True):
        torch.manual_seed(7)
        losses.append(trial_loss(closure, params, allowed and lin.tapeless))
    assert losses[0] == losses[1]
    assert needed == [True, True, not tapeless] and all(p.requires_grad for p in params)


def test_steps_are_those_with_a_tape(monkeypatch):
    ends = []
    for forced in (False, True):
        if forced:
            monkeypatch.setattr(
                trial, "trial_loss", lambda closure, params, _, draws: trial_loss(closure, params, False, draws)
            )
        params, closure = fit()
        opt = pgdfast.LM(params, line_search="armijo")
        ends.append([*(opt.step(closure) for _ in range(6)), flat(params)])
        assert opt.report.trials
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_closure_that_needs_the_parameters_gradient_runs_again_and_from_then_on_with_it():
    model = mlp(3, 5, 2)
    params, needed = list(model.parameters()), []

    def closure():
        needed.append(params[0].requires_grad)
        noise = torch.rand(12, 1, dtype=torch.float64)
        loss = F.mse_loss(model(X + 0.1 * noise), Y)
        torch.autograd.grad(loss, params, retain_graph=True)
        return loss

    torch.manual_seed(3)
    expected = [trial_loss(closure, params, False) for _ in range(2)]
    del needed[:]
    torch.manual_seed(3)
    assert [trial_loss(closure, params, True) for _ in range(2)] == expected
    assert needed == [False, True, True]


def test_memory_of_closures_is_weak():
    def make():
        params = [rand(3).requires_grad_()]
        scope = {"torch": torch, "p": params[0]}
        exec("def closure():\n    return torch.autograd.grad(p.sum(), p)[0] + p", scope)
        return scope.pop("closure"), params

    closure, params = make()
    trial_loss(closure, params, True)
    count = len(trial._need_tape)
    del closure
    gc.collect()
    assert len(trial._need_tape) == count - 1


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt])
def test_what_a_trial_raises_reaches_the_caller(error):
    params, inner = fit()
    calls = []

    def closure():
        calls.append(1)
        if len(calls) > 1:
            raise error("no")
        return inner()

    before = snapshot(params)
    with pytest.raises(error, match="no"):
        pgdfast.LM(params).step(closure)
    assert unchanged(params, before) and all(p.requires_grad for p in params)
    assert len(calls) == 2


def test_frozen_parameters_stay_frozen():
    params, closure = fit()
    params[0].requires_grad_(False)
    pgdfast.LM(params).step(closure)
    assert [p.requires_grad for p in params] == [False, True, True, True]
