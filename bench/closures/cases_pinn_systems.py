"""Physics-informed closures, continued: unknown quantities, systems, constraints, activations, energies."""

import math

import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jacrev

from .cases_pinn import free, heat, heat_at, laplace, mean, mean_at, of_point, points, poisson_at, slope, source
from .corpus import case


def inverse(name, of):
    """Heat with an unknown quantity k, written as a function of a parameter."""
    @case("pinn", f"inverse-{name}")
    def make(g):
        net, p, d = g.net(2, 16, 16, 1), g.values(k=0.4), points(g, 2)
        at = heat_at(net, lambda: of(p.k)), ("x",)
        return g.residuals([net, p], lambda: (heat(net, d.x, of(p.k)), net(d.b)[:, 0] - d.b[:, 0]),
                           samples=(at, (lambda x: net(x[None])[0] - x[:1], ("b",))))


inverse("plain", lambda k: k)
inverse("exp", torch.exp)
inverse("softplus", F.softplus)
inverse("square", lambda k: k**2)
inverse("one-minus", lambda k: 1 - k)
inverse("sigmoid-range", lambda k: 0.1 + 0.5 * torch.sigmoid(k))


@case("pinn")
def inverse_field(g):
    net, coefficient, d = g.net(2, 12, 1), g.net(2, 8, 1), points(g, 2)

    def outputs():
        x = free(d.x)
        flux = torch.exp(coefficient(x)) * slope(net(x), x)
        return sum(slope(flux[:, i], x)[:, i] for i in range(2)) + 1

    return g.residuals([net, coefficient], outputs)


def navier_stokes(net, x):
    x = free(x)
    u, v, p = net(x).unbind(1)
    du, dv, dp = slope(u, x), slope(v, x), slope(p, x)
    lap = lambda w: sum(slope(w[:, i], x)[:, i] for i in range(2))   # noqa: E731
    return (u * du[:, 0] + v * du[:, 1] + dp[:, 0] - 0.1 * lap(du), u * dv[:, 0] + v * dv[:, 1] + dp[:, 1] - 0.1 * lap(dv),
            du[:, 0] + dv[:, 1])


def navier_stokes_at(net):
    def at(x):
        u = lambda x: net(x[None])[0]   # noqa: E731
        value, J, H = u(x), jacrev(u)(x), hessian(u)(x)
        momentum = J[:2] @ value[:2] + J[2] - 0.1 * torch.stack([torch.trace(H[0]), torch.trace(H[1])])
        return torch.cat([momentum, (J[0, 0] + J[1, 1])[None]])

    return at


