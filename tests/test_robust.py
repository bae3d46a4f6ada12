"""Models, data and parameters of every kind that users bring."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import SOLVERS, flat, mlp, rand, relative, snapshot, unchanged

import pgdfast
from pgdfast import reference

BACKENDS = ("native", "torch", "reference")
X, Y = rand(8, 3, seed=1), rand(8, 2, seed=2)


def check_step(params, closure, mu=0.1, limit=1e-9, **options):
    """One constant step against the reference's."""
    ref, before = reference.linearize(closure, params), flat(params)
    optimizer = pgdfast.LM(params, damping=mu, damping_rule="constant", **options)
    optimizer.step(closure)
    assert relative(before - flat(params), reference.solve(ref, mu).step) < limit
    return optimizer


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("outputs", [1, 3])
def test_one_sample(samples, outputs, solver):
    model = mlp(3, 4, outputs)
    x, y = rand(samples, 3, seed=3), rand(samples, outputs, seed=4)
    options = dict(solver=solver, cg=pgdfast.CG(1000, 1e-14))
    check_step(list(model.parameters()), lambda: F.mse_loss(model(x), y), **options)
    check_step(list(model.parameters()), lambda: model(x) - y, **options)


def test_one_number():
    w = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    optimizer = pgdfast.LM([w], damping=0.5, damping_rule="constant")
    optimizer.step(lambda: (2 * w - 1).view(1))
    assert w.item() == pytest.approx(3 - 2 * 5 / (0.5 + 4), rel=1e-14)
    optimizer.step(lambda: (2 * w - 1) ** 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["constant", "gain-ratio", "delayed"])
@pytest.mark.parametrize("scaling", ["identity", "marquardt"])
def test_empty_batch(backend, rule, scaling):
    model = mlp(3, 4, 2)
    params = list(model.parameters())
    before = snapshot(params)
    optimizer = pgdfast.LM(params, damping_rule=rule, backend=backend, scaling=scaling)
    for closure in (
        lambda: model(X[:0]) - Y[:0],
        lambda: (model(X[:0]) - Y[:0], model(X[:0])[:, 0]),
        lambda: F.mse_loss(model(X[:0]), Y[:0], reduction="sum"),
        lambda: F.mse_loss(model(X[:0]), Y[:0]),
        lambda: (model(X[:0]) - Y[:0]).square().mean(),
        lambda: F.cross_entropy(model(X[:0]), torch.zeros(0, dtype=torch.long)),
    ):
        if (
            backend == "reference"
            and not torch.isfinite(
                closure().detach() if torch.is_tensor(closure()) else torch.zeros(1)
            ).all()
        ):
            continue  # the mean of nothing is not a number, and the reference says so
        optimizer.step(closure)
        assert unchanged(params, before) and optimizer.report.status == "empty"
    optimizer.step(lambda: F.mse_loss(model(X), Y))
    assert optimizer.report.status == "accepted" and not unchanged(params, before)


def test_frozen_and_unused_parameters():
    model = mlp(3, 4, 2)
    unused = torch.nn.Parameter(rand(3))
    model[0].weight.requires_grad_(False)
    before = snapshot([model[0].weight, unused])
    for scaling in ("identity", "marquardt"):
        for rule in ("constant", "gain-ratio"):
            optimizer = pgdfast.LM(
                [*model.parameters(), unused], damping=0.1, damping_rule=rule, scaling=scaling
            )
            optimizer.step(lambda: F.mse_loss(model(X), Y))
            assert unchanged([model[0].weight, unused], before)
    check_step([*list(model.parameters())[1:], unused], lambda: F.mse_loss(model(X), Y))


def test_freezing_between_steps():
    model = mlp(3, 4, 2)
    optimizer = pgdfast.LM(model.parameters(), damping=0.1)
    closure = lambda: F.mse_loss(model(X), Y)  # noqa: E731
    optimizer.step(closure)
    model[0].requires_grad_(False)
    before = snapshot(model[0].parameters())
    optimizer.step(closure)
    assert unchanged(model[0].parameters(), before)
    model[0].requires_grad_(True)
    optimizer.step(closure)
    assert not unchanged(model[0].parameters(), before)


def test_first_group_empty_or_frozen():
    model = mlp(3, 4, 2)
    frozen = torch.nn.Parameter(rand(2), requires_grad=False)
    for first in ([], [frozen]):
        optimizer = pgdfast.LM([{"params": first}, {"params": list(model.parameters())}])
        for _ in range(2):
            optimizer.step(lambda: F.mse_loss(model(X), Y))
        assert optimizer.report.status == "accepted"


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_tied_weights(backend):
    w, b = rand(3, 3).requires_grad_(), rand(3).requires_grad_()
    closure = lambda: F.linear(torch.tanh(F.linear(torch.tanh(F.linear(X, w, b)), w, b)), w.T) - X  # noqa: E731
    check_step([w, b], closure, backend=backend)
    model = torch.nn.Sequential(*mlp(3, 3, 3)[:2], *mlp(3, 3, 3)[:1])
    model[2].weight = model[0].weight
    check_step(list(model.parameters()), lambda: F.mse_loss(model(X), X), backend=backend)


