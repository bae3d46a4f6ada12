"""Every loss form against the reference: loss, gradient, Gauss-Newton products and diagonal."""

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, agreement, mlp, perturb, rand, relative

import pgdfast
from pgdfast import reference
from pgdfast.linear import Linearizer

N, K, D = 6, 4, 3  # samples, outputs, inputs
X, Y = rand(N, D, seed=1), rand(N, K, seed=2)
W = rand(N, K, seed=3).square()
W[1] = 0
CLASS = rand(K, seed=4).square() + 0.1
LABELS = torch.tensor([0, 1, 2, -100, 3, 1])
SOFT = torch.softmax(Y, 1)
PIXELS = torch.tensor([[0, 1], [2, 2], [1, 0]])
INDEX = torch.tensor([3, 0, 0])

SQUARES = {
    "residuals": lambda z: z - Y,
    "tuple of residuals": lambda z: (z - Y, 0.3 * z[:, 1], torch.tanh(z).sum(1)),
    "list of residuals": lambda z: [z - Y, z.sum().view(1)],
    "constant beside residuals": lambda z: (z - Y, Y[0]),
    "mse": lambda z: F.mse_loss(z, Y),
    "mse sum": lambda z: F.mse_loss(z, Y, reduction="sum"),
    "mse none": lambda z: (W * F.mse_loss(z, Y, reduction="none")).mean(),
    "mse weight": lambda z: F.mse_loss(z, Y, weight=W),
    "mse swapped": lambda z: F.mse_loss(Y, z),
    "mse of two outputs": lambda z: F.mse_loss(z, torch.cat([z[1:], z[:1]]).sin()),
    "power": lambda z: ((z - Y) ** 2).sum(),
    "square": lambda z: (z - Y).square().mean(),
    "product": lambda z: (lambda r: (r * r).mean(dim=1).sum())(z - Y),
    "dot": lambda z: (lambda r: torch.dot(r, r))((z - Y).reshape(-1)),
    "norm": lambda z: (z - Y).norm() ** 2,
    "row norms": lambda z: torch.linalg.vector_norm(z - Y, dim=-1).pow(2).mean(),
    "kept norms": lambda z: (lambda n: (n * n).sum())((z - Y).norm(dim=0, keepdim=True)),
    "norms with weights": lambda z: (
        W[:, 0] * torch.linalg.vector_norm(z - Y, dim=1).square()
    ).sum(),
    "weighted": lambda z: (W * (z - Y) ** 2).sum() / 7,
    "scaled": lambda z: 0.3 * (z - Y).square().sum() / 0.7 * 3,
    "divided elementwise": lambda z: ((z - Y) ** 2 / CLASS).mean(),
    "divided by counts": lambda z: ((z - Y) ** 2 / torch.tensor([3, 7, 9, 11])).sum(),
    "weights by dot": lambda z: torch.dot(CLASS, (z - Y).square().mean(0)),
    "weights over sums": lambda z: (CLASS * (z - Y).view(N, K, 1).square().sum(2)).sum(),
    "weights over means": lambda z: (
        CLASS * (z - Y).view(N, K, 1).square().mean(2, keepdim=True).squeeze(2)
    ).mean(),
    "weights broadcast up": lambda z: (W * (z[:, :1] - 1) ** 2).mean(),
    "chosen and broadcast": lambda z: torch.where(W > 1, (z[:, :1] - 1) ** 2, 0.0).mean(),
    "weights over joined squares": lambda z: (
        W * torch.cat([z[:, :2] ** 2, (z - Y)[:, 2:] ** 2], 1)
    ).sum(),
    "weights over stacked squares": lambda z: (
        CLASS[:2, None] * torch.stack([z[:, 0] ** 2, (z - Y)[:, 1] ** 2])
    ).sum(),
    "selected": lambda z: (z - Y).square()[:, 1].mean() + (z - Y).square()[2:, ::2].sum(),
    "indexed": lambda z: (
        (z - Y).square()[INDEX].mean() + (z - Y).square().gather(1, INDEX.view(1, 3)).sum()
    ),
    "masked": lambda z: ((z - Y) ** 2).masked_fill(W > 1, 0.0).mean() + ((z - Y) ** 2)[W > 1].sum(),
    "chosen": lambda z: torch.where(W > 1, (z - Y) ** 2, 0.5 * z**2).mean(),
    "transposed": lambda z: (W.T * ((z - Y) ** 2).T).mean() + ((z - Y) ** 2).permute(1, 0)[0].sum(),
    "expanded": lambda z: (W * ((z - Y)[:, :1] ** 2).expand(N, K)).sum(),
    "sum of terms": lambda z: 3 * F.mse_loss(z, Y) + 0.5 * z.square().sum() / 2 - (-(z * z)).mean(),
    "subtracted from nothing": lambda z: 0 - (-(z - Y).square()).mean() - 2,
    "one term twice": lambda z: (lambda loss: loss + loss)(F.mse_loss(z, Y)),
    "plus a constant": lambda z: F.mse_loss(z, Y) + 5.0,
    "stacked terms": lambda z: torch.stack([F.mse_loss(z, Y), z.square().mean()]).sum(),
    "python sum": lambda z: sum([F.mse_loss(z[:2], Y[:2]), 10 * F.mse_loss(z[2:], Y[2:])]),
    "not weighted": lambda z: 0 * F.mse_loss(z, Y) + z.square().sum(),
}
ENTROPIES = {
    "ce": lambda z: F.cross_entropy(z, LABELS),
    "ce sum": lambda z: F.cross_entropy(z, LABELS, reduction="sum"),
    "ce none": lambda z: (W[:, 0] * F.cross_entropy(z, LABELS, reduction="none")).mean(),
    "ce class weights": lambda z: F.cross_entropy(z, LABELS.abs() % 4, CLASS),
    "ce ignore_index": lambda z: F.cross_entropy(z, LABELS.abs() % 4, CLASS, ignore_index=0),
    "ce smoothing": lambda z: F.cross_entropy(z, LABELS.abs() % 4, label_smoothing=0.1),
    "ce smoothing with weights": lambda z: F.cross_entropy(
        z, LABELS, weight=CLASS, label_smoothing=0.1
    ),
    "ce soft": lambda z: F.cross_entropy(z, SOFT),
    "ce soft smoothing": lambda z: F.cross_entropy(z, SOFT, weight=CLASS, label_smoothing=0.2),
    "ce pixels": lambda z: F.cross_entropy(z.reshape(3, 4, 2), PIXELS),
    "ce images": lambda z: F.cross_entropy(z.reshape(3, 4, 1, 2), PIXELS.view(3, 1, 2)),
    "ce volume": lambda z: F.cross_entropy(z.reshape(3, 4, 1, 2, 1), PIXELS.view(3, 1, 2, 1)),
    "ce pixels smoothing": lambda z: F.cross_entropy(
        z.reshape(3, 4, 2), PIXELS, label_smoothing=0.1
    ),
    "ce one sample": lambda z: F.cross_entropy(z[0], LABELS[0]),
    "ce of sequences": lambda z: F.cross_entropy(z.view(3, 2, 4).flatten(0, 1), LABELS),
    "nll of log_softmax": lambda z: F.nll_loss(z.log_softmax(1), LABELS),
    "entropy by hand": lambda z: -(SOFT * torch.log_softmax(z, -1)).sum(1).mean(),
    "picked by hand": lambda z: (
        -torch.log_softmax(z, -1).gather(1, (LABELS.abs() % 4).view(-1, 1)).mean()
    ),
    "ce over another dimension": lambda z: -(SOFT * torch.log_softmax(z, 0)).mean(),
    "bce": lambda z: F.binary_cross_entropy_with_logits(z, SOFT),
    "bce hard": lambda z: F.binary_cross_entropy_with_logits(z, (SOFT > 0.3).double()),
    "bce weight": lambda z: F.binary_cross_entropy_with_logits(z, SOFT, W, reduction="sum"),
    "bce class weight": lambda z: F.binary_cross_entropy_with_logits(z, SOFT, CLASS),
    "bce pos_weight": lambda z: F.binary_cross_entropy_with_logits(z, SOFT, pos_weight=CLASS),
    "bce none": lambda z: (
        F.binary_cross_entropy_with_logits(z, SOFT, reduction="none").sum(1).mean()
    ),
    "bce weighted outside": lambda z: (
        (W * F.binary_cross_entropy_with_logits(z, SOFT, reduction="none")).mean() / 7
    ),
    "ce and mse": lambda z: (
        F.cross_entropy(z, LABELS)
        + 2 * F.mse_loss(z, Y)
        + F.binary_cross_entropy_with_logits(z, SOFT)
    ),
}
FORMS = SQUARES | ENTROPIES


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_form_agrees_with_the_reference(form, backend):
    model = mlp(D, 5, K)
    params = list(model.parameters())
    linearizer = Linearizer(params, backend)
    for visit in range(2):
        assert agreement(linearizer, lambda: FORMS[form](model(X)), params, seed=visit) < 1e-12
        perturb(params, seed=visit)
    assert len(linearizer._plans) == 1


