"""What stands between a closure and its tape: Functions, checkpoints, hooks, scripts, compilers."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from .corpus import case


def layered(kind, name, middle, **more):
    """A fit of head(middle(net(x))), middle: g -> (more modules, function of features (n, 8))."""
    @case(kind, name, **more)
    def make(g):
        net, head = g.net(3, 8), g.net(8, 1)
        modules, f = middle(g)
        d = g.batch(x=(g.n, 3), y=(g.n, 1))
        outputs = lambda: (head(f(net(d.x))) - d.y) * (2 / g.n) ** 0.5   # noqa: E731
        return g.problem([net, head, *modules], lambda: F.mse_loss(head(f(net(d.x))), d.y), outputs)


def plain(kind, name, f, **more):
    layered(kind, name, lambda g: ([], f), **more)


class Cube(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class OnceCube(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class NumpySine(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach().numpy()
        return torch.from_numpy(np.sin(ctx.x))

    @staticmethod
    def backward(ctx, grad):
        return torch.from_numpy(np.cos(ctx.x) * grad.detach().numpy())


class StraightThrough(Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx, grad):
        return grad


class Product(Function):
    @staticmethod
    def forward(ctx, x, W):
        ctx.save_for_backward(x, W)
        return x @ W.T

    @staticmethod
    def backward(ctx, grad):
        x, W = ctx.saved_tensors
        return grad @ W, grad.T @ x


class ReversedGradient(Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -0.5 * grad


class NewStyle(Function):
    @staticmethod
    def forward(x):
        return torch.exp(-x * x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        return -2 * x * y * grad


class ThroughModule(Function):
    """Runs a module again in its backward, as memory-saving layers do; the module's parameters are no inputs."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.module(x)
        y.backward(grad)
        return x.grad, None


def _with_function_product(g):
    p = g.values(W=(8, 8))
    return [p], lambda h: Product.apply(torch.tanh(h), p.W)


def _with_bag(g):
    bag, index = g.of(nn.EmbeddingBag(12, 8)), g.integers(12, g.n, 3)
    return [bag], lambda h: torch.tanh(h) * bag(index)


plain("custom functions", "cube", lambda h: Cube.apply(torch.tanh(h)))
plain("custom functions", "once-differentiable", lambda h: OnceCube.apply(torch.tanh(h)))
plain("custom functions", "numpy", NumpySine.apply)
plain("custom functions", "straight-through", StraightThrough.apply)
plain("custom functions", "setup-context", NewStyle.apply)
plain("custom functions", "twice", lambda h: Cube.apply(NewStyle.apply(h)))
layered("custom functions", "product-with-a-parameter", _with_function_product)

# Iterative solvers need products with J, which double backward does not reach through these.
for _label in ("cg", "lsmr"):
    _options = {"solver": _label}
    plain("custom functions", f"once-differentiable-under-{_label}", lambda h: OnceCube.apply(torch.tanh(h)), options=_options)
    plain("custom functions", f"numpy-under-{_label}", NumpySine.apply, options=_options)
    plain("custom functions", f"straight-through-under-{_label}", StraightThrough.apply, options=_options)
    plain("iterative solvers", f"hardsigmoid-under-{_label}", F.hardsigmoid, options=_options)
    plain("iterative solvers", f"logcumsumexp-under-{_label}", lambda h: h.logcumsumexp(1), options=_options)
    plain("iterative solvers", f"cdist-under-{_label}", lambda h: torch.cdist(h, torch.eye(8, dtype=h.dtype)), options=_options)
    plain("iterative solvers", f"flip-under-{_label}", lambda h: h * h.flip(0), options=_options)
    plain("iterative solvers", f"complex-under-{_label}", lambda h: torch.exp(1j * h).real, options=_options)
    layered("iterative solvers", f"bag-under-{_label}", _with_bag, options=_options)


@case("custom functions")
def in_every_residual(g):
    p = g.values(a=(8,), W=(8, 3))
    d = g.batch(x=(g.n, 3), y=(g.n,))
    return g.residuals(p, lambda: NewStyle.apply(d.x @ p.W.T) @ Cube.apply(p.a) - d.y)


