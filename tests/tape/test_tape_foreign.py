"""Code of the user's in the backward: hooks, Functions of any name, parameters that a Function hides."""

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, TIGHT, ByNumpy, mlp, rand, relative, snapshot, unchanged
from torch.utils.checkpoint import checkpoint

import pgdfast
from pgdfast.linear import Linearizer
from pgdfast.tape import Tracer

X, Y = rand(9, 3, seed=1), rand(9, 4, seed=2)
MASK = (rand(9, 5, seed=3) > 0).double()
pytestmark = pytest.mark.filterwarnings("ignore:pgdfast. no tape rule")


def flat_gradient(loss, params):
    """Autograd's own gradient of a loss, zero where it does not reach."""
    found = torch.autograd.grad(loss, params, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(params, found, strict=True)])


def check(closure, params, backend="native"):
    """Gradient, products and Jacobian against autograd, hooks included; the linearization."""
    linearizer = Linearizer(params, backend)
    for visit in range(3):
        result = closure()
        lin = linearizer(closure)
        loss = result if result.dim() == 0 else 0.5 * result.square().sum()
        assert relative(lin.gradient(), flat_gradient(loss, params)) < 1e-12
        v, u = rand(lin.num_parameters, seed=visit), rand(lin.num_residuals, seed=visit + 9)
        J = lin.dense()
        assert relative(lin.jvp(v), J @ v) < 1e-12 and relative(lin.vjp(u), J.T @ u) < 1e-12
    return lin


# --- hooks ------------------------------------------------------------------------------------------------------------------


def detached(g):
    return 3 * g.detach()


def by_numpy(g):
    return torch.from_numpy(3 * g.detach().numpy())


HOOKS = {  # linear maps of the hidden layer's gradient, and how they are put there
    "tensor": lambda h: h.register_hook(lambda g: 3 * g),
    "mask": lambda h: h.register_hook(lambda g: g * MASK),
    "node, before": lambda h: h.grad_fn.register_prehook(lambda g: (3 * g[0],)),
    "node, after": lambda h: h.grad_fn.register_hook(lambda inputs, outputs: (3 * inputs[0],)),
    "no second derivative": lambda h: h.register_hook(detached),
    "by numpy": lambda h: h.register_hook(by_numpy),
    "two": lambda h: (h.register_hook(lambda g: 3 * g), h.register_hook(lambda g: g * MASK)),
    "no change": lambda h: h.register_hook(lambda g: None),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scalar", [True, False])
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_take_part(name, scalar, backend):
    model = mlp(3, 5, 4)
    hooked = [True]

    def closure():
        h = model[:2](X)
        if hooked[0]:
            HOOKS[name](h)
        return F.mse_loss(model[2](h), Y) if scalar else model[2](h) - Y

    lin = check(closure, list(model.parameters()), backend)
    hooked[0] = False
    plain = pgdfast.linearize(closure, model.parameters(), backend=backend)
    assert plain.kernels().name != "double-backward"   # a tape without hooks is read as ever
    assert (relative(lin.dense(), plain.dense()) < 1e-12) == (name == "no change")


def test_hooks_on_parameters_and_modules_take_part():
    model = mlp(3, 5, 4)
    params = list(model.parameters())
    closure = lambda: F.mse_loss(model(X), Y)  # noqa: E731
    plain = check(closure, params).gradient()
    for put in (
        lambda: params[0].register_hook(lambda g: 0.5 * g),
        lambda: model[1].register_full_backward_hook(lambda module, inputs, outputs: (3 * inputs[0],)),
        lambda: model[1].register_full_backward_pre_hook(lambda module, outputs: (3 * outputs[0],)),
    ):
        handle = put()
        assert relative(check(closure, params).gradient(), plain) > 0.1
        handle.remove()
        assert torch.equal(check(closure, params).gradient(), plain)


def test_a_hook_that_comes_and_goes_between_steps():
    model = mlp(3, 5, 4)
    params = list(model.parameters())
    linearizer = Linearizer(params)
    for step in range(8):
        def closure(step=step):
            h = model[:2](X)
            if step % 2:
                h.register_hook(lambda g: 3 * g)
            return F.mse_loss(model[2](h), Y)

        assert relative(linearizer(closure).gradient(), flat_gradient(closure(), params)) < 1e-12


def test_a_hook_in_an_ensemble():
    networks = pgdfast.functional_ensemble([mlp(3, 5, 4, seed=b) for b in range(2)])
    other = pgdfast.functional_ensemble([mlp(3, 5, 4, seed=b) for b in range(2)])
    handle = next(networks.parameters()).register_hook(lambda g: 0 * g)
    next(other.parameters()).requires_grad_(False)
    for net in (networks, other):
        optimizer = pgdfast.LM(net.parameters(), ensemble=2, damping=0.1)
        optimizer.step(lambda net=net: (net(X) - Y).square().mean((1, 2)))
    handle.remove()
    for p, q in zip(networks.parameters(), other.parameters(), strict=True):
        assert relative(p, q) < 1e-9


def test_retained_gradients_are_harmless():
    model = mlp(3, 5, 4)

    def closure():
        h = model[:2](X)
        h.retain_grad()
        return F.mse_loss(model[2](h), Y)

    assert check(closure, list(model.parameters())).kernels().name != "double-backward"


REFUSED_HOOKS = {  # (where, the message)
    "square": (lambda h, out, loss: h.register_hook(lambda g: g * g.abs()), "TanhBackward0.* is not linear in the gradient"),
    "clipped": (lambda h, out, loss: h.register_hook(lambda g: g.clamp(-1e-3, 1e-3)), "is not linear in the gradient"),
    "noise": (lambda h, out, loss: h.register_hook(lambda g: g + torch.randn_like(g)), "is not linear in the gradient"),
    "loss": (lambda h, out, loss: loss.register_hook(lambda g: 2 * g), "a hook .* where a least-squares step cannot follow"),
}


@pytest.mark.parametrize("name", REFUSED_HOOKS)
def test_hooks_without_a_jacobian_are_refused(name):
    put, message = REFUSED_HOOKS[name]
    model = mlp(3, 5, 4)
    params = list(model.parameters())
    before = snapshot(params)

    def closure():
        h = model[:2](X)
        out = model[2](h)
        loss = F.mse_loss(out, Y)
        put(h, out, loss)
        return loss

    with pytest.raises(ValueError, match="^pgdfast.LM: .*" + message):
        pgdfast.LM(params).step(closure)
    assert unchanged(params, before)


def test_a_hook_at_a_penalized_parameter_is_refused():
    model = mlp(3, 5, 4)
    model[0].weight.register_hook(lambda g: 2 * g)
    penalty = lambda: 0.1 * model[0].weight.square().sum()  # noqa: E731
    for closure in (lambda: F.mse_loss(model(X), Y) + penalty(), penalty):
        with pytest.raises(ValueError, match="a hook .* at a parameter with a penalty"):
            pgdfast.LM(model.parameters()).step(closure)


def test_a_hook_that_only_looks_at_the_loss_is_harmless():
    model, seen = mlp(3, 5, 4), []

    def closure():
        loss = F.mse_loss(model(X), Y)
        loss.register_hook(seen.append)
        return loss

    check(closure, list(model.parameters()))
    assert seen


def test_post_accumulate_hooks_are_refused():
    model = mlp(3, 5, 4)
    handle = model[2].weight.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(3))
    optimizer = pgdfast.LM(model.parameters())
    closure = lambda: F.mse_loss(model(X), Y)  # noqa: E731
    for _ in range(2):
        with pytest.raises(ValueError, match=r"parameter 2, of shape \(4, 5\), has a post-accumulate-grad hook"):
            optimizer.step(closure)
    handle.remove()
    optimizer.step(closure)
    assert optimizer.report.status == "accepted"