@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_that_of_autograd(form):
    model = mlp(D, 5, K)
    params = list(model.parameters())
    lin = pgdfast.linearize(lambda: FORMS[form](model(X)), params)
    result = FORMS[form](model(X))
    if not isinstance(result, torch.Tensor) or result.dim():
        parts = result if isinstance(result, (tuple, list)) else [result]
        result = 0.5 * sum(part.square().sum() for part in parts)
    gradient = torch.autograd.grad(result, params)
    assert relative(lin.gradient(), torch.cat([g.reshape(-1) for g in gradient])) < 1e-12
    assert relative(lin.loss, result) < 1e-14


PENALTIES = {
    "sum of squares": lambda w: 0.3 * w.square().sum(),
    "power": lambda w: (w**2).sum() / 7,
    "mean": lambda w: w.pow(2).mean(),
    "norm": lambda w: 0.1 * w.norm() ** 2,
    "dot": lambda w: 0.1 * (lambda v: torch.dot(v, v))(w.reshape(-1)),
    "product": lambda w: 0.1 * (w * w).sum(),
    "elementwise": lambda w: (rand(*w.shape, seed=5).square() * w**2).sum(),
    "centred elsewhere": lambda w: F.mse_loss(w, torch.ones_like(w)),
    "difference": lambda w: 0.2 * (w - 1).square().sum(),
    "twice": lambda w: 0.3 * w.square().sum() + 0.2 * w.square().sum(),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("every", [True, False])
def test_quadratic_penalty_agrees_with_the_reference(penalty, every, backend):
    model = mlp(D, 5, K)
    params = list(model.parameters())
    penalized = params if every else params[:1]

    def closure():
        return F.mse_loss(model(X), Y) + sum(PENALTIES[penalty](p) for p in penalized)

    assert agreement(Linearizer(params, backend), closure, params) < 1e-12


def test_penalty_alone_is_a_loss():
    w = rand(3, 2).requires_grad_()
    lin = pgdfast.linearize(lambda: 0.5 * w.square().sum(), [w])
    assert lin.num_residuals == 0
    assert relative(lin.gradient(), w.reshape(-1)) < 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [40.0, 80.0, 800.0])
