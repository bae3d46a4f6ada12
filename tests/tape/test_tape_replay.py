"""Tapes of known structure read by the core, against the same tapes read by the rules."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import ACTIVATIONS, mlp, parameters, perturb, rand, relative
from losses import LOSSES
from losses import X as DATA
from tape.test_tape_losses import FORMS
from tape.test_tape_losses import X as INPUTS
from tape.test_tape_nested import poisson
from tape.test_tape_rules import CASES, problem
from tape.test_tape_transformers import MODULES, seeded

from pgdfast import LM, linearize, reference
from pgdfast.linear import Linearizer


class Pair:
    """Two readers of the same tapes; `looked` counts how often the one with replays had to look at a tape itself."""

    def __init__(self, params):
        self.replaying, self.plain = Linearizer(params), Linearizer(params)
        self.plain.tracer.replays = False
        tracer = self.replaying.tracer
        self.looked, look = 0, tracer._trace

        def counted(*arguments):
            self.looked += 1
            return look(*arguments)

        tracer._trace = counted

    def read(self, closure):
        """Read one tape with both, which must agree bit for bit; the linearization by replay."""
        result = closure()
        one, other = self.replaying.read(result), self.plain.read(result)
        assert torch.equal(one.loss, other.loss) and one.loss.dtype == other.loss.dtype and not one.loss.requires_grad
        assert torch.equal(one.residual, other.residual) and one.residual.dtype == other.residual.dtype
        assert one.penalties == other.penalties and one.has_squares_only == other.has_squares_only
        for a, b in zip(one._constants, other._constants, strict=True):
            if isinstance(b, torch.Tensor):
                assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype
            else:
                assert a == b and type(a) is type(b) is float
        return one


def check(closure, params, visits=5):
    """From the third visit on the core reads, and reads the same, unless a result has no tape."""
    pair, results = Pair(params), closure()
    taped = all(t.requires_grad for t in (results if isinstance(results, (tuple, list)) else (results,)))
    for visit in range(visits):
        pair.read(closure)
        perturb(params, seed=visit)
    assert pair.looked == (2 if taped else visits)


@pytest.mark.parametrize("name", CASES)
def test_rules(name):
    check(*problem(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_losses(form, dtype):
    model = mlp(3, 5, 4).to(dtype)
    check(lambda: FORMS[form](model(INPUTS.to(dtype)).double()), list(model.parameters()))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_python_reads(name):
    model = mlp(3, 5, 4)
    check(lambda: LOSSES[name](model(DATA)), list(model.parameters()))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nested_derivatives(name):
    params = parameters((6, 2), (6,), (1, 6))
    check(lambda: poisson(ACTIVATIONS[name], *params, 2), params)


@pytest.mark.parametrize("name", MODULES)
def test_transformers(name):
    make, run = MODULES[name]
    module = seeded(make)
    check(lambda: run(module), list(module.parameters()))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_replay_agrees_with_the_reference(backend):
    model = mlp(3, 6, 4)
    params, linearizer = list(model.parameters()), Linearizer(model.parameters(), backend)
    for visit in range(4):
        closure = lambda: F.mse_loss(model(INPUTS), rand(6, 4, seed=visit))  # noqa: B023, E731
        lin, ref = linearizer(closure), reference.linearize(closure, params)
        assert relative(lin.dense(), ref.dense()) < 1e-12 and relative(lin.residual, ref.residual) < 1e-12
        perturb(params, seed=visit)


def test_numbers_that_change_are_noticed():
    """Numbers in rules and losses, and the one-element tensors that some are saved as: 2, 3, 2, 3 ... of one structure."""
    a, b = parameters((3, 4), (4,))
    for closure, looked in (
        (lambda k: torch.tanh(a * k) + b, 2),   # a constant like any other
        (lambda k: torch.add(a, b, alpha=k), 4),
        (lambda k: k * (torch.tanh(a).square().mean() + 0.1 * b.square().sum()), 4),
        (lambda k: (a - b).square().sum() / torch.tensor(float(k)), 4),
    ):
        pair = Pair([a, b])
        found = [pair.read(lambda k=k: closure(k)) for k in (2, 3, 2, 3, 2, 3)]  # noqa: B023
        assert relative(found[-1].gradient(), found[-2].gradient()) > 0.1
        assert pair.looked == looked   # each number twice
        other = pair.read(lambda: closure(4))  # noqa: B023
        assert relative(other.gradient(), found[-1].gradient()) > 0.1


def test_tensors_that_change_are_read_anew():
    """Data, weights and targets; with other strides or another dtype they are another structure."""
    model = mlp(3, 5, 4)
    pair = Pair(list(model.parameters()))
    for seed in range(4):
        x, y = rand(6, 3, seed=seed), rand(6, 4, seed=seed + 9)
        pair.read(lambda: F.mse_loss(model(x), y))  # noqa: B023
    assert pair.looked == 2
    x = rand(3, 6).T
    for count in (3, 4, 4):
        pair.read(lambda: F.mse_loss(model(x), y))
        assert pair.looked == count
    pair.read(lambda: F.mse_loss(model(x), y.float().double()))
    pair.read(lambda: F.mse_loss(model(x), y[:, :1].expand(6, 4)))
    assert pair.looked == 5


def test_constants_that_share_memory_are_told_apart():
    """Two saved tensors are one at first and differ later."""
    (a,) = parameters((3, 4))
    pair, other = Pair([a]), rand(3, 4, seed=5)
    for k in range(5):
        lin = pair.read(lambda: torch.tanh(a) * (a.detach() if k < 3 else other))  # noqa: B023
    assert pair.looked == 2
    assert relative(lin.dense(), reference.linearize(lambda: torch.tanh(a) * other, [a]).dense()) < 1e-12


def test_closures_batches_and_frozen_parameters_may_alternate():
    model = mlp(3, 5, 4)
    params = list(model.parameters())
    pair = Pair(params)
    for k in range(12):
        x, y = rand(6 + k % 2, 3, seed=k), rand(6 + k % 2, 4, seed=k + 50)
        pair.read((lambda: F.mse_loss(model(x), y)) if k % 3 else (lambda: torch.tanh(model(x))))  # noqa: B023
        perturb(params, seed=k)
    assert pair.looked == 8
    for k in range(6):
        params[0].requires_grad_(k % 2 == 0)
        lin = pair.read(lambda: F.mse_loss(model(x), y))
        assert (lin.gradient()[:15].norm() > 0) == (k % 2 == 0)
    assert pair.looked == 10


def test_linearizations_of_one_structure_take_turns():
    model = mlp(3, 5, 4)
    linearizer = Linearizer(model.parameters())
    found = [linearizer(lambda k=k: F.mse_loss(model(rand(6, 3, seed=k)), rand(6, 4, seed=k))) for k in range(5)]
    for lin, k in zip(found * 2, [*range(5)] * 2, strict=True):
        ref = reference.linearize(lambda k=k: F.mse_loss(model(rand(6, 3, seed=k)), rand(6, 4, seed=k)), model.parameters())
        assert relative(lin.dense(), ref.dense()) < 1e-12


def test_constants_outlive_their_tape():
    model = mlp(3, 5, 4)
    linearizer = Linearizer(model.parameters())
    for seed in range(3):
        x = rand(6, 3, seed=seed)
        result = model(x)
        lin = linearizer.read(result)
    node, dense = weakref.ref(result), lin.dense()
    del result
    gc.collect()
    assert node() is None   # nothing else keeps the tape
    scratch = [torch.full((6, 5), float("nan"), dtype=torch.float64) for _ in range(50)]
    other = linearizer(lambda: model(x))
    assert torch.equal(lin.dense(), dense) and torch.equal(other.dense(), dense) and scratch


def test_errors_of_a_known_structure_stay():
    model = mlp(3, 5, 4)
    linearizer = Linearizer(model.parameters())

    def closure():
        hidden = torch.tanh(model[0](INPUTS))
        loss = model[2](hidden).square().mean()
        if spoil == "memory":
            with torch.no_grad():
                hidden.mul_(2)
        if spoil == "tape":
            loss.backward()
        return loss

    spoil = ""
    for _ in range(4):
        linearizer(closure)
    for spoil, message in (("memory", "modified by an inplace operation"), ("tape", "called backward")):  # noqa: B007
        with pytest.raises((RuntimeError, ValueError), match=message):
            linearizer(closure)
    spoil = ""
    linearizer(closure)
    with pytest.raises(ValueError, match="a scalar in it"):
        linearizer(lambda: (closure(),))
    with pytest.raises(ValueError, match="negative weight"):
        linearizer(lambda: -closure())


def test_hooks_on_saved_tensors_are_asked():
    model = mlp(3, 5, 4)
    pair, asked = Pair(list(model.parameters())), []

    def unpack(packed):
        asked.append(1)
        return packed.clone()

    for _ in range(4):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), unpack):
            result = F.mse_loss(model(INPUTS), rand(6, 4))
        before = len(asked)
        lin = pair.read(lambda: result)  # noqa: B023
        assert len(asked) > before
    closure = lambda: F.mse_loss(model(INPUTS), rand(6, 4))  # noqa: E731
    assert relative(lin.dense(), linearize(closure, model.parameters()).dense()) < 1e-14
    assert pair.looked == 2


@pytest.mark.parametrize("rule", ["constant", "gain-ratio"])
def test_steps_are_bit_identical_with_and_without(rule):
    ends = []
    for replays in (True, False):
        model, y = mlp(3, 8, 8, 4), torch.sin(INPUTS @ rand(3, 4))
        closure = lambda model=model, y=y: F.mse_loss(model(INPUTS), y)  # noqa: E731
        opt = LM(model.parameters(), damping_rule=rule)
        losses = [opt.step(closure)]
        opt._tools.backend._linearizer.tracer.replays = replays
        losses += [opt.step(closure) for _ in range(7)]
        ends.append([*losses, *(p.detach() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
