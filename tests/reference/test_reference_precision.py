"""A float32 model is linearized in float64, and is the same model afterwards."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jacrev, jvp, vmap

from pgdfast import reference


class Net(torch.nn.Module):
    """Linear, batch norm with buffers, a cast down, a constant made on the fly."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5)
        self.last = torch.nn.Linear(5, 2)

    def forward(self, x):
        """(N, 3) -> (N, 2)."""
        h = self.norm(self.first(x).tanh())
        return self.last(h.to(x.dtype)) + torch.linspace(0, 1, 2, dtype=torch.float32)


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    net.norm.running_mean.normal_()
    return net.eval()


def make_data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 3, generator=generator), torch.randn(6, 2, generator=generator)
    return [t.to(dtype) for t in x]


@pytest.mark.parametrize("kind", ["residual", "mse", "cross_entropy"])
@pytest.mark.parametrize("training", [False, True])
def test_float32_model_equals_its_double_copy(net, kind, training):
    losses = {
        "residual": lambda m, x, y: m(x) - y,
        "mse": lambda m, x, y: F.mse_loss(m(x), y),
        "cross_entropy": lambda m, x, y: F.cross_entropy(m(x), y.softmax(1).round()),
    }
    net.train(training)
    double = copy.deepcopy(net).double()
    x, y = make_data()
    low = reference.linearize(lambda: losses[kind](net, x, y), list(net.parameters()))
    x, y = make_data(torch.float64)
    high = reference.linearize(lambda: losses[kind](double, x, y), list(double.parameters()))
    torch.testing.assert_close(low.jacobian, high.jacobian, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(low.residual, high.residual, rtol=1e-14, atol=1e-15)
    assert low.jacobian.dtype == low.residual.dtype == low.loss.dtype == torch.float64


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_bit_identical(net, fails):
    params, (x, y) = list(net.parameters()), make_data()
    F.mse_loss(net(x), y).backward()
    before = [(p.detach().clone(), p.data_ptr(), p.grad, p.grad.clone()) for p in params]
    buffers = [b.clone() for b in net.buffers()]

    def closure():
        assert params[0].dtype == torch.float64 and params[0].grad is None
        return net(x).sin().sum() if fails else net(x) - y

    if fails:
        with pytest.raises(ValueError, match="SinBackward0"):
            reference.linearize(closure, params)
    else:
        reference.linearize(closure, params)
    for p, (data, pointer, g, g_value) in zip(params, before, strict=True):
        assert p.dtype == torch.float32 and torch.equal(p, data) and p.data_ptr() == pointer
        assert p.grad is g and torch.equal(g, g_value) and p.requires_grad and p.is_leaf
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), buffers, strict=True))


def test_model_still_trains_afterwards(net):
    x, y = make_data()
    expected = torch.autograd.grad(F.mse_loss(net(x), y), list(net.parameters()))
    reference.linearize(lambda: F.mse_loss(net(x), y), list(net.parameters()))
    F.mse_loss(net(x), y).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), expected, strict=True))


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype_under_any_default(default, dtype):
    w = torch.linspace(-1, 1, 6).reshape(2, 3).to(dtype).requires_grad_()
    x = torch.linspace(0, 2, 8).reshape(4, 2).to(dtype)
    kept = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        lin = reference.linearize(lambda: torch.tanh(x @ w) + torch.ones(3), [w])
    finally:
        torch.set_default_dtype(kept)
    J = torch.autograd.functional.jacobian(lambda w: torch.tanh(x.double() @ w), w.double())
    torch.testing.assert_close(lin.jacobian, J.reshape(12, 6), rtol=1e-14, atol=1e-15)
    assert w.dtype == dtype


@pytest.mark.parametrize("cast", [
    lambda t: t.float(), lambda t: t.half(), lambda t: t.to(torch.bfloat16),
    lambda t: t.type(torch.float32), lambda t: t.to(dtype=torch.float32),
    lambda t: t.to(torch.zeros(1)), lambda t: t.sum(0, keepdim=True, dtype=torch.float32),
])  # fmt: skip
def test_casts_down_lose_nothing(cast):
    w = torch.rand(5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    lin = reference.linearize(lambda: (cast(w * w / 3),), [w])
    expected = torch.diag(2 * w.detach().double() / 3)
    expected = expected if lin.num_residuals == 5 else expected.sum(0, keepdim=True)
    torch.testing.assert_close(lin.jacobian, expected, rtol=1e-15, atol=0)


def test_random_numbers_are_those_of_the_float32_run():
    w = torch.ones(4, requires_grad=True)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    lin = reference.linearize(lambda: w * torch.rand(4), [w])
    assert torch.equal(lin.residual, expected.double())


def test_float32_collocation_points_with_nested_autograd(net):
    double = copy.deepcopy(net).double()

    def residual(model, x):
        u = model(x)[:, 0]
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return torch.autograd.grad(du[:, 0].sum(), x, create_graph=True)[0][:, 1]

    x = make_data()[0].requires_grad_()
    low = reference.linearize(lambda: residual(net, x), list(net.parameters()))
    x64 = x.detach().double().requires_grad_()
    high = reference.linearize(lambda: residual(double, x64), list(double.parameters()))
    torch.testing.assert_close(low.jacobian, high.jacobian, rtol=1e-13, atol=1e-15)
    assert low.jacobian.any() and x.grad is None


def test_points_marked_inside_the_closure():
    w, x = torch.rand(3, requires_grad=True), torch.rand(4, 3)

    def residual():
        x.requires_grad_(True)
        return torch.autograd.grad((x @ w).sin().sum(), x, create_graph=True)[0]

    lin = reference.linearize(residual, [w])
    assert lin.jacobian.any() and not x.requires_grad and x.dtype == torch.float32


def test_recurrent_module():
    torch.manual_seed(0)
    rnn, x = torch.nn.LSTM(2, 3), torch.randn(4, 1, 2)
    double = copy.deepcopy(rnn).double()
    low = reference.linearize(lambda: rnn(x)[0], list(rnn.parameters()))
    high = reference.linearize(lambda: double(x.double())[0], list(double.parameters()))
    torch.testing.assert_close(low.jacobian, high.jacobian, rtol=1e-14, atol=1e-15)


def slope(u):
    return grad(u)


def slope_of_slope(u):
    return grad(lambda q: grad(u)(q)[0])


def slope_of_directional(u):
    return grad(lambda q: jvp(u, (q,), (torch.ones_like(q),))[1])


def hessian(u):
    return jacrev(jacrev(u))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("derivative", [slope, slope_of_slope, slope_of_directional, hessian])
def test_torch_func_transforms_of_float32_points(net, derivative):
    low, double = net.last, copy.deepcopy(net.last).double()
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))

    def residual(layer, x):
        return vmap(derivative(lambda point: layer(point).sin()[0]))(x)

    high = reference.linearize(lambda: residual(double, x.double()), list(double.parameters()))
    clone = reference.linearize(lambda: residual(low, x.clone()), list(low.parameters()))
    torch.testing.assert_close(clone.jacobian, high.jacobian, rtol=1e-13, atol=1e-15)
    if derivative in (slope_of_slope, hessian):
        with pytest.raises(ValueError, match=r"nested torch.func .* hand them x.clone\(\) instead"):
            reference.linearize(lambda: residual(low, x), list(low.parameters()))
    else:
        plain = reference.linearize(lambda: residual(low, x), list(low.parameters()))
        torch.testing.assert_close(plain.jacobian, high.jacobian, rtol=1e-13, atol=1e-15)