@case("custom functions")
def numpy_with_many_rows(g):
    net, m = g.net(3, 8, 1), 8 * g.n
    d = g.batch(x=(m, 3), y=(m, 1))
    return g.residuals(net, lambda: NumpySine.apply(net(d.x)) - d.y)


@case("custom functions", "hidden-parameters", raises="pgdfast")
def _hidden(g):
    net, inner = g.net(3, 8, 1), g.net(8, 8)
    d = g.batch(x=(g.n, 3), y=(g.n, 1))
    return g.residuals([net, inner], lambda: net[2](ThroughModule.apply(torch.tanh(net[0](d.x)), inner)) - d.y)


# Checkpoints. The reentrant form hides the parameters that it uses; without parameters it is plain.

def _block(g):
    block = g.net(8, 8, 8)
    return [block], lambda h: checkpoint(block, torch.tanh(h), use_reentrant=False)


def _two_blocks(g):
    blocks = [g.net(8, 8) for _ in range(2)]

    def f(h):
        for block in blocks:
            h = checkpoint(lambda t, b=block: torch.tanh(b(t)), h, use_reentrant=False)
        return h

    return blocks, f


@case("checkpoints", "reentrant-with-parameters", raises="pgdfast", either=True)
def _reentrant(g):
    net, block, head = g.net(3, 8), g.net(8, 8, 8), g.net(8, 1)
    d = g.batch(x=(g.n, 3), y=(g.n, 1))
    closure = lambda: head(checkpoint(block, net(d.x), use_reentrant=True)) - d.y   # noqa: E731
    outputs = lambda: head(block(net(d.x))) - d.y   # noqa: E731
    half = lambda: 0.5 * outputs().square().sum()   # noqa: E731
    return g.problem([net, block, head], closure, outputs, plain=half)


layered("checkpoints", "non-reentrant", _block)
layered("checkpoints", "two-blocks", _two_blocks)


@case("checkpoints")
def reentrant_without_parameters(g):
    net, head = g.net(3, 8), g.net(8, 1)
    d = g.batch(x=(g.n, 3), y=(g.n, 1))
    closure = lambda: head(checkpoint(torch.tanh, net(d.x), use_reentrant=True)) - d.y   # noqa: E731
    outputs = lambda: head(torch.tanh(net(d.x))) - d.y   # noqa: E731
    return g.problem([net, head], closure, outputs, plain=lambda: 0.5 * outputs().square().sum())


# Hooks.

def _hooked(h, hook):
    h = torch.tanh(h)
    h.register_hook(hook)
    return 2 * h


plain("hooks", "scaled-gradient", lambda h: _hooked(h, lambda g: 3 * g))
plain("hooks", "observer", lambda h: _hooked(h, lambda g: None))
plain("hooks", "reversed-gradient", lambda h: ReversedGradient.apply(torch.tanh(h)))
plain("hooks", "clipped-gradient", lambda h: _hooked(h, lambda g: g.clamp(-1e-3, 1e-3)), raises="linear|clip|hook")


@case("hooks")
def gradient_mask_on_a_weight(g):
    net = g.net(3, 8, 1)
    mask = (g.uniform(8, 3) > 0.4).to(g.dtype)
    net[0].weight.register_hook(lambda grad: grad * mask)
    d = g.batch(x=(g.n, 3), y=(g.n, 1))
    return g.residuals(net, lambda: net(d.x) - d.y)


