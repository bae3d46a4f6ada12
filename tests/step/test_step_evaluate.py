"""Trial points are evaluated without a tape where that gives the same bits, and as before elsewhere."""

import gc
import math
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, fit, flat, gradient, mlp, rand, snapshot, unchanged
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import pgdfast
from pgdfast.linear import half_square
from pgdfast.step import Evaluator, MovedGenerators, RandomReplay, host, out_of_memory

X, Y = rand(12, 3, seed=1), rand(12, 2, seed=2)
STACK = rand(4, 5, 3, seed=3)


def pinn(f, x, y, stack):
    points = rand(9, 3, seed=4, dtype=x.dtype).requires_grad_()
    slopes = gradient(f(points)[:, :1], points)
    return sum(gradient(slopes[:, d], points)[:, d] for d in range(3)), 10 * f(x)


def dropout(f, x, y, stack):
    generator = torch.Generator().manual_seed(5)
    return F.mse_loss(f(x * torch.bernoulli(torch.full_like(x, 0.8), generator=generator)), y)


def deep():
    return mlp(3, 16, 16, 2)


def encoder(training):
    def make():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(3, 1, 8, dropout=0.0, batch_first=True).double().train(training)
        return nn.Sequential(layer, nn.Linear(3, 2).double())

    return make


CASES = {   # model, closure of it, does it run without a tape?
    "mean squared error": (deep, lambda f, x, y, stack: F.mse_loss(f(x), y), True),
    "residuals": (deep, lambda f, x, y, stack: f(x) - y, True),
    "cross-entropy": (deep, lambda f, x, y, stack: F.cross_entropy(f(x), y.argmax(1)), True),
    "penalty": (deep, lambda f, x, y, stack: f(x).square().mean() + 0.1 * f[0].weight.square().sum(), True),
    "stack of inputs": (deep, lambda f, x, y, stack: f(stack), True),
    "dropout with its own generator": (deep, dropout, True),
    "dropout": (lambda: nn.Sequential(deep(), nn.Dropout(0.3), mlp(2, 4, 2)), lambda f, x, y, stack: f(x), True),
    "derivatives": (deep, pinn, True),
    "transformer": (encoder(True), lambda f, x, y, stack: f(stack), False),
    "transformer in evaluation": (encoder(False), lambda f, x, y, stack: f(stack), False),
    "product that folds": (deep, lambda f, x, y, stack: (stack.mT @ f[0].weight.T[:1].expand(5, 16)).tanh(), False),
}


class Seen:
    """A closure that notes, at each run, whether the operation it begins with met a tensor that requires a gradient."""

    def __init__(self, params, compute):
        self._params, self._compute, self.taped = params, compute, []

    def __call__(self):
        self.taped.append((1.0 * self._params[0]).requires_grad)
        return self._compute()


def evaluated(closure, params, tapeless, evaluator=None):
    """The loss at the present parameters, as a trial finds it."""
    evaluator = evaluator or Evaluator()
    replay = RandomReplay(MovedGenerators(), closure, params[0].device)
    replay.linearized()
    result = evaluator.run(closure, params, tapeless, replay)
    return float(result.detach() if isinstance(result, torch.Tensor) and result.dim() == 0 else half_square(result))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_loss_is_bit_identical(name, dtype):
    make, compute, tapeless = CASES[name]
    model, x, y = make().to(dtype), X.to(dtype), Y.to(dtype)
    params = list(model.parameters())
    closure = Seen(params, lambda: compute(model, x, y, STACK.to(dtype)))
    lin = pgdfast.linearize(closure, params)
    assert lin.tapeless == tapeless
    losses = []
    for allowed in (False, True):
        torch.manual_seed(7)
        losses.append(evaluated(closure, params, allowed and lin.tapeless))
    assert losses[0] == losses[1]
    assert closure.taped == [True, True, not tapeless]


def test_steps_are_those_with_a_tape(monkeypatch):
    """Whatever the tape's size decides; parameters require gradients throughout."""
    ends, taped = [], []
    for limit in (math.inf, 0):
        monkeypatch.setattr(host, "LARGE_TAPE", limit)
        params, inner = fit()
        closure = Seen(params, inner)
        opt = pgdfast.LM(params, line_search="armijo")
        ends.append([*(opt.step(closure) for _ in range(6)), flat(params)])
        taped.append(closure.taped)
        assert opt.report.trials
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert all(taped[0]) and taped[1][:2] == [True, False]


def test_another_thread_sees_that_parameters_require_gradients(monkeypatch):
    """While a trial runs, also without a tape."""
    monkeypatch.setattr(host, "LARGE_TAPE", 0)
    params, inner = fit()
    inside, checked, seen, taped = threading.Event(), threading.Event(), [], []

    def closure():
        taped.append((1.0 * params[0]).requires_grad)
        if len(taped) == 2:
            inside.set()
            assert checked.wait(20)
        return inner()

    def watch():
        assert inside.wait(20)
        seen.extend(p.requires_grad for p in params)
        seen.append((1.0 * params[0]).requires_grad)   # operations of this thread meet the parameters themselves
        checked.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    pgdfast.LM(params).step(closure)
    watcher.join()
    assert taped[:2] == [True, False] and seen == [True] * (len(params) + 1)