STRIDES = {
    "transposed": lambda *shape: rand(*shape[::-1]).t(),
    "every other": lambda *shape: rand(*(2 * n for n in shape))[
        tuple(slice(None, None, 2) for _ in shape)
    ],
    "offset": lambda *shape: rand(shape[0] + 1, *shape[1:])[1:],
}


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("layout", STRIDES)
def test_parameters_of_any_layout(layout, solver, backend):
    w = STRIDES[layout](4, 3).requires_grad_()
    v = STRIDES[layout](2, 4).requires_grad_()
    closure = lambda: F.linear(torch.tanh(F.linear(X, w)), v) - Y + w.sum() * 0.1  # noqa: E731
    assert w.is_leaf and (not w.is_contiguous() or layout == "offset")
    stride = w.stride()
    options = dict(solver=solver, backend=backend, cg=pgdfast.CG(1000, 1e-14))
    check_step([w, v], closure, **options)
    assert w.stride() == stride
    optimizer = pgdfast.LM([w, v], damping=0.1, scaling="marquardt", weight_decay=0.01, **options)
    losses = [float(optimizer.step(closure)) for _ in range(4)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_data_of_any_layout(backend):
    model = mlp(3, 4, 2)
    params = list(model.parameters())
    wide, deep = rand(16, 6), rand(8, 5)
    inputs = (X, X.t().contiguous().t(), wide[::2, ::2], rand(1, 3).expand(8, 3), deep[:, 1:4])
    targets = (Y, Y.t().contiguous().t(), rand(8, 1).expand(8, 2), rand(1, 2).expand(8, 2))
    optimizer = pgdfast.LM(params, damping=0.1, damping_rule="constant", backend=backend)
    squares = lambda x, y: F.mse_loss(model(x), y)  # noqa: E731
    entropy = lambda x, y: F.binary_cross_entropy_with_logits(model(x), y.sigmoid())  # noqa: E731
    for x, y, form in itertools.product(inputs, targets, (squares, entropy)):
        closure = functools.partial(form, x, y)
        ref, before = reference.linearize(closure, params), flat(params)
        optimizer.step(closure)
        assert relative(before - flat(params), reference.solve(ref, 0.1).step) < 1e-9


def test_batch_size_that_changes_between_steps():
    model = mlp(3, 4, 2)
    params = list(model.parameters())
    optimizer = pgdfast.LM(params, damping=0.1, damping_rule="constant")
    for n in (8, 3, 8, 1, 5, 8, 0, 8):
        x, y = rand(n, 3, seed=n), rand(n, 2, seed=n + 1)
        closure = lambda: model(x) - y  # noqa: E731, B023
        ref, before = reference.linearize(closure, params), flat(params)
        optimizer.step(closure)
        assert relative(before - flat(params), reference.solve(ref, 0.1).step) < 1e-9


def test_parameters_replaced_and_loaded_between_steps():
    model = mlp(3, 4, 2)
    closure = lambda: F.mse_loss(model(X), Y)  # noqa: E731
    optimizer = pgdfast.LM(model.parameters(), damping=0.1, damping_rule="constant")
    optimizer.step(closure)
    model.load_state_dict(mlp(3, 4, 2, seed=5).state_dict())
    ref, before = reference.linearize(closure, list(model.parameters())), flat(model.parameters())
    optimizer.step(closure)
    assert relative(before - flat(model.parameters()), reference.solve(ref, 0.1).step) < 1e-9


def test_layers_with_state_and_noise():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 6), torch.nn.Dropout(0.3), torch.nn.Tanh(), torch.nn.Linear(6, 2)
    ).double()
    optimizer = pgdfast.LM(model.parameters(), damping=1.0)
    for _ in range(5):  # a new mask at every evaluation: steps may be refused, never harmful
        optimizer.step(lambda: F.mse_loss(model(X), Y))
        assert all(p.isfinite().all() for p in model.parameters())
    model.eval()
    check_step(list(model.parameters()), lambda: F.mse_loss(model(X), Y))


def test_mixed_dtypes_of_parameters():
    w, v = rand(4, 3, dtype=torch.float32).requires_grad_(), rand(2, 4).requires_grad_()
    optimizer = pgdfast.LM([w, v], damping=0.1)
    closure = lambda: torch.tanh(X @ w.double().T) @ v.T - Y  # noqa: E731
    losses = [float(optimizer.step(closure)) for _ in range(5)]
    assert losses[-1] < losses[0] and (w.dtype, v.dtype) == (torch.float32, torch.float64)