def test_hooks_at_the_node_that_accumulates_are_refused():
    """DistributedDataParallel averages gradients by them, and processes would drift apart."""
    model = mlp(3, 5, 4)
    optimizer, p = pgdfast.LM(model.parameters()), model[2].bias
    closure = lambda: F.mse_loss(model(X), Y)  # noqa: E731
    node = p.view_as(p).grad_fn.next_functions[0][0]   # alive as long as it is held
    handle = node.register_hook(lambda inputs, outputs: None)
    message = r"parameter 3, of shape \(4,\), has a hook at .*DistributedDataParallel.*model.module"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            optimizer.step(closure)
    handle.remove()
    optimizer.step(closure)
    assert optimizer.report.status == "accepted"


# --- Functions --------------------------------------------------------------------------------------------------------------


def cube(name, backward_name=None):
    """x -> x^3 as a Function of this name."""
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g

    kind = type(name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})
    if backward_name:
        kind._backward_cls.__name__ = backward_name
    return kind.apply


@pytest.mark.parametrize("names", [
    ("Tanh",), ("TanhBackward0",), ("Tanh", "TanhBackward0"), ("Square", "PowBackward0"), ("JetChain",),
    ("Any", "SumBackward0"),
], ids=lambda names: names[-1])
def test_a_function_is_not_taken_for_an_operation_of_its_name(names):
    model = mlp(3, 5, 4)
    function, plain = cube(*names), lambda x: x**3
    lin = check(lambda: F.mse_loss(function(model(X)), Y), list(model.parameters()))
    same = check(lambda: F.mse_loss(plain(model(X)), Y), list(model.parameters()))
    assert relative(lin.dense(), same.dense()) < 1e-12