def test_closure_that_needs_the_parameters_gradient_runs_again_and_from_then_on_with_it():
    model, evaluator = mlp(3, 5, 2), Evaluator()
    params, taped = list(model.parameters()), []

    def closure():
        taped.append((1.0 * params[0]).requires_grad)
        noise = torch.rand(12, 1, dtype=torch.float64)
        loss = F.mse_loss(model(X + 0.1 * noise), Y)
        torch.autograd.grad(loss, params, retain_graph=True)
        return loss

    torch.manual_seed(3)
    expected = evaluated(closure, params, False)
    del taped[:]
    for again in range(2):
        torch.manual_seed(3)
        assert evaluated(closure, params, True, evaluator) == expected
        assert taped == [False, True] + [True] * again
    assert evaluated(closure, params, True) == expected and taped[-2:] == [False, True]   # another optimizer has not met it


def test_other_errors_of_a_closure_are_not_run_again():
    params, inner = fit()
    calls = []

    def closure():
        calls.append(1)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        evaluated(closure, params, True)
    assert calls == [1]


def test_memory_of_closures_is_weak():
    def make():
        params = [rand(3).requires_grad_()]
        scope = {"torch": torch, "p": params[0]}
        exec("def closure():\n    return torch.autograd.grad(p.sum(), p)[0] + p", scope)
        return scope.pop("closure"), params

    evaluator = Evaluator()
    closure, params = make()
    evaluated(closure, params, True, evaluator)
    assert len(evaluator._needs_tape) == 1
    del closure
    gc.collect()
    assert len(evaluator._needs_tape) == 0


# --- many points at once --------------------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory: no")], ids=repr)
def test_a_batched_trial_that_lacks_memory_is_tried_again_at_the_next_step(error):
    params, inner = fit()
    fails, runs = [True], []

    def closure():
        runs.append(batched := torch._C._functorch.is_batchedtensor(1.0 * params[0]))
        if batched and fails[0]:
            raise error
        return inner()

    optimizer = pgdfast.LM(params, damping=1e-2, damping_rule="sweep")
    optimizer.step(closure)
    assert runs == [False, True] + [False] * 5 and optimizer.report.status == "accepted"
    del runs[:]
    fails[0] = False
    optimizer.step(closure)
    assert runs == [False, True, False]


def test_a_closure_that_vmap_refuses_is_remembered_by_its_optimizer_alone():
    params, inner = fit()
    runs = []

    def closure():
        runs.append(torch._C._functorch.is_batchedtensor(1.0 * params[0]))
        return inner() * (1.0 if params[0].sum().item() > 1e9 else 0.5)

    for _ in range(2):
        optimizer = pgdfast.LM(params, damping_rule="sweep")
        for known in (False, True):
            del runs[:]
            optimizer.step(closure)
            assert runs[:2] == [False, not known]


OPTIONS = {
    "default": {}, "constant": {"damping_rule": "constant"}, "sweep": {"damping_rule": "sweep"},
    "chord": {"acceleration": "chord"}, "armijo": {"line_search": "armijo"}, "cg": {"solver": "cg"},
    "eigh": {"solver": "eigh"}, "primal": {"solver": "primal"}, "momentum": {"momentum": 0.5},
    "marquardt": {"scaling": "marquardt"},
}

# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "sweep", "chord", "armijo"])
@pytest.mark.parametrize("error", [MemoryError, RuntimeError, torch.OutOfMemoryError])
def test_memory_that_runs_out_at_a_trial(error, name):
    params, inner = fit()
    before, runs = snapshot(params), []

    def closure():
        runs.append(1)
        if len(runs) > 1:
            raise error("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return inner()

    optimizer = pgdfast.LM(params, **OPTIONS[name])
    expected = (torch.OutOfMemoryError, "allocate") if error is torch.OutOfMemoryError else (MemoryError, "allocate 8 bytes")
    with pytest.raises(expected[0], match=expected[1]):
        optimizer.step(closure)
    assert unchanged(params, before) and all(p.requires_grad for p in params) and optimizer.report.status == "none"
    optimizer.step(inner)
    assert optimizer.report.status == "accepted"


class Token:
    """Anything that can be referred to weakly."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_the_tape_ends_with_its_step(name, backend):
    """Reference counts alone must free it: it is large, and the collector counts objects, not bytes."""
    model, activations, nodes = mlp(3, 16, 2), [], []

    def closure():
        hidden = torch.tanh(model[0](X))
        activations.append(StorageWeakRef(hidden.untyped_storage()))
        if hidden.grad_fn is not None:   # it is None where many points run at once
            token = Token()
            hidden.grad_fn.metadata["token"] = token   # lives as long as the node
            nodes.append(weakref.ref(token))
        return model[2](hidden) - Y

    optimizer = pgdfast.LM(model.parameters(), backend=backend, **OPTIONS[name])
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            optimizer.step(closure)
            assert nodes and not any(ref() for ref in nodes)
            assert all(ref.expired() for ref in activations)
    finally:
        gc.enable()


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


def test_pytorchs_allocator_is_recognized():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55, dtype=torch.uint8)
    assert out_of_memory(caught.value) and out_of_memory(MemoryError()) and not out_of_memory(RuntimeError("other"))