@pytest.mark.parametrize("samples", [2, 40])
def test_huge_and_tiny_losses(samples):
    x, y = rand(samples, 3, seed=1), rand(samples, 2, seed=2)
    for size in (1e-12, 1e12):
        model = mlp(3, 4, 2)
        params = list(model.parameters())
        closure = functools.partial(lambda m, s: s * (m(x) - y), model, size)
        mu = float(reference.linearize(closure, params).diagonal().max())
        check_step(params, closure, mu=mu)


# --- parameters of very different size ------------------------------------------------------------

T = torch.arange(16, dtype=torch.float64)


def decay(p):
    """a exp(-b t) + c with a ~ 1e4, b ~ 1e-4 per unit of 1e3, c ~ 1."""
    return p[0] * torch.exp(-p[1] * 1e3 * T) + p[2]


def meyer(p):
    """MGH10 of the NIST StRD: b1 exp(b2 / (x + b3)), certified to 11 digits."""
    return p[0] * torch.exp(p[1] / (50 + 5 * T + p[2]))


MEYER = torch.tensor(
    [
        34780,
        28610,
        23650,
        19630,
        16370,
        13720,
        11540,
        9744,
        8261,
        7030,
        6005,
        5147,
        4427,
        3820,
        3307,
        2872,
    ],
    dtype=torch.float64,
)
CERTIFIED = torch.tensor([5.6096364710e-03, 6.1813463463e03, 3.4522363462e02], dtype=torch.float64)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("solver", ["auto", "dual", "primal", "eigh"])
@pytest.mark.parametrize("rule", ["gain-ratio", "delayed"])
def test_curve_fit_with_parameters_of_very_different_size(rule, solver, backend):
    true = torch.tensor([1e4, 1e-4, 1.0], dtype=torch.float64)
    p = torch.tensor([3e3, 3e-4, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = pgdfast.LM(
        [p], damping=1e-3, damping_rule=rule, scaling="marquardt", solver=solver, backend=backend
    )
    for _ in range(100):
        optimizer.step(lambda: decay(p) - decay(true))
        if optimizer.report.finished:
            break
    assert ((p - true) / true).abs().max() < 1e-8


@pytest.mark.parametrize("solver", ["auto", "dual", "primal", "eigh"])
@pytest.mark.parametrize("start", [(0.02, 4000.0, 250.0), (5e-3, 6000.0, 340.0)])
def test_certified_fit(start, solver):
    p = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = pgdfast.LM(
        [p], damping=1e-3, damping_rule="delayed", scaling="marquardt", solver=solver
    )
    for _ in range(500):
        optimizer.step(lambda: meyer(p) - MEYER)
        if optimizer.report.finished:
            break
    assert ((p.detach() - CERTIFIED) / CERTIFIED).abs().max() < 1e-8
    assert 2 * optimizer.report.loss_after == pytest.approx(8.7945855171e01, rel=1e-9)


def peaks_and_decay(p, x):
    """Two Gaussian peaks on an exponential background; x in metres, some 1e-6."""
    height1, centre1, width1, height2, centre2, width2, background, length = p
    return (
        height1 * torch.exp(-0.5 * ((x - centre1) / width1).square())
        + height2 * torch.exp(-0.5 * ((x - centre2) / width2).square())
        + background * torch.exp(-x / length)
    )


@pytest.mark.parametrize("options", [
    {}, {"acceleration": "geodesic"}, {"acceleration": "chord", "damping": 1e-3},   # from 1e-4 it ends in another minimum
])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_peaks_with_parameters_from_1e_6_to_1e6_from_a_poor_start(options, backend):
    """The default rule with Marquardt's D; without D it does not come near."""
    true = torch.tensor([2e6, 3e-6, 4e-7, 5e5, 6e-6, 8e-7, 1e6, 2.5e-6], dtype=torch.float64)
    poor = torch.tensor([4e5, 2.2e-6, 9e-7, 1.5e6, 7.2e-6, 4e-7, 3e5, 6e-6], dtype=torch.float64)
    x = torch.linspace(0, 1e-5, 120, dtype=torch.float64)
    y = peaks_and_decay(true, x)

    def fitted(scaling):
        p = poor.clone().requires_grad_()
        optimizer = pgdfast.LM([p], scaling=scaling, backend=backend, **options)
        for _ in range(300):
            optimizer.step(lambda: peaks_and_decay(p, x) - y)
            if optimizer.report.finished:
                break
        return float(((p.detach() - true) / true).abs().max())

    assert fitted("marquardt") < 1e-6 and fitted("identity") > 1e-2
