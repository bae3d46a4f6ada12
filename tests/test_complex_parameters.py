"""LM over complex parameters: the steps are those of the same model whose parameters are the real and imaginary parts."""

import copy
import pickle

import pytest
import torch
from helpers import EVERYWHERE, rand, relative, snapshot, through_a_file, unchanged

import pgdfast
from pgdfast.tape import real_views

STEPS = 4


def number(*shape, seed):
    return torch.complex(rand(*shape, seed=seed), rand(*shape, seed=seed + 1)).mul(0.5)


class Model:
    """Real and complex parameters in turn, or, as pairs, their numbers alone; other data at every step."""

    def __init__(self, pairs=False, dtype=torch.float64, stack=()):
        values = [rand(*stack, 4, seed=1), number(*stack, 4, 3, seed=2), rand(*stack, 3, seed=4), number(*stack, 4, seed=5)]
        values = [t.to(dtype.to_complex() if t.is_complex() else dtype) for t in values]
        self.complex = [t.is_complex() for t in values]
        self.pairs, self.dtype, self.step = pairs, dtype, 0
        self.params = [torch.view_as_real(t).clone() if pairs and t.is_complex() else t for t in values]
        for p in self.params:
            p.requires_grad_()

    def __call__(self):
        """Residuals (*stack, 8)."""
        a, w, b, v = [
            torch.view_as_complex(p) if self.pairs and c else p for p, c in zip(self.params, self.complex, strict=True)
        ]
        x, y = rand(8, 3, seed=100 + self.step).to(self.dtype), rand(8, seed=200 + self.step).to(self.dtype)
        h = torch.tanh(x.to(w.dtype) @ w.mT) * a[..., None, :]
        return (h @ v[..., None])[..., 0].real + (x @ b[..., None])[..., 0] * v.abs().sum(-1, keepdim=True) - y

    def loss(self):
        """A mean of squares with penalties."""
        a, w, _, v = self.params
        squares = w.square().sum() if self.pairs else w.abs().square().sum()
        moduli = (v.square().sum(-1) if self.pairs else v.abs() ** 2) * a.detach().abs()
        return self().square().mean() + 0.01 * squares + 0.1 * moduli.sum()

    def numbers(self):
        return torch.cat([p.detach().reshape(-1) for p in real_views(self.params)])


def train(model, optimizer, closure, steps=STEPS):
    losses = []
    for _ in range(steps):
        losses.append(float(optimizer.step(closure).sum()))
        model.step += 1
    return losses


OPTIONS = {
    "constant": dict(damping_rule="constant", damping=0.1),
    "gain-ratio": dict(damping_rule="gain-ratio"),
    "large steps": dict(lr=4.0, damping=0.1),   # and rejections
    "sweep": dict(damping_rule="sweep"),
    "geodesic": dict(acceleration="geodesic"),
    "chord": dict(acceleration="chord", damping_rule="delayed"),
    "armijo": dict(line_search="armijo", damping_rule="constant"),
    "marquardt": dict(scaling="marquardt", weight_decay=0.01, lr=0.5),
    "momentum": dict(momentum=0.9, norm_constraint=0.5, damping=0.1),
    "groups": dict(groups=(0.7, 0.2), weight_decay=0.1),
    "cg": dict(solver="cg", cg=pgdfast.CG(max_iterations=500, tolerance=1e-14)),
    "dual": dict(solver="dual"),
    "primal": dict(solver="primal"),
    "eigh": dict(solver="eigh", damping=0.1),
}


def optimizer_of(model, groups=None, **options):
    """The automatic rule decides by the operations of each backend: gain-ratio unless another is given."""
    params, options = model.params, {"damping_rule": "gain-ratio"} | options
    if groups is not None:
        params = [{"params": model.params[:2], "lr": groups[0]}, {"params": model.params[2:], "lr": groups[1]}]
    return pgdfast.LM(params, **options)


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("form", ["residuals", "loss"])
@pytest.mark.parametrize("name", OPTIONS)
def test_steps_are_those_of_pairs_of_reals(name, form, backend):
    runs = []
    for pairs, kind in ((False, backend), (True, backend), (True, "native")):
        model = Model(pairs)
        optimizer = optimizer_of(model, **OPTIONS[name] | {"backend": kind})
        losses = train(model, optimizer, model.loss if form == "loss" else model)
        runs.append((model.numbers(), torch.tensor(losses), optimizer.report.status, optimizer.report.parameters))
    for other in runs[1:]:
        assert relative(runs[0][0], other[0]) < 1e-10 and relative(runs[0][1], other[1]) < 1e-10
        assert runs[0][2:] == other[2:]
    assert runs[0][3] == 4 + 24 + 3 + 8