def test_a_function_is_not_taken_for_a_loss_of_its_name():
    model = mlp(3, 5, 4)
    params, total = list(model.parameters()), cube("Total", "MseLossBackward0")
    closure = lambda: total(model(X).square().sum())  # noqa: E731
    lin, plain = pgdfast.linearize(closure, params), pgdfast.linearize(lambda: model(X).square().sum() ** 3, params)
    assert relative(lin.gradient(), flat_gradient(closure(), params)) < 1e-12
    assert relative(lin.dense(), plain.dense()) < 1e-12


def test_two_functions_of_one_name_in_turn():
    model = mlp(3, 5, 4)
    params = list(model.parameters())
    linearizer = Linearizer(params)
    functions = [cube("Tanh"), lambda x: cube("Tanh")(2 * x) / 8, torch.tanh]
    for step in range(6):
        closure = lambda f=functions[step % 3]: F.mse_loss(f(model(X)), Y)  # noqa: E731
        assert relative(linearizer(closure).gradient(), flat_gradient(closure(), params)) < 1e-12


class Once(ByNumpy):
    """The same, which says that it cannot be differentiated twice."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 3 * g


class Hardened(torch.autograd.Function):
    """Sign, with the identity for its derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g.clone()


@pytest.mark.parametrize("function", [ByNumpy, Once, Hardened])
def test_backward_passes_without_a_derivative_take_rows(function):
    model = mlp(3, 5, 4)
    check(lambda: F.mse_loss(model[2](function.apply(model[:2](X))), Y), list(model.parameters()))


@pytest.mark.parametrize("solver", ["cg", "lsmr"])
@pytest.mark.parametrize("form", [
    ByNumpy.apply, lambda z: F.hardsigmoid(z), lambda z: z.logcumsumexp(1), lambda z: torch.cdist(z, Y[:3]),
    lambda z: F.embedding_bag(torch.tensor([[0, 1], [2, 3]]), z),
], ids=["numpy", "hardsigmoid", "logcumsumexp", "cdist", "embedding_bag"])
def test_krylov_solvers_agree_with_dual_on_them(form, solver):
    model = mlp(3, 5, 4)
    lin = pgdfast.linearize(lambda: form(model(X)).cumsum(0), model.parameters())
    exact = pgdfast.solve(lin, 0.1, solver="dual").step
    assert relative(pgdfast.solve(lin, 0.1, solver=solver, cg=TIGHT).step, exact) < 1e-8


# --- hidden parameters ------------------------------------------------------------------------------------------------------


class Remade(torch.autograd.Function):
    """A module that runs again in the backward, where its parameters get their gradients."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.save_for_backward(x)
        ctx.module = module
        return module(x)

    @staticmethod
    def backward(ctx, g):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            ctx.module(x).backward(g)
        return x.grad, None


@pytest.mark.parametrize("learned_input", [True, False])
def test_hidden_parameters_are_named(learned_input):
    first, inner, last = mlp(3, 3), mlp(3, 5), mlp(5, 4, seed=1)
    params = [*(first.parameters() if learned_input else ()), *inner.parameters(), *last.parameters()]
    before = snapshot(params)
    optimizer = pgdfast.LM(params)
    for p in params:
        p.grad = torch.ones_like(p)
    x = first(X).detach().requires_grad_()
    for _ in range(2):
        with pytest.raises(ValueError, match="2 of .* get their gradient inside .*RemadeBackward"):
            optimizer.step(lambda: F.mse_loss(last(Remade.apply(first(X) if learned_input else x, inner)), Y))
    assert unchanged(params, before) and all(bool((p.grad == 1).all()) for p in params)


def test_checkpoints_that_hide_nothing_work():
    inner, last = mlp(3, 5), mlp(5, 4, seed=1)
    params = [*inner.parameters(), *last.parameters()]
    same = check(lambda: F.mse_loss(last(inner(X)), Y), params).gradient()
    assert relative(
        check(lambda: F.mse_loss(last(checkpoint(inner, X, use_reentrant=False)), Y), params).gradient(), same) < 1e-13
    x = X.clone().requires_grad_()
    features = mlp(3, 3).requires_grad_(False)
    check(lambda: F.mse_loss(last(inner(checkpoint(features, x, use_reentrant=True))), Y), params)


def test_an_unused_parameter_beside_a_function_is_no_fault():
    model, unused = mlp(3, 5, 4), torch.ones(2, dtype=torch.float64, requires_grad=True)
    check(lambda: F.mse_loss(cube("Cube")(model(X)), Y), [*model.parameters(), unused])


# --- what is remembered -----------------------------------------------------------------------------------------------------


def test_structures_are_forgotten_on_both_sides():
    p = rand(600).requires_grad_()
    tracer, sizes = Tracer([p]), []
    for n in [*range(1, 600), 3, 599, 3]:   # forgotten, known, known
        trace = tracer.trace(2 * p[:n].tanh())
        assert torch.equal(trace.residual, 2 * p.detach()[:n].tanh()) and trace.program.residual_shapes == [(n,)]
        sizes.append(len(tracer._walker._known))
    assert max(sizes) <= 258 and sizes[-1] < max(sizes)
