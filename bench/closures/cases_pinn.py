"""Physics-informed closures: derivatives of a network with respect to its inputs, in every way of writing them."""

import math

import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import pgdfast

from .corpus import case


def slope(y, x):
    """dy/dx by autograd, with its graph."""
    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


def free(x):
    return x.clone().requires_grad_()


def mean(r):
    return r * (2 / r.numel()) ** 0.5


def mean_at(f, x):
    """f of one point, so that its squares over all points sum to twice their mean."""
    return lambda point: (2 / len(x)) ** 0.5 * f(point)


def points(g, dims, m=None, **more):
    m = m or max(g.n // 2, 10)
    return g.batch(x=lambda: g.uniform(m, dims, low=-1), b=lambda: g.uniform(m // 4 + 1, dims, low=-1), **more)


def of_point(net):
    """u(x) as a function of one point."""
    return lambda x: net(x[None])[0, 0]


def poisson_at(net):
    return lambda x: torch.trace(hessian(of_point(net))(x)) + torch.sin(math.pi * x[0])


def source(x):
    return torch.sin(math.pi * x[:, 0])


def laplace(net, x):
    """The Laplacian by nested autograd."""
    x = free(x)
    first = slope(net(x), x)
    return sum(slope(first[:, i], x)[:, i] for i in range(x.shape[1]))


@case("pinn")
def poisson_residuals(g):
    net, d = g.net(2, 16, 16, 1), points(g, 2)
    return g.residuals(net, lambda: laplace(net, d.x) + source(d.x), samples=((poisson_at(net), ("x",)),))


@case("pinn")
def poisson_loss_with_boundary(g):
    net, d = g.net(2, 16, 16, 1), points(g, 2)
    closure = lambda: ((laplace(net, d.x) + source(d.x)) ** 2).mean() + 10 * (net(d.b) ** 2).mean()   # noqa: E731
    outputs = lambda: (mean(laplace(net, d.x) + source(d.x)), mean(10**0.5 * net(d.b)))   # noqa: E731
    samples = (mean_at(poisson_at(net), d.x), ("x",)), (mean_at(lambda x: 10**0.5 * net(x[None])[0], d.b), ("b",))
    return g.problem(net, closure, outputs, samples=samples)


@case("pinn")
def poisson_by_pde_laplacian(g):
    net, d = g.net(2, 16, 16, 1), points(g, 2)
    closure = lambda: pgdfast.pde.laplacian(net, d.x).laplacian[:, 0] + source(d.x)   # noqa: E731
    return g.problem(net, closure, lambda: laplace(net, d.x) + source(d.x), samples=((poisson_at(net), ("x",)),))


@case("pinn", dtype=torch.float32)
def poisson_float32(g):
    net, d = g.net(2, 16, 16, 1), points(g, 2)
    closure = lambda: ((laplace(net, d.x) + source(d.x)) ** 2).mean()   # noqa: E731
    return g.problem(net, closure, lambda: mean(laplace(net, d.x) + source(d.x)),
                     samples=((mean_at(poisson_at(net), d.x), ("x",)),))


def functional(name, write):
    """Poisson's residuals by torch.func: write(net, theta, x) -> (n,)."""
    @case("pinn by torch.func", name)
    def make(g):
        net, d = g.net(2, 16, 16, 1), points(g, 2)
        return g.problem(net, lambda: write(net, dict(net.named_parameters()), d.x) + source(d.x),
                         lambda: laplace(net, d.x) + source(d.x), samples=((poisson_at(net), ("x",)),))


def _u(net, theta):
    return lambda x: functional_call(net, theta, (x[None],))[0, 0]


def _directional(net, x):
    found = 0.0
    for i in range(2):
        e = torch.zeros_like(x)
        e[:, i] = 1
        found = found + jvp(lambda y, e=e: jvp(net, (y,), (e,))[1], (x,), (e,))[1][:, 0]
    return found


functional("vmap-hessian", lambda net, t, x: vmap(lambda p: torch.trace(hessian(_u(net, t))(p)))(x))
functional("vmap-hessian-captured", lambda net, t, x: vmap(lambda p: torch.trace(hessian(of_point(net))(p)))(x))
functional("vmap-jacrev-jacrev", lambda net, t, x: vmap(lambda p: torch.trace(jacrev(jacrev(_u(net, t)))(p)))(x))
functional("vmap-jacfwd-jacfwd", lambda net, t, x: vmap(lambda p: torch.trace(jacfwd(jacfwd(_u(net, t)))(p)))(x))
functional("vmap-jacrev-grad", lambda net, t, x: vmap(lambda p: torch.trace(jacrev(grad(_u(net, t)))(p)))(x))
functional("jvp-of-jvp", lambda net, t, x: _directional(net, x))
functional("jvp-of-grad", lambda net, t, x: vmap(lambda p: sum(
    jvp(grad(_u(net, t)), (p,), (e,))[1] @ e for e in torch.eye(2, dtype=x.dtype)))(x))
functional("nested-grad", lambda net, t, x: vmap(lambda p: sum(
    grad(lambda q, i=i: grad(_u(net, t))(q)[i])(p)[i] for i in range(2)))(x))


@case("pinn by torch.func")
def heat_with_jvp(g):
    net, d = g.net(2, 16, 16, 1), points(g, 2)

    def closure():
        e = torch.zeros_like(d.x)
        e[:, 1] = 1
        u_t = jvp(net, (d.x,), (e,))[1]
        x = free(d.x)
        u_xx = slope(slope(net(x), x)[:, 0], x)[:, 0]
        return u_t[:, 0] - 0.1 * u_xx

    return g.problem(net, closure, lambda: heat(net, d.x, 0.1))


def heat(net, x, k):
    x = free(x)
    first = slope(net(x), x)
    return first[:, 1] - k * slope(first[:, 0], x)[:, 0]


def heat_at(net, k=lambda: 0.1):
    return lambda x: grad(of_point(net))(x)[1] - k() * hessian(of_point(net))(x)[0, 0]


@case("pinn")
def heat_tuple_of_residuals(g):
    net, d = g.net(2, 16, 16, 1), points(g, 2)
    return g.residuals(net, lambda: (heat(net, d.x, 0.1), net(d.b) - torch.sin(d.b[:, :1])),
                       samples=((heat_at(net), ("x",)), (lambda x: net(x[None])[0] - torch.sin(x[:1]), ("b",))))


def burgers(net, x, nu):
    x = free(x)
    u = net(x)
    first = slope(u, x)
    return first[:, 1] + u[:, 0] * first[:, 0] - nu * slope(first[:, 0], x)[:, 0]


@case("pinn")
def burgers_equation(g):
    net, d = g.net(2, 16, 16, 1), points(g, 2)

    def at(x):
        u, first = of_point(net)(x), grad(of_point(net))(x)
        return first[1] + u * first[0] - 0.05 * hessian(of_point(net))(x)[0, 0]

    return g.residuals(net, lambda: burgers(net, d.x, 0.05), samples=((at, ("x",)),))


@case("pinn")
def burgers_split_columns(g):
    net, d = g.net(2, 16, 16, 1), points(g, 2)

    def closure():
        x, t = free(d.x[:, :1]), free(d.x[:, 1:])
        u = net(torch.cat([x, t], 1))
        u_x, u_t = slope(u, x), slope(u, t)
        return u_t + u * u_x - 0.05 * slope(u_x, x)

    return g.problem(net, closure, lambda: burgers(net, d.x, 0.05))


@case("pinn")
def burgers_unknown_viscosity(g):
    net, p, d = g.net(2, 16, 16, 1), g.values(nu=0.3), points(g, 2)
    return g.residuals([net, p], lambda: burgers(net, d.x, p.nu))
