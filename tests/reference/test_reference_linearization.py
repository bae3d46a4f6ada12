"""Residual closures, the products of a Linearization, and parameters of every kind."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, jacrev, vmap

from pgdfast import reference


def mlp(d_in, d_out, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layers = torch.nn.Linear(d_in, 6), torch.nn.Tanh(), torch.nn.Linear(6, d_out)
    return torch.nn.Sequential(*layers).to(dtype)


def points(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def jacobian_by_func(model, f):
    """J of ``f(p)``, (M, P), by torch.func over a dictionary of parameters."""
    parts = jacrev(f)(dict(model.named_parameters()))
    shapes = zip(parts.values(), model.parameters(), strict=True)
    return torch.cat([j.reshape(-1, p.numel()) for j, p in shapes], 1).detach()


def test_residual_tensor_against_torch_func():
    model, x = mlp(2, 3), points(5, 2)
    lin = reference.linearize(lambda: model(x) - 1, list(model.parameters()))
    J = jacobian_by_func(model, lambda p: functional_call(model, p, (x,)))
    torch.testing.assert_close(lin.jacobian, J, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(lin.residual, (model(x) - 1).detach().reshape(-1))
    assert (lin.num_residuals, lin.num_parameters) == (15, J.shape[1])
    assert lin.loss.item() == pytest.approx(0.5 * (model(x) - 1).square().sum().item(), rel=1e-14)


def test_against_autograd_functional_jacobian():
    a, b = points(3).requires_grad_(), points(2, 2).requires_grad_()
    f = lambda a, b: a.outer(b.reshape(-1)).sin() + b.prod()  # noqa: E731
    lin = reference.linearize(lambda: f(a, b), [a, b])
    parts = torch.autograd.functional.jacobian(f, (a, b))
    expected = torch.cat([j.reshape(12, -1) for j in parts], 1)
    torch.testing.assert_close(lin.jacobian, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("container", [tuple, list])
def test_several_residual_tensors_are_stacked_in_order(container):
    model, x = mlp(2, 3), points(5, 2)
    params = list(model.parameters())
    scalar = lambda: model(x)[0, 0] * 2  # noqa: E731
    both = reference.linearize(lambda: container([model(x), scalar()]), params)
    first = reference.linearize(lambda: model(x), params)
    second = reference.linearize(lambda: scalar().reshape(1), params)
    assert torch.equal(both.jacobian, torch.cat([first.jacobian, second.jacobian]))
    assert torch.equal(both.residual, torch.cat([first.residual, second.residual]))


def test_products_agree_with_the_matrix():
    model, x = mlp(2, 3), points(5, 2)
    lin = reference.linearize(lambda: model(x), list(model.parameters()))
    J, v, u = lin.jacobian, points(lin.num_parameters), points(lin.num_residuals)
    torch.testing.assert_close(u @ lin.jvp(v), v @ lin.vjp(u))
    torch.testing.assert_close(lin.ggn(v), J.T @ (J @ v))
    torch.testing.assert_close(lin.gram(), J @ J.T)
    torch.testing.assert_close(lin.diagonal(), (J.T @ J).diagonal())
    assert lin.dense() is J and lin.jvp(v.float()).dtype == torch.float64


def test_pinn_residual_with_nested_autograd():
    model, x, f = mlp(2, 1), points(7, 2).requires_grad_(), points(7)

    def residual():
        u = model(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        second = [torch.autograd.grad(du[:, i].sum(), x, create_graph=True)[0] for i in (0, 1)]
        return second[0][:, 0] + second[1][:, 1] - f

    def residual_by_func(p):
        u = lambda point: functional_call(model, p, (point,))[0]  # noqa: E731
        return vmap(lambda point: jacrev(jacrev(u))(point).trace())(x.detach()) - f

    lin = reference.linearize(residual, list(model.parameters()))
    J = jacobian_by_func(model, residual_by_func)
    torch.testing.assert_close(lin.jacobian, J, rtol=1e-11, atol=1e-13)
    scalar = reference.linearize(lambda: residual().square().mean(), list(model.parameters()))
    torch.testing.assert_close(scalar.jacobian, (2 / 7) ** 0.5 * J, rtol=1e-11, atol=1e-13)


def test_pinn_residual_written_with_torch_func():
    model, x = mlp(1, 1), points(5, 1)
    slope = lambda: vmap(grad(lambda p: model(p)[0]))(x)  # noqa: E731
    lin = reference.linearize(slope, list(model.parameters()))
    J = jacobian_by_func(
        model, lambda q: vmap(grad(lambda p: functional_call(model, q, (p,))[0]))(x)
    )
    torch.testing.assert_close(lin.jacobian, J, rtol=1e-12, atol=1e-14)


def test_parameters_that_are_not_reached_have_zero_columns():
    model, unused = mlp(2, 1), points(4).requires_grad_()
    x = points(3, 2)
    lin = reference.linearize(lambda: model(x), [unused, *model.parameters()])
    assert not lin.jacobian[:, :4].any() and lin.jacobian[:, 4:].any()


def test_frozen_and_foreign_parameters_are_constants():
    model, x = mlp(2, 1), points(3, 2)
    first, *others = model.parameters()
    others[0].requires_grad_(False)
    lin = reference.linearize(lambda: model(x).square().mean(), [first])
    full = reference.linearize(lambda: model(x).square().mean(), [first, others[1]])
    assert torch.equal(lin.jacobian, full.jacobian[:, : first.numel()])
    assert lin.jacobian.shape == (3, first.numel())


def test_tied_weights_add_up():
    w, x = points(3, 3).requires_grad_(), points(4, 3)
    lin = reference.linearize(lambda: (x @ w).tanh() @ w.T, [w])
    J = torch.autograd.functional.jacobian(lambda w: (x @ w).tanh() @ w.T, w).reshape(12, 9)
    torch.testing.assert_close(lin.jacobian, J, rtol=1e-14, atol=1e-15)


def test_non_contiguous_parameter_is_laid_out_by_reshape():
    w = points(3, 2).T.requires_grad_()
    lin = reference.linearize(lambda: w.square().sum() / 2, [w])
    torch.testing.assert_close(lin.residual, w.detach().reshape(-1))
    torch.testing.assert_close(lin.jacobian, torch.eye(6).double())


@pytest.mark.parametrize("result", [
    lambda model, x: model(x[:0]),
    lambda model, x: (),
    lambda model, x: F.mse_loss(model(x[:0]), x[:0], reduction="sum"),
    lambda model, x: F.cross_entropy(model(x[:0]), x[:0].softmax(1), reduction="sum"),
])  # fmt: skip
def test_empty_residual(result):
    model, x = mlp(2, 2), points(3, 2)
    lin = reference.linearize(lambda: result(model, x), list(model.parameters()))
    assert lin.jacobian.shape == (0, lin.num_parameters) and lin.residual.shape == (0,)
    assert lin.loss == 0 and lin.gram().shape == (0, 0)


def test_works_inside_no_grad_and_repeats_bit_for_bit():
    model, x = mlp(2, 2), points(3, 2)
    closure = lambda: model(x).square().mean()  # noqa: E731
    with torch.no_grad():
        first = reference.linearize(closure, list(model.parameters()))
    second = reference.linearize(closure, iter(model.parameters()))
    assert torch.equal(first.jacobian, second.jacobian) and first.jacobian.any()
    assert not first.jacobian.requires_grad and not first.loss.requires_grad
