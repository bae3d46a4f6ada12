"""Taylor mode against nested autograd: values, derivatives, and gradients through both."""

import pytest
import torch
from helpers import mlp, rand, relative
from networks import NAMES, build

from pgdfast import pde
from pgdfast.pde import jets
from pgdfast.pde.nested import nested

LAPLACE, HEAT = ((1.0, 1.0),), ((0.0, 1.0),)


@pytest.fixture
def by_nested(monkeypatch):
    """Call a function with pde's derivatives by nested autograd."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(jets, "taylor", nested)
            return function()

    return call


@pytest.fixture(autouse=True)
def no_fallback(monkeypatch):
    """A network that falls back would be compared with itself."""
    monkeypatch.setattr(jets, "_announce", lambda operation: pytest.fail(f"no rule for {operation}"))


def operators(net, x, seed=3):
    mixed = torch.tensor([[1.0, 1.0], [0.3, -2.0], [0.0, 1.0]], dtype=x.dtype)
    own = rand(2, *x.shape, seed=seed, dtype=x.dtype)
    return {
        "laplacian": lambda: pde.laplacian(net, x),
        "laplacian over one": lambda: pde.laplacian(net, x, coordinates=[1]),
        "heat": lambda: pde.jet(net, x, [0, 1], order=[1, 2]),
        "hessian's diagonal": lambda: pde.jet(net, x, [0, 1]),
        "gradient": lambda: pde.jet(net, x, [1, 0], order=1),
        "one direction": lambda: pde.jet(net, x, [-1]),
        "vectors": lambda: pde.jet(net, x, mixed),
        "own vectors": lambda: pde.jet(net, x, own, order=[2, 1]),
    }


def close(a, b, bound):
    for u, v in zip(a, b, strict=True):
        assert u.shape == v.shape and u.dtype == v.dtype
        assert not u.numel() or relative(u, v) < bound


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("outputs", [1, 3])
def test_values_and_derivatives(name, outputs, by_nested):
    net, x = build(name, outputs), rand(23, 2, seed=1)
    for call in operators(net, x).values():
        close(call(), by_nested(call), 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_gradients_of_gradients(name, by_nested):
    net, x = build(name, 2), rand(11, 2, seed=1).requires_grad_()
    wanted = [*net.parameters(), x]
    for call in operators(net, x).values():

        def gradients(call=call):
            loss = sum((part * part).sum() for part in call())
            first = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
            again = sum((g * g).sum() for g in first if g is not None)
            return loss, first, torch.autograd.grad(again, wanted, allow_unused=True), torch.autograd.grad(
                sum((part * part).sum() for part in call()), wanted, allow_unused=True
            )

        fast, slow = gradients(), by_nested(gradients)
        assert relative(fast[0], slow[0]) < 1e-12
        for a, b in zip(fast[1:], slow[1:], strict=True):
            for g, h in zip(a, b, strict=True):
                if g is None or h is None:   # autograd may know a gradient to be zero, or not
                    assert (g is None or not g.any()) and (h is None or not h.any())
                else:
                    g, h = g.detach(), h.detach()
                    assert float((g - h).norm()) <= 1e-11 * (float(h.norm()) + 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_float32(name):
    net, x = build(name, 2, torch.float32), rand(40, 2, seed=1, dtype=torch.float32)
    wide, exact = build(name, 2), rand(40, 2, seed=1)
    for call, truth in zip(operators(net, x).values(), operators(wide, exact).values(), strict=True):
        close([part.double() for part in call()], truth(), 2e-4)


@pytest.mark.parametrize("points", [0, 1, 2, 97, 1031])
@pytest.mark.parametrize("width", [1, 3, 64, 257])
def test_sizes_around_blocks_and_vectors(points, width, by_nested):
    net, x = mlp(2, width, width, 2), rand(points, 2, seed=4)
    close(pde.laplacian(net, x), by_nested(lambda: pde.laplacian(net, x)), 1e-12)


@pytest.mark.parametrize("inputs", [1, 3, 5])
def test_more_coordinates(inputs, by_nested):
    net, x = mlp(inputs, 8, 8, 2), rand(13, inputs, seed=4)
    for call in (
        lambda: pde.laplacian(net, x),
        lambda: pde.jet(net, x, range(inputs), order=[1] * (inputs - 1) + [2]),
        lambda: pde.jet(net, x, range(inputs)),
    ):
        close(call(), by_nested(call), 1e-12)


def test_a_mixed_derivative_follows_from_three():
    net, x = mlp(2, 8, 1), rand(5, 2, seed=4)
    directions = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    both, first, second = pde.jet(net, x, directions).second
    for k, point in enumerate(x):
        hessian = torch.autograd.functional.hessian(lambda p: net(p)[0], point)
        assert relative((both - first - second)[k, 0] / 2, hessian[0, 1]) < 1e-12


def test_results_unpack_by_coordinate():
    net, x = mlp(2, 8, 3), rand(5, 2, seed=4)
    u, (u_t, u_x), (u_xx,) = pde.jet(net, x, [0, 1], order=[1, 2])
    assert u.shape == u_t.shape == u_x.shape == u_xx.shape == (5, 3)
    value, (a, b), lap = pde.laplacian(net, x, coordinates=[1])
    assert torch.equal(value, u) and torch.equal(a, u_t) and torch.equal(b, u_x) and relative(lap, u_xx) < 1e-14


def test_without_gradients_the_same_bits_and_no_graph():
    net, x = mlp(2, 64, 33, 1), rand(301, 2, seed=4)
    with torch.no_grad():
        plain = pde.laplacian(net, x)
    kept = pde.laplacian(net, x)
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))
    assert not any(part.requires_grad for part in plain) and all(part.requires_grad for part in kept)


def test_points_in_other_layouts():
    net, x = mlp(2, 8, 1), rand(2, 30, seed=4).T[::2]
    assert not x.is_contiguous()
    close(pde.laplacian(net, x), pde.laplacian(net, x.contiguous()), 1e-15)


def test_weights_that_are_views_or_frozen(by_nested):
    weight, x = rand(2, 6, seed=1).requires_grad_(), rand(9, 2, seed=2)
    last = rand(6, 1, seed=3)

    def net(x):
        return torch.tanh(x @ weight) @ last

    def gradient():
        return torch.autograd.grad(pde.laplacian(net, x).laplacian.square().sum(), weight)

    close(gradient(), by_nested(gradient), 1e-12)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")   # inside torch.func
def test_function_transforms_take_the_plain_form():
    net, x = mlp(2, 6, 1), rand(4, 2, seed=2)
    names = [name for name, _ in net.named_parameters()]
    values = [p.detach() for p in net.parameters()]
    tangents = [rand(*p.shape, seed=k) for k, p in enumerate(values)]

    def lap(*parameters):
        return pde.laplacian(lambda x: torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), x), x)[2]

    _, pushed = torch.func.jvp(lap, tuple(values), tuple(tangents))
    h = 1e-6
    ahead = lap(*[p + h * t for p, t in zip(values, tangents, strict=True)])
    behind = lap(*[p - h * t for p, t in zip(values, tangents, strict=True)])
    assert relative(pushed, (ahead - behind) / (2 * h)) < 1e-8


def test_adam_trains_through_it():
    torch.manual_seed(0)
    net, x = mlp(2, 16, 1), torch.rand(64, 2, dtype=torch.float64)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (pde.laplacian(net, x).laplacian + 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