@case("hooks")
def implicit_layer(g):
    """A deep equilibrium model: the fixed point by iteration, its derivative by a hook that solves the adjoint."""
    p, head = g.values(W=(6, 6), U=(6, 3)), g.net(6, 1)
    d = g.batch(x=(g.n // 2 + 2, 3), y=(g.n // 2 + 2, 1))
    step = lambda z: torch.tanh(0.3 * z @ p.W.T + d.x @ p.U.T)   # noqa: E731

    def outputs():
        with torch.no_grad():
            z = torch.zeros(len(d.x), 6, dtype=g.dtype)
            for _ in range(80):
                z = step(z)
        z = step(z)
        z0 = z.detach().requires_grad_()
        f0 = step(z0)

        def adjoint(grad):
            found = grad
            for _ in range(80):
                found = torch.autograd.grad(f0, z0, found, retain_graph=True)[0] + grad
            return found

        z.register_hook(adjoint)
        return head(z) - d.y

    return g.residuals([p, head], outputs)


@case("hooks")
def module_forward_hook(g):
    net = g.net(3, 8, 8, 1)
    net[0].register_forward_hook(lambda module, inputs, output: 1.5 * output)
    return g.fit(net, net, g.batch(x=(g.n, 3), y=(g.n, 1)))


@case("hooks")
def module_backward_hook_that_observes(g):
    net = g.net(3, 8, 8, 1)
    net[2].register_full_backward_hook(lambda module, into, out: None)
    d = g.batch(x=(g.n, 3), y=(g.n, 1))
    return g.residuals(net, lambda: net(d.x) - d.y)


# Scripts, compilers, other ways to call modules.

@case("compiled")
def jit_script(g):
    net = torch.jit.script(g.net(3, 8, 8, 1))
    d = g.batch(x=(g.n, 3), y=(g.n, 1))
    return g.residuals(net, lambda: net(d.x) - d.y)


@case("compiled")
def jit_trace(g):
    net = g.net(3, 8, 1)
    traced = torch.jit.trace(net, g.randn(4, 3))
    d = g.batch(x=(g.n, 3), y=(g.n, 1))
    return g.residuals(traced, lambda: traced(d.x) - d.y)


def _gate(x):
    return torch.tanh(x) * torch.sigmoid(x) + x * x


layered("compiled", "scripted-function", lambda g: ([], torch.jit.script(_gate)))


@case("compiled", "torch-compiled-module")
def _compiled(g):
    net = g.net(3, 8, 1)
    compiled = torch.compile(net, backend="aot_eager")
    d = g.batch(x=(g.n, 3), y=(g.n, 1))
    outputs = lambda: net(d.x) - d.y   # noqa: E731
    return g.problem(net, lambda: compiled(d.x) - d.y, outputs)


@case("compiled")
def functional_call_of_a_module(g):
    net = g.net(3, 8, 1)
    d = g.batch(x=(g.n, 3), y=(g.n, 1))
    return g.residuals(net, lambda: functional_call(net, dict(net.named_parameters()), (d.x,)) - d.y)


@case("compiled")
def vmap_over_samples(g):
    net = g.net(3, 8, 1)
    d = g.batch(x=(g.n, 3), y=(g.n, 1))
    return g.problem(net, lambda: vmap(net)(d.x) - d.y, lambda: net(d.x) - d.y)


@case("compiled")
def ensemble_by_stacked_modules(g):
    nets = [g.net(2, 6, 1) for _ in range(3)]
    d = g.batch(x=(g.n // 3 + 2, 2), y=(g.n // 3 + 2, 1))
    base = nets[0]

    def closure():
        theta = {name: torch.stack([dict(net.named_parameters())[name] for net in nets]) for name, _ in base.named_parameters()}
        return vmap(lambda t, x: functional_call(base, t, (x,)), (0, None))(theta, d.x) - d.y

    return g.problem(nets, closure, lambda: torch.stack([net(d.x) for net in nets]) - d.y)


@case("compiled")
def deep_copied_parameters_stacked(g):
    nets = [g.net(2, 6, 1) for _ in range(3)]
    theta, _ = stack_module_state(nets)
    held = nn.ParameterDict({name.replace(".", "_"): nn.Parameter(value.detach().clone()) for name, value in theta.items()})
    named = lambda: {name: held[name.replace(".", "_")] for name in theta}   # noqa: E731
    d = g.batch(x=(g.n // 3 + 2, 2), y=(g.n // 3 + 2, 1))
    base = nets[0]
    return g.residuals(held, lambda: vmap(lambda t, x: functional_call(base, t, (x,)), (0, None))(named(), d.x) - d.y)


@case("compiled")
def parameters_as_one_vector(g):
    p = g.values(theta=(3 * 8 + 8 + 8 + 1,))
    d = g.batch(x=(g.n, 3), y=(g.n, 1))

    def outputs():
        W, b, v, c = p.theta.split([24, 8, 8, 1])
        return torch.tanh(F.linear(d.x, W.view(8, 3), b)) @ v[:, None] + c - d.y

    return g.residuals(p, outputs)
