"""Closures that cannot be linearized: what the user reads."""

import pytest
import torch
import torch.nn.functional as F
from helpers import mlp, rand, snapshot, unchanged

import pgdfast

X, Y = rand(6, 3, seed=1), rand(6, 4, seed=2)


def backwarded(z):
    loss = F.mse_loss(z, Y)
    loss.backward()
    return loss


def backwarded_residual(z):
    r = z - Y
    r.square().sum().backward()
    return r


BAD = {  # name: (function of the outputs, parts of the message in order)
    "backward in the closure": (
        backwarded,
        r"closure called backward\(\).*return the loss or the residuals",
    ),
    "backward of the residuals": (
        backwarded_residual,
        r"closure called backward\(\).*return the loss or the residuals",
    ),
    "backward of a loss with a dimension": (
        lambda z: backwarded(z)[None],
        r"closure called backward\(\).*return the loss or the residuals",
    ),
    "plain mean": (
        lambda z: z.mean(),
        r"last operation is torch.mean \(MeanBackward0\); a linear layer .*no curvature to step by.*Return the residual tensor",
    ),
    "logarithm": (
        lambda z: -z.square().mean().log(),
        r"last operation is a minus sign \(NegBackward0\); torch.log \(LogBackward0\) leads to no sum of squares",
    ),
    "sine": (
        lambda z: torch.sin(z).sum(),
        r"last operation is torch.sum .*torch.sin \(SinBackward0\) leads to no sum of squares, no cross-entropy and no other",
    ),
    "quantile without its error": (
        lambda z: (lambda e: torch.where(e > 0, 0.3 * e, -0.7 * e).mean())(z - Y) + z.sum(),
        r"is torch.maximum\(q \* e, \(q - 1\) \* e\)",
    ),
    "negative root": (lambda z: -F.mse_loss(z, Y).sqrt(), r"torch.sqrt \(SqrtBackward0\) leads to no"),
    "negative huber": (lambda z: -F.huber_loss(z, Y), "huber or smooth_l1 loss has a negative weight"),
    "negative norm": (lambda z: -(z - Y).norm(), "negative weight"),
    "indefinite weights": (
        lambda z: z[:, 0] @ (rand(6, 6) + rand(6, 6).T) @ z[:, 0],
        "as a quadratic form r.T W r it has a W that is not positive semidefinite",
    ),
    "cube": (
        lambda z: z.pow(3).sum(),
        r"last operation is torch.sum \(SumBackward0\); it raises a quantity to the power 3, not 2",
    ),
    "two factors": (
        lambda z: (z[:, 0] * z[:, 1]).sum(),
        "multiplies two different quantities that both depend on the parameters",
    ),
    "quotient": (
        lambda z: F.mse_loss(z, Y) / z.sum(),
        "divides by a quantity that depends on the parameters",
    ),
    "two vectors": (lambda z: torch.dot(z[0], z[1]), "dot product of two different vectors"),
    "negative loss": (lambda z: -F.mse_loss(z, Y), "negative weight"),
    "negative difference": (lambda z: F.mse_loss(z, Y) - 2 * z.square().sum(), "negative weight"),
    "negative elementwise": (lambda z: (-Y.abs() * z**2).sum(), "negative weight"),
    "negative cross-entropy": (
        lambda z: -F.cross_entropy(z, torch.arange(6) % 4),
        "log_softmax enters with a positive sign",
    ),
    "negative class weights": (
        lambda z: F.cross_entropy(z, torch.arange(6) % 4, -torch.ones(4).double(), reduction="sum"),
        "positive sign",
    ),
    "negative bce": (
        lambda z: -F.binary_cross_entropy_with_logits(z, Y.sigmoid()),
        "cross-entropy has a negative weight",
    ),
    "negative bce weights": (
        lambda z: F.binary_cross_entropy_with_logits(z, Y.sigmoid(), -Y.abs()),
        "has a negative weight",
    ),
    "negative pos_weight": (
        lambda z: F.binary_cross_entropy_with_logits(
            z, Y.sigmoid(), pos_weight=-torch.ones(4).double()
        ),
        "has a negative weight",
    ),
    "learned target": (
        lambda z: F.binary_cross_entropy_with_logits(z, z.sigmoid()),
        "target that depends on the parameters",
    ),
    "detached": (
        lambda z: F.mse_loss(z.detach(), Y),
        "does not depend on any of the optimizer's parameters",
    ),
    "detached residuals": (
        lambda z: (z - Y).detach(),
        "does not depend on any of the optimizer's parameters.*without detach",
    ),
    "other parameters": (
        lambda z: Y.clone().requires_grad_() * 2,
        "does not depend on any of the optimizer's parameters",
    ),
    "nothing": (
        lambda z: None,
        "closure returned NoneType; it must return a scalar loss tensor, a residual tensor",
    ),
    "number": (lambda z: F.mse_loss(z, Y).item(), "closure returned float; it must return"),
    "array": (lambda z: z.detach().numpy(), "closure returned ndarray; it must return"),
    "dictionary": (lambda z: {"loss": F.mse_loss(z, Y)}, "closure returned dict; it must return"),
    "tuple of none": (lambda z: (z - Y, None), "NoneType"),
    "empty tuple": (lambda z: (), "empty tuple; it must hold at least one residual tensor"),
    "tuple with a loss": (
        lambda z: (z - Y, F.mse_loss(z, Y)),
        "a tuple with a scalar in it.*return the sum instead",
    ),
    "integers": (
        lambda z: (z > 0).long(),
        "tensor of torch.int64; it must be a real floating-point tensor",
    ),
    "complex": (
        lambda z: z.to(torch.complex128),
        "tensor of torch.complex128; it must be a real floating-point tensor",
    ),
    "not a number": (
        lambda z: F.mse_loss(z, Y) * float("nan"),
        "loss before the step is nan; nothing was changed.*NaN or infinity",
    ),
    "infinity": (
        lambda z: (z - Y) / torch.zeros(4).double(),
        "loss before the step is (nan|inf); nothing was changed",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_message(name):
    function, message = BAD[name]
    model = mlp(3, 5, 4)
    params = list(model.parameters())
    before = snapshot(params)
    optimizer = pgdfast.LM(params)
    with pytest.raises(ValueError, match="(?s)^pgdfast.*" + message):
        optimizer.step(lambda: function(model(X)))
    assert unchanged(params, before)


def test_without_gradients():
    model = mlp(3, 5, 4)
    with torch.no_grad():
        z = model(X)
    with pytest.raises(ValueError, match="with gradients enabled"):
        pgdfast.LM(model.parameters()).step(lambda: F.mse_loss(z, Y))


def test_closure_runs_with_gradients_even_under_no_grad():
    model = mlp(3, 5, 4)
    with torch.no_grad():
        pgdfast.LM(model.parameters()).step(lambda: F.mse_loss(model(X), Y))


def test_products_after_the_parameters_have_changed():
    model = mlp(3, 5, 4)
    lin = pgdfast.linearize(lambda: model(X), model.parameters())
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(
        RuntimeError,
        match="parameters have changed since this linearization was made; linearize again",
    ):
        lin.jvp(torch.zeros(lin.num_parameters))


@pytest.mark.parametrize("shape", [(3,), (39, 1), ()])
def test_vectors_of_the_wrong_shape(shape):
    model = mlp(3, 5, 4)
    lin = pgdfast.linearize(lambda: model(X), model.parameters())
    with pytest.raises(ValueError, match="v has shape .* must be flat with P = 44 entries"):
        lin.jvp(torch.zeros(shape))
    with pytest.raises(ValueError, match="u has shape .* must be flat with M = 24 entries"):
        lin.vjp(torch.zeros(shape))


def test_linearize_needs_a_parameter():
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        pgdfast.linearize(lambda: torch.zeros(3), [torch.zeros(3)])
    with pytest.raises(ValueError, match=r"call pgdfast.reference.linearize\(closure, params\)"):
        pgdfast.linearize(
            lambda: torch.zeros(3), [torch.zeros(3).requires_grad_()], backend="reference"
        )
