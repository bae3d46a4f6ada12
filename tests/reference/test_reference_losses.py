"""Every loss form on the tape, against autograd's gradient and torch.func's output Hessian."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, jacrev

from pgdfast import reference

torch.manual_seed(0)
N, K, D = 6, 4, 3  # samples, outputs, inputs
X = torch.randn(N, D, dtype=torch.float64)
Y = torch.randn(N, K, dtype=torch.float64)
W = torch.rand(N, K, dtype=torch.float64)
W[1] = 0.0
CLASS = torch.rand(K, dtype=torch.float64) + 0.1
LABELS = torch.tensor([0, 1, 2, -100, 3, 1])
SOFT = torch.softmax(Y, 1)
PIXELS = torch.tensor([[0, 1], [2, 2], [1, 0]])

# Each entry is a loss of the outputs z, (N, K), as a user would write it.
FORMS = {
    "mse": lambda z: F.mse_loss(z, Y),
    "mse sum": lambda z: F.mse_loss(z, Y, reduction="sum"),
    "mse none": lambda z: (W * F.mse_loss(z, Y, reduction="none")).mean(),
    "mse weight": lambda z: F.mse_loss(z, Y, weight=W),
    "mse of two outputs": lambda z: F.mse_loss(z, z.roll(1, 0).sin()),
    "mse swapped": lambda z: F.mse_loss(Y, z),
    "pow": lambda z: ((z - Y) ** 2).sum(),
    "square": lambda z: (z - Y).square().mean(),
    "product": lambda z: (lambda r: (r * r).mean(dim=1).sum())(z - Y),
    "dot": lambda z: (lambda r: torch.dot(r, r))((z - Y).reshape(-1)),
    "norm": lambda z: (z - Y).norm() ** 2,
    "row norms": lambda z: torch.linalg.vector_norm(z - Y, dim=-1).pow(2).mean(),
    "kept norms": lambda z: (lambda n: (n * n).sum())((z - Y).norm(dim=0, keepdim=True)),
    "weighted": lambda z: (W * (z - Y) ** 2).sum() / 7,
    "divided elementwise": lambda z: ((z - Y) ** 2 / CLASS).mean(),
    "weights by dot": lambda z: torch.dot(CLASS, (z - Y).square().mean(0)),
    "selected": lambda z: (z - Y).square()[:, 1].mean() + (z[LABELS == 1] - 1).square().sum(),
    "sum of terms": lambda z: 3 * F.mse_loss(z, Y) + 0.5 * z.square().sum() / 2 - (-(z * z)).mean(),
    "plus a constant": lambda z: F.mse_loss(z, Y) + 5.0,
    "stacked terms": lambda z: torch.stack([F.mse_loss(z, Y), z.square().mean()]).sum(),
    "ce": lambda z: F.cross_entropy(z, LABELS),
    "ce sum": lambda z: F.cross_entropy(z, LABELS, reduction="sum"),
    "ce none": lambda z: (W[:, 0] * F.cross_entropy(z, LABELS, reduction="none")).mean(),
    "ce class weights": lambda z: F.cross_entropy(z, LABELS.abs() % 5, CLASS, ignore_index=0),
    "ce smoothing": lambda z: F.cross_entropy(z, LABELS, weight=CLASS, label_smoothing=0.1),
    "ce soft": lambda z: F.cross_entropy(z, SOFT),
    "ce soft smoothing": lambda z: F.cross_entropy(z, SOFT, weight=CLASS, label_smoothing=0.2),
    "ce pixels": lambda z: F.cross_entropy(z.reshape(3, 4, 2), PIXELS),
    "ce volume": lambda z: F.cross_entropy(z.reshape(3, 4, 1, 2, 1), PIXELS.view(3, 1, 2, 1)),
    "ce pixels smoothing": lambda z: F.cross_entropy(
        z.reshape(3, 4, 2), PIXELS, label_smoothing=0.1
    ),
    "ce one sample": lambda z: F.cross_entropy(z[0], LABELS[0]),
    "nll of log_softmax": lambda z: F.nll_loss(z.log_softmax(1), LABELS),
    "bce": lambda z: F.binary_cross_entropy_with_logits(z, SOFT),
    "bce sum": lambda z: F.binary_cross_entropy_with_logits(z, SOFT, W, reduction="sum"),
    "bce pos_weight": lambda z: F.binary_cross_entropy_with_logits(z, SOFT, pos_weight=CLASS),
    "bce none": lambda z: (
        F.binary_cross_entropy_with_logits(z, SOFT, reduction="none").sum(1).mean()
    ),
    "ce and mse": lambda z: F.cross_entropy(z, LABELS) + 2 * F.mse_loss(z, Y),
}


@pytest.fixture
def model():
    torch.manual_seed(1)
    layers = torch.nn.Linear(D, 5), torch.nn.Tanh(), torch.nn.Linear(5, K)
    return torch.nn.Sequential(*layers).double()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def output_jacobian(model):
    """dz/dtheta by torch.func, (N * K, P)."""
    outputs = jacrev(lambda p: functional_call(model, p, (X,)))(dict(model.named_parameters()))
    return torch.cat([j.reshape(N * K, -1) for j in outputs.values()], 1).detach()


@pytest.mark.parametrize("form", FORMS)
def test_gradient_and_loss(form, model):
    params = list(model.parameters())
    lin = reference.linearize(lambda: FORMS[form](model(X)), params)
    loss = FORMS[form](model(X))
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, params)])
    assert relative(lin.vjp(lin.residual), gradient) < 1e-12
    torch.testing.assert_close(lin.loss, loss.detach(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("form", [f for f in FORMS if f != "mse of two outputs"])
def test_gauss_newton_matrix(form, model):
    lin = reference.linearize(lambda: FORMS[form](model(X)), list(model.parameters()))
    H = jacrev(jacrev(FORMS[form]))(model(X).detach()).reshape(N * K, N * K)
    J = output_jacobian(model)
    assert relative(lin.jacobian.T @ lin.jacobian, J.T @ H @ J) < 1e-12


@pytest.mark.parametrize("form", ["mse", "norm", "weighted", "sum of terms", "mse of two outputs"])
def test_squares_give_half_the_squared_residual(form, model):
    lin = reference.linearize(lambda: FORMS[form](model(X)), list(model.parameters()))
    assert 0.5 * lin.residual.square().sum().item() == pytest.approx(lin.loss.item(), rel=1e-13)


def test_mean_squared_error_scales_rows(model):
    lin = reference.linearize(lambda: F.mse_loss(model(X), Y), list(model.parameters()))
    scale = (2 / (N * K)) ** 0.5
    torch.testing.assert_close(lin.residual, scale * (model(X) - Y).detach().reshape(-1))
    torch.testing.assert_close(lin.jacobian, scale * output_jacobian(model))


def test_quadratic_penalty_adds_plain_rows(model):
    params, c = list(model.parameters()), 0.3
    lin = reference.linearize(
        lambda: F.mse_loss(model(X), Y) + 0.5 * c * sum(p.pow(2).sum() for p in params), params
    )
    theta = torch.cat([p.detach().reshape(-1) for p in params])
    torch.testing.assert_close(lin.residual[N * K :], c**0.5 * theta)
    torch.testing.assert_close(lin.jacobian[N * K :], c**0.5 * torch.eye(len(theta)).double())


def test_ignored_labels_give_zero_rows(model):
    lin = reference.linearize(lambda: F.cross_entropy(model(X), LABELS), list(model.parameters()))
    rows = slice(3 * K, 4 * K)
    assert not lin.residual[rows].any() and not lin.jacobian[rows].any()


@pytest.mark.parametrize("size", [40.0, 800.0])
def test_saturated_logits_keep_the_gradient(size):
    z = torch.tensor([[size, 0.0, -size]], dtype=torch.float64, requires_grad=True)
    for loss in (
        lambda: F.cross_entropy(z, torch.tensor([1])),
        lambda: F.binary_cross_entropy_with_logits(z, torch.tensor([[0.0, 1.0, 1.0]]).double()),
    ):
        lin = reference.linearize(loss, [z])
        (gradient,) = torch.autograd.grad(loss(), z)
        torch.testing.assert_close(lin.vjp(lin.residual), gradient[0], rtol=1e-12, atol=1e-12)


def test_masked_class_with_infinite_logit():
    z = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    minus_infinity = torch.full((3, 1), -torch.inf, dtype=torch.float64)
    loss = lambda: F.cross_entropy(torch.cat([z, minus_infinity], 1), torch.tensor([0, 1, 1]))  # noqa: E731
    lin = reference.linearize(loss, [z])
    (gradient,) = torch.autograd.grad(loss(), z)
    torch.testing.assert_close(lin.vjp(lin.residual), gradient.reshape(-1), rtol=1e-12, atol=0)


def test_factor_that_does_not_depend_on_params_is_a_weight(model):
    x = X.clone().requires_grad_()  # on the tape, yet not a parameter
    lin = reference.linearize(
        lambda: (x.square().sum(1) * (model(x) - Y).square().sum(1)).mean(),
        list(model.parameters()),
    )
    H = torch.diag((2 / N * X.square().sum(1)).repeat_interleave(K))
    J = output_jacobian(model)
    assert relative(lin.jacobian.T @ lin.jacobian, J.T @ H @ J) < 1e-12
