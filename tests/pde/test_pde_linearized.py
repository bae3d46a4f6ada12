"""Taylor mode on LM's tape: its Jacobian, products, Gram matrix and steps are those of nested autograd."""

import copy

import pytest
import torch
from helpers import BACKENDS, SOLVERS, TIGHT, flat, mlp, rand, relative
from networks import NAMES, build

import pgdfast
from pgdfast import pde
from pgdfast.linear import Linearizer
from pgdfast.pde import jets
from pgdfast.pde.nested import nested


def burgers(net, x):
    u, (u_t, u_x), (u_xx,) = pde.jet(net, x, [0, 1], order=[1, 2])
    return u_t + u * u_x - 0.1 * u_xx


def residuals(net, x, boundary):
    return {
        "laplacian": lambda: pde.laplacian(net, x)[2],
        "burgers": lambda: burgers(net, x),
        "boundary too": lambda: (pde.laplacian(net, x)[2] + 1.0, 3.0 * net(boundary)),
        "the value alone": lambda: pde.laplacian(net, x)[0],
        "a mean of squares": lambda: burgers(net, x).square().mean(),
        "all of it": lambda: tuple(part.squeeze(0) for part in pde.jet(net, x, torch.ones(1, 2, dtype=x.dtype))),
    }


def by_nested(monkeypatch, function):
    with monkeypatch.context() as patch:
        patch.setattr(jets, "taylor", nested)
        return function()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["laplacian", "burgers", "boundary too", "the value alone", "a mean of squares", "all of it"])
def test_linearization(name, kind, monkeypatch):
    net, x, boundary = build(name), rand(17, 2, seed=1), rand(5, 2, seed=2)
    params, closure = list(net.parameters()), residuals(net, x, boundary)[kind]
    fast = pgdfast.linearize(closure, params)
    J = by_nested(monkeypatch, lambda: pgdfast.linearize(closure, params)).dense()
    assert fast.kernels().fused, "the tape was not read"
    v, u = rand(fast.num_parameters, seed=3), rand(fast.num_residuals, seed=4)
    assert relative(fast.dense(), J) < 1e-12
    assert relative(fast.jvp(v), J @ v) < 1e-11 and relative(fast.vjp(u), J.T @ u) < 1e-11
    assert relative(fast.gram(), J @ J.T) < 1e-11 and relative(fast.diagonal(), J.square().sum(0)) < 1e-11
    assert fast.tapeless


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_agree_with_the_reference(backend, solver):
    net, x, boundary = mlp(2, 12, 7, 1), rand(15, 2, seed=1), rand(6, 2, seed=2)
    twin = copy.deepcopy(net)
    steps = []
    for model, choice in ((net, backend), (twin, "reference")):
        before = flat(model.parameters())
        options = {} if choice == "reference" else {"solver": solver, "cg": TIGHT}
        opt = pgdfast.LM(model.parameters(), damping=0.5, damping_rule="constant", backend=choice, **options)
        opt.step(residuals(model, x, boundary)["boundary too"])
        steps.append(flat(model.parameters()) - before)
    assert relative(*steps) < 1e-8


def test_rows_and_their_order_are_those_of_the_points():
    net, x = mlp(2, 8, 8, 1), rand(40, 2, seed=1)
    lin = pgdfast.linearize(lambda: burgers(net, x), list(net.parameters()))
    assert lin.row_layout() is not None and lin.row_layout().num_rows == 40 and lin.row_layout().max_outputs == 1
    assert set(lin.kernels().rows_of_parts) == {40}, "the sweeps cannot be cut by points"


def test_a_weight_has_one_use_for_each_channel_that_reaches_a_residual():
    net, x = mlp(2, 8, 8, 1), rand(40, 2, seed=1)
    lin = pgdfast.linearize(lambda: pde.laplacian(net, x)[2], list(net.parameters()))
    uses = {}
    for _, parameter, *_ in lin.row_layout().uses:
        uses[parameter] = uses.get(parameter, 0) + 1
    # inputs: a value and two directions; hidden: four channels; the last layer hands on its Laplacian alone.
    assert [uses.get(k, 0) for k in (0, 2, 4)] == [3, 4, 1] and 5 not in uses


def test_trials_without_a_tape_and_steps_that_fall():
    torch.manual_seed(0)
    net, x = mlp(2, 20, 1), torch.rand(60, 2, dtype=torch.float64)
    edge = torch.tensor([[0.0, 0.5], [1.0, 0.5], [0.5, 0.0], [0.5, 1.0]], dtype=torch.float64)
    opt = pgdfast.LM(net.parameters())
    losses = [float(opt.step(lambda: (pde.laplacian(net, x)[2] + 1.0, net(edge)))) for _ in range(15)]
    assert all(b <= a for a, b in zip(losses, losses[1:], strict=False)) and losses[-1] < 1e-2 * losses[0]


def test_a_tape_read_again_takes_the_new_values():
    net, x = mlp(2, 9, 1), rand(12, 2, seed=1)
    params = list(net.parameters())
    linearizer = Linearizer(params)
    for step in range(4):   # from the third on the core reads what it can by itself
        with torch.no_grad():
            params[0].add_(0.1 * rand(*params[0].shape, seed=step))
        lin = linearizer(lambda: burgers(net, x))
        fresh = pgdfast.linearize(lambda: burgers(net, x), params)
        v = rand(lin.num_parameters, seed=step)
        assert torch.equal(lin.residual, fresh.residual) and torch.equal(lin.jvp(v), fresh.jvp(v))