def test_float32():
    losses = []
    for pairs in (False, True):
        model = Model(pairs, torch.float32)
        losses.append(train(model, pgdfast.LM(model.params), model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("options", [
    dict(scaling="marquardt", line_search="armijo"), dict(momentum=0.9, damping=0.1),
    dict(solver="cg", cg=pgdfast.CG(warm_start=True)),
], ids=["marquardt", "momentum", "warm start"])
def test_resuming_is_bit_for_bit(options, backend):
    """Also with a complex parameter before all others, beside which the optimizer keeps its memory."""
    straight, broken, resumed = Model(), Model(), Model()
    for model in (straight, broken, resumed):
        model.order = model.params[1:] + model.params[:1]
    optimizer = pgdfast.LM(straight.order, backend=backend, **options)
    train(straight, optimizer, straight, 7)
    first = pgdfast.LM(broken.order, backend=backend, **options)
    train(broken, first, broken, 4)
    values, state = through_a_file((broken.params, first.state_dict()))
    with torch.no_grad():
        for p, value in zip(resumed.params, values, strict=True):
            p.copy_(value)
    second = pgdfast.LM(resumed.order, backend=backend, **options)
    second.load_state_dict(state)
    resumed.step = broken.step
    train(resumed, second, resumed, 3)
    assert unchanged(resumed.params, straight.params) and second.report.next_damping == optimizer.report.next_damping


def test_copies_go_on_alone():
    model = Model()
    optimizer = pgdfast.LM(model.params)
    train(model, optimizer, model)
    before = snapshot(model.params)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        other = Model()
        other.params, other.step = twin.param_groups[0]["params"], model.step
        train(other, twin, other)
        assert unchanged(model.params, before) and not unchanged(other.params, before)
    train(model, optimizer, model)
    assert unchanged(model.params, snapshot(other.params))


def test_an_exception_leaves_everything_as_it_was():
    model, calls = Model(), []

    def closure():
        calls.append(None)
        if len(calls) == 4:
            raise ArithmeticError
        return model()

    optimizer = pgdfast.LM(model.params)
    optimizer.step(closure)
    before = snapshot(model.params)
    with pytest.raises(ArithmeticError):
        optimizer.step(closure)
    assert unchanged(model.params, before)


def test_memory_that_moves():
    """`p.data = ...` between steps, as some utilities of PyTorch's write parameters."""
    model, other = Model(), Model()
    ours, theirs = pgdfast.LM(model.params), pgdfast.LM(other.params)
    for _ in range(3):
        train(model, ours, model, 1)
        train(other, theirs, other, 1)
        for p in model.params:
            p.data = p.data.clone()
    assert unchanged(model.params, snapshot(other.params))


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("options", [{}, dict(scaling="marquardt"), dict(momentum=0.5), dict(acceleration="geodesic")])
def test_ensembles(options, backend):
    """B members at once, and their twins of reals alone, one after another."""
    B = 3
    together = Model(stack=(B,))
    closure = lambda: together().square().sum(-1)  # noqa: E731
    if "acceleration" in options:
        closure = together
    train(together, pgdfast.LM(together.params, ensemble=B, damping=0.1, backend=backend, **options), closure)
    for b in range(B):
        alone = Model(True)
        start = Model(True, stack=(B,))
        for p, q in zip(alone.params, start.params, strict=True):
            p.data.copy_(q.data[b])
        single = lambda: alone().square().sum()  # noqa: B023, E731
        train(alone, pgdfast.LM(alone.params, damping=0.1, **options), alone if "acceleration" in options else single)
        for p, q in zip(real_views(together.params), alone.params, strict=True):
            assert relative(p[b], q) < 1e-9


@pytest.mark.filterwarnings("ignore:pgdfast")
def test_an_ensemble_without_tape_rules():
    steps = []
    for pairs in (False, True):
        model = Model(pairs, stack=(3,))
        train(model, pgdfast.LM(model.params, ensemble=3), lambda: model().cumsum(1))  # noqa: B023
        steps.append(model.numbers())
    assert relative(*steps) < 1e-10


def test_a_functional_ensemble():
    class Layer(torch.nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.weight = torch.nn.Parameter(number(3, seed=seed))

        def forward(self, x):
            return torch.tanh(x.to(self.weight.dtype) @ self.weight).real

    x, y = rand(6, 3, seed=1), rand(6, seed=2)
    networks = pgdfast.functional_ensemble([Layer(10), Layer(20)])
    alone = [Layer(10), Layer(20)]
    optimizer = pgdfast.LM(networks.parameters(), ensemble=2)
    others = [pgdfast.LM(layer.parameters()) for layer in alone]
    for _ in range(STEPS):
        optimizer.step(lambda: ((networks(x) - y) ** 2).mean(1))
        for layer, other in zip(alone, others, strict=True):
            other.step(lambda: ((layer(x) - y) ** 2).mean())  # noqa: B023
    for b, layer in enumerate(alone):
        assert torch.allclose(networks.member(b).weight, layer.weight, rtol=1e-9)


@pytest.mark.parametrize("options", [{}, dict(damping_rule="constant", weight_decay=0.01, lr=0.5), dict(groups=(0.7, 0.2))])
def test_captured_steps(options):
    ordinary, captured = Model(), Model()
    lm = optimizer_of(ordinary, **options)
    step = pgdfast.CapturedStep(optimizer_of(captured, **options), captured)
    for _ in range(STEPS):
        lm.step(ordinary)
        for _ in range(lm.report.attempts):
            loss = step.step()
        assert loss.dtype == torch.float64
        for p in captured.params:
            p.data = p.data.clone()
    assert relative(ordinary.numbers(), captured.numbers()) < 1e-10


def test_a_hybrid():
    runs = []
    for pairs in (False, True):
        model = Model(pairs)
        hybrid = pgdfast.Hybrid(pgdfast.LM(model.params), torch.optim.Adam(model.params, lr=1e-2), 3)
        losses = train(model, hybrid, model, 6)
        state = through_a_file(hybrid.state_dict())
        hybrid.load_state_dict(state)
        losses += train(model, hybrid, model, 2)
        assert hybrid.report.parameters == 39
        runs.append((model.numbers(), losses))
    assert relative(runs[0][0], runs[1][0]) < 1e-8
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-8)


def test_the_spectrum_of_the_kernel():
    values = [pgdfast.ntk_spectrum(model, model.params).eigenvalues for model in (Model(), Model(True))]
    assert torch.allclose(*values, rtol=1e-9, atol=1e-12)
