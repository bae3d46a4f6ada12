"""What is not understood is an error that says what was found and what to return instead."""

import pytest
import torch
import torch.nn.functional as F

from pgdfast import reference

torch.manual_seed(0)
W = torch.randn(3, 2, requires_grad=True)
X = torch.randn(5, 3)
Y = torch.randn(5, 2)
LABELS = torch.tensor([0, 1, 1, 0, 1])


def model():
    return X @ W


def freed(result):
    result.sum().backward()
    return result


UNKNOWN = {
    "SinBackward0": lambda: (model() - Y).sin().sum(),
    "LogBackward0": lambda: -F.mse_loss(model(), Y).log(),
    "SqrtBackward0": lambda: -F.mse_loss(model(), Y).sqrt(),
    "AtanBackward0": lambda: (model() - Y).atan().sum(),
    "MmBackward0": lambda: model().mean(),
    "MulBackward0": lambda: (model() * (model() - Y)).sum(),
    "DivBackward0": lambda: (Y / model()).sum(),
    "PowBackward0": lambda: (model() ** 3).sum(),
    "LinalgVectorNormBackward0": lambda: model().norm(p=3),
    "SplitWithSizesBackward0": lambda: sum(t.sum() for t in model().sin().split([2, 3])),
    r"a bare parameter \(AccumulateGrad\)": lambda: W.sum(),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_scalar_names_the_operation_and_the_way_out(name):
    with pytest.raises(ValueError, match=f"ends in {name}, .* or return the residual tensor"):
        reference.linearize(UNKNOWN[name], [W])


@pytest.mark.parametrize("closure", [
    lambda: F.mse_loss(model(), Y) - 2 * model().square().sum(),
    lambda: (Y * model().square()).sum(),
    lambda: F.cross_entropy(model(), LABELS, weight=torch.tensor([1.0, -1.0])),
    lambda: -F.cross_entropy(model(), LABELS),
    lambda: -F.binary_cross_entropy_with_logits(model(), Y.sigmoid()),
    lambda: F.binary_cross_entropy_with_logits(model(), Y * 9, pos_weight=torch.tensor(2.0)),
])  # fmt: skip
def test_negative_weight(closure):
    with pytest.raises(ValueError, match="negative weight .* with weights >= 0"):
        reference.linearize(closure, [W])


@pytest.mark.parametrize("closure", [
    lambda: freed(F.mse_loss(model(), Y)),
    lambda: freed(F.cross_entropy(model(), LABELS)),
    lambda: freed(model() - Y),
])  # fmt: skip
def test_backward_inside_the_closure(closure):
    with pytest.raises(ValueError, match="has been freed; the closure must not call backward"):
        reference.linearize(closure, [W])
    assert W.grad is None


@pytest.mark.parametrize("closure", [
    lambda: F.mse_loss(model().detach(), Y),
    lambda: model().detach(),
    lambda: torch.ones(2, requires_grad=True) * 2,
    lambda: torch.ones((), requires_grad=True) ** 2,
    torch.no_grad()(lambda: F.mse_loss(model(), Y)),
])  # fmt: skip
def test_result_that_does_not_depend_on_params(closure):
    with pytest.raises(ValueError, match="does not depend on any of params; compute it"):
        reference.linearize(closure, [W])


@pytest.mark.parametrize("result, got", [
    (None, "a NoneType"), (3.0, "a float"), ((X, 1.0), "a float"), (LABELS, "a torch.int64 tensor"),
    (torch.ones(2, dtype=torch.complex64), "a torch.complex64 tensor"), ([[X]], "a list"),
])  # fmt: skip
def test_result_of_another_type(result, got):
    with pytest.raises(ValueError, match=f"returned {got}; return a real floating-point"):
        reference.linearize(lambda: result, [W])


@pytest.mark.parametrize("closure, name", [
    (lambda: F.mse_loss(model(), Y * torch.nan), "loss"),
    (lambda: F.mse_loss(model()[:0], Y[:0]), "loss"),
    (lambda: model() / 0, "loss"),
    (lambda: (model() * 0).abs().sqrt(), "Jacobian"),
])  # fmt: skip
def test_not_finite(closure, name):
    with pytest.raises(ValueError, match=f"the {name} is not finite at the present parameters"):
        reference.linearize(closure, [W])


def test_target_that_depends_on_the_parameters():
    closure = lambda: F.binary_cross_entropy_with_logits(model(), model().sigmoid())  # noqa: E731
    with pytest.raises(ValueError, match=r"target .* depends on the parameters.*detach\(\) it"):
        reference.linearize(closure, [W])


@pytest.mark.parametrize("params, message", [
    ([], "params is empty"),
    ([W, W], "same tensor twice"),
    ([W * 2], r"params\[0\] must be a floating-point leaf .*is_leaf=False"),
    ([W, torch.ones(2)], r"params\[1\] .*requires_grad=False"),
    ([W, torch.ones(2, dtype=torch.int64)], "got dtype torch.int64"),
])  # fmt: skip
def test_wrong_params(params, message):
    with pytest.raises(ValueError, match=message):
        reference.linearize(model, params)


def test_an_error_of_the_closure_reaches_the_user():
    def closure():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        reference.linearize(closure, [W])
    assert W.dtype == torch.float32