@case("pinn")
def navier_stokes_tuple(g):
    net, d = g.net(2, 16, 3), points(g, 2, max(g.n // 4, 8))
    return g.residuals(net, lambda: navier_stokes(net, d.x), samples=((navier_stokes_at(net), ("x",)),))


@case("pinn")
def navier_stokes_joined(g):
    net, d = g.net(2, 16, 3), points(g, 2, max(g.n // 4, 8))
    return g.residuals(net, lambda: torch.stack(navier_stokes(net, d.x), 1), samples=((navier_stokes_at(net), ("x",)),))


@case("pinn")
def navier_stokes_three_means(g):
    net, d = g.net(2, 16, 3), points(g, 2, max(g.n // 4, 8))
    return g.problem(net, lambda: sum((r**2).mean() for r in navier_stokes(net, d.x)),
                     lambda: tuple(map(mean, navier_stokes(net, d.x))),
                     samples=((mean_at(navier_stokes_at(net), d.x), ("x",)),))


@case("pinn")
def three_mean_squares_on_one_pass(g):
    net, d = g.net(2, 16, 16, 3), points(g, 2, y=lambda: g.randn(max(g.n // 2, 10), 3))
    errors, roots = lambda: (net(d.x) - d.y).unbind(1), g.number([1, 2, 0.5])   # noqa: E731
    return g.problem(net, lambda: sum(w * (r**2).mean() for w, r in zip((1, 2, 0.5), errors(), strict=True)),
                     lambda: tuple(w**0.5 * mean(r) for w, r in zip((1, 2, 0.5), errors(), strict=True)),
                     samples=((lambda x, y: (net(x[None])[0] - y) * (2 * roots / len(d.x)) ** 0.5, ("x", "y")),))


@case("pinn")
def tuple_over_the_same_points(g):
    net, d = g.net(2, 16, 16, 3), points(g, 2)
    return g.residuals(net, lambda: tuple(net(d.x).unbind(1)), samples=((lambda x: net(x[None])[0], ("x",)),))


@case("pinn")
def ode_with_initial_conditions(g):
    net = g.net(1, 16, 16, 1)
    d = g.batch(x=lambda: g.uniform(g.n // 2, 1))

    def outputs():
        t = free(d.x)
        u = net(t)
        u_t = slope(u, t)
        zero = torch.zeros(1, 1, dtype=g.dtype, requires_grad=True)
        start = net(zero)
        return slope(u_t, t) + u, start - 1, slope(start, zero)

    return g.residuals(net, outputs)


@case("pinn")
def hard_constraint(g):
    net, d = g.net(2, 16, 16, 1), points(g, 2)
    u = lambda x: torch.sin(x[:, :1]) + (1 - x[:, :1] ** 2) * (1 - x[:, 1:] ** 2) * net(x)   # noqa: E731
    at = lambda x: torch.trace(hessian(lambda p: u(p[None])[0, 0])(x))   # noqa: E731
    return g.residuals(net, lambda: laplace(u, d.x), samples=((at, ("x",)),))


@case("pinn")
def periodic_embedding(g):
    net, d = g.net(3, 16, 16, 1), points(g, 2)
    u = lambda x: net(torch.cat([torch.sin(math.pi * x[:, :1]), torch.cos(math.pi * x[:, :1]), x[:, 1:]], 1))   # noqa: E731
    at = lambda x: torch.trace(hessian(lambda p: u(p[None])[0, 0])(x))   # noqa: E731
    return g.residuals(net, lambda: laplace(u, d.x), samples=((at, ("x",)),))


@case("pinn")
def periodic_boundary(g):
    net, d = g.net(2, 16, 16, 1), points(g, 2)
    left = lambda: torch.cat([-torch.ones_like(d.b[:, :1]), d.b[:, 1:]], 1)   # noqa: E731
    right = lambda: torch.cat([torch.ones_like(d.b[:, :1]), d.b[:, 1:]], 1)   # noqa: E731

    def outputs():
        a, b = free(left()), free(right())
        u, v = net(a), net(b)
        return laplace(net, d.x), u - v, slope(u, a)[:, 0] - slope(v, b)[:, 0]

    return g.residuals(net, outputs)


@case("pinn")
def neumann_boundary(g):
    net, d = g.net(2, 16, 16, 1), points(g, 2)
    return g.residuals(net, lambda: (laplace(net, d.x), (lambda b: slope(net(b), b)[:, 0])(free(d.b))))


@case("pinn")
def gradient_enhanced(g):
    net, d = g.net(2, 16, 1), points(g, 2, max(g.n // 4, 8))

    def outputs():
        x = free(d.x)
        first = slope(net(x), x)
        r = sum(slope(first[:, i], x)[:, i] for i in range(2)) + source(x)
        return r, 0.1 * slope(r, x)

    return g.residuals(net, outputs)


@case("pinn")
def adaptive_activation(g):
    layers, p, d = [g.net(2, 16), g.net(16, 1)], g.values(a=(16,)), points(g, 2)
    net = lambda x: layers[1](torch.tanh(p.a * layers[0](x)))   # noqa: E731
    at = lambda x: torch.trace(hessian(lambda q: net(q[None])[0, 0])(x))   # noqa: E731
    return g.residuals([*layers, p], lambda: laplace(net, d.x), samples=((at, ("x",)),))


@case("pinn")
def domain_decomposition_windows(g):
    nets = [g.net(1, 8, 1) for _ in range(3)]
    d = g.batch(x=lambda: g.uniform(g.n // 2, 1, low=-1))
    centers = torch.tensor([-1.0, 0.0, 1.0], dtype=g.dtype)

    def u(x):
        windows = torch.softmax(-4 * (x - centers) ** 2, 1)
        return sum(windows[:, k:k + 1] * net(x - centers[k]) for k, net in enumerate(nets))

    def outputs():
        x = free(d.x)
        return slope(u(x), x) - torch.cos(3 * x)

    return g.residuals(nets, outputs)


def activated(name, activation):
    @case("pinn", f"poisson-{name}")
    def make(g):
        net, d = g.net(2, 16, 16, 1, activation=activation), points(g, 2)
        return g.residuals(net, lambda: laplace(net, d.x) + source(d.x), samples=((poisson_at(net), ("x",)),))


for _name, _module in {"gelu": torch.nn.GELU, "silu": torch.nn.SiLU, "softplus": torch.nn.Softplus, "sigmoid": torch.nn.Sigmoid,
                       "mish": torch.nn.Mish, "hardswish": torch.nn.Hardswish, "celu": torch.nn.CELU}.items():
    activated(_name, _module)


@case("pinn")
def fourth_order_beam(g):
    net = g.net(1, 12, 1)
    d = g.batch(x=lambda: g.uniform(max(g.n // 4, 8), 1))

    def outputs():
        x = free(d.x)
        y = net(x)
        for _ in range(4):
            y = slope(y, x)
        return y - 1

    return g.residuals(net, outputs)


@case("pinn")
def schroedinger_real_and_imaginary(g):
    net, d = g.net(2, 16, 2), points(g, 2)

    def outputs():
        x = free(d.x)
        u, v = net(x).unbind(1)
        du, dv = slope(u, x), slope(v, x)
        square = u**2 + v**2
        return (du[:, 1] + 0.5 * slope(dv[:, 0], x)[:, 0] + square * v, dv[:, 1] - 0.5 * slope(du[:, 0], x)[:, 0] - square * u)

    return g.residuals(net, outputs)


@case("pinn")
def eigenvalue_problem(g):
    net, p, d = g.net(1, 16, 1), g.values(k=1.2), g.batch(x=lambda: g.uniform(g.n // 2, 1))
    u = lambda x: x * (1 - x) * net(x)   # noqa: E731
    return g.residuals([net, p], lambda: (laplace(u, d.x) + p.k**2 * u(d.x)[:, 0], (u(d.x) ** 2).mean()[None] - 1))


@case("pinn")
def coupling_row(g):
    net, d = g.net(2, 16, 16, 1), points(g, 2)
    return g.residuals(net, lambda: (net(d.x)[:, 0] - source(d.x), net(d.x).mean()[None]))


@case("pinn")
def hamiltonian(g):
    net = g.net(2, 16, 1)
    d = g.batch(x=(max(g.n // 2, 8), 2), v=(max(g.n // 2, 8), 2))
    J = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=g.dtype)
    at = lambda x, v: grad(of_point(net))(x) @ J.T - v   # noqa: E731
    return g.residuals(net, lambda: (lambda x: slope(net(x), x) @ J.T)(free(d.x)) - d.v, samples=((at, ("x", "v")),))


@case("pinn")
def energy_and_forces(g):
    net, m = g.net(1, 12, 1), max(g.n // 10, 4)
    d = g.batch(r=(m, 4, 3), E=(m,), F=(m, 4, 3))
    i, j = torch.triu_indices(4, 4, 1)

    def outputs():
        r = free(d.r)
        distances = (r[:, i] - r[:, j]).square().sum(-1, keepdim=True)
        energy = net(distances).sum((1, 2))
        return energy - d.E, -slope(energy, r) - d.F

    return g.residuals(net, outputs)


@case("pinn")
def least_squares_on_a_grid(g):
    net, m = g.net(2, 12, 1), 10
    grid = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, m, dtype=g.dtype)] * 2, indexing="ij"), -1)
    d = g.batch(f=(m - 2, m - 2))

    def outputs():
        u = net(grid)[..., 0]
        inner = u[1:-1, 1:-1]
        return 0.1 * (4 * inner - u[:-2, 1:-1] - u[2:, 1:-1] - u[1:-1, :-2] - u[1:-1, 2:]) * m**2 - d.f

    return g.residuals(net, outputs)