def test_saturated_logits_keep_their_gradient(size, dtype):
    z = torch.tensor([[size, 0.0, -size]], dtype=dtype, requires_grad=True)
    target = torch.tensor([[0.0, 1.0, 1.0]], dtype=dtype)
    for loss in (
        lambda: F.cross_entropy(z, torch.tensor([1])),
        lambda: F.binary_cross_entropy_with_logits(z, target),
    ):
        lin = pgdfast.linearize(loss, [z])
        (gradient,) = torch.autograd.grad(loss(), z)
        assert relative(lin.gradient(), gradient[0]) < 10 * torch.finfo(dtype).eps
        assert lin.dense().isfinite().all() and lin.residual.isfinite().all()


def test_class_that_is_masked_out():
    z = rand(3, 2).requires_grad_()
    minus_infinity = torch.full((3, 1), -torch.inf, dtype=torch.float64)

    def closure():
        return F.cross_entropy(torch.cat([z, minus_infinity], 1), torch.tensor([0, 1, 1]))

    lin = pgdfast.linearize(closure, [z])
    assert relative(lin.gradient(), torch.autograd.grad(closure(), z)[0].reshape(-1)) < 1e-12


def test_weight_on_the_tape_that_is_no_parameter():
    model, x = mlp(D, 5, K), X.clone().requires_grad_()
    params = list(model.parameters())

    def closure():
        return (x.square().sum(1) * (model(x) - Y).square().sum(1)).mean()

    assert agreement(Linearizer(params), closure, params) < 1e-12


def test_mean_squared_error_scales_rows():
    model = mlp(D, 5, K)
    params = list(model.parameters())
    mean = pgdfast.linearize(lambda: F.mse_loss(model(X), Y), params)
    plain = pgdfast.linearize(lambda: model(X) - Y, params)
    scale = (2 / (N * K)) ** 0.5
    assert relative(mean.residual, scale * plain.residual) < 1e-14
    assert relative(mean.dense(), scale * plain.dense()) < 1e-14


def test_constants_change_without_a_new_structure():
    model = mlp(D, 5, K)
    params = list(model.parameters())
    linearizer = Linearizer(params)

    def closure():
        squares = (weight * (model(x) - target) ** 2).mean()
        return squares + F.cross_entropy(model(x), classes)

    for seed in range(3):
        x, weight = rand(N, D, seed=seed), rand(N, K, seed=seed).square()
        target, classes = rand(N, K, seed=seed + 9), LABELS.roll(seed)
        assert agreement(linearizer, closure, params) < 1e-12
    assert len(linearizer._plans) == 1


def test_forms_may_alternate():
    model = mlp(D, 5, K)
    params = list(model.parameters())
    linearizer = Linearizer(params)
    for _ in range(2):
        for form in FORMS:  # more forms than structures are kept
            assert agreement(linearizer, lambda: FORMS[form](model(X)), params) < 1e-12  # noqa: B023


@pytest.mark.parametrize("form", FORMS)
def test_float32_agrees_with_the_reference(form):
    model = mlp(D, 5, K).float()
    params = list(model.parameters())
    closure = lambda: single(FORMS[form], model)  # noqa: E731
    lin, ref = pgdfast.linearize(closure, params), reference.linearize(closure, params)
    v = rand(lin.num_parameters, dtype=torch.float32)
    assert lin.gradient().dtype == torch.float32
    assert relative(lin.gradient(), ref.vjp(ref.residual)) < 1e-5
    assert relative(lin.ggn(v), ref.ggn(v.double())) < 1e-5


def single(form, model):
    """A form of float64 data on float32 outputs: what is mixed is promoted, as PyTorch does."""
    return form(model(X.float()).double())
