"""Curve fits, and constants that are computed from parameters alone."""

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

from .corpus import Values, case


def curve(name, model, **starts):
    """A fit of model(parameters, t) to points (t, y)."""
    @case("curve fits", name)
    def make(g):
        p, m = g.values(**starts), max(g.n, 24)
        d = g.batch(x=lambda: g.uniform(m, low=0.1, high=2), y=(m,))
        at = lambda x, y: model(p, x) - y   # noqa: E731
        return g.residuals(p, lambda: model(p, d.x) - d.y, samples=((at, ("x", "y")),))


curve("exponential", lambda p, t: p.a * torch.exp(-p.k * t), a=1.2, k=0.7)
curve("two-exponentials", lambda p, t: p.a * torch.exp(-p.k * t) + p.b * torch.exp(-p.l * t) + p.c,
      a=1.2, k=0.7, b=0.4, l=2.1, c=0.1)
curve("lorentzian", lambda p, t: p.a / (1 + ((t - p.m) / p.w) ** 2), a=1.5, m=0.9, w=0.4)
curve("three-lorentzians", lambda p, t: (p.a / (1 + ((t[..., None] - p.m) / p.w) ** 2)).sum(-1),
      a=[1.0, 0.5, 2.0], m=[0.5, 1.0, 1.5], w=[0.3, 0.2, 0.4])
curve("gaussians-log-width", lambda p, t: (p.a * torch.exp(-0.5 * ((t[..., None] - p.m) / torch.exp(p.s)) ** 2)).sum(-1),
      a=[1.0, 0.5], m=[0.5, 1.5], s=[-1.0, -0.5])
curve("power-law", lambda p, t: p.a * t**p.b, a=1.2, b=0.6)
curve("power-law-in-logs", lambda p, t: torch.exp(p.a + p.b * torch.log(t)), a=0.2, b=0.6)
curve("logistic", lambda p, t: p.a / (1 + torch.exp(-p.k * (t - p.m))), a=1.2, k=2.0, m=0.8)
curve("michaelis-menten", lambda p, t: p.v * t / (p.k + t), v=1.5, k=0.6)
curve("hill-pow", lambda p, t: t**p.h / (p.k**p.h + t**p.h), h=1.7, k=0.8)
curve("damped-sine", lambda p, t: p.a * torch.exp(-p.g * t) * torch.sin(p.w * t + p.f), a=1.1, g=0.3, w=4.0, f=0.2)
curve("fourier-series", lambda p, t: (p.a * torch.cos(p.w * t[..., None] * torch.arange(3))).sum(-1), a=[0.5, 1.0, 0.3], w=2.0)
curve("polynomial", lambda p, t: sum(p.c[k] * t**k for k in range(4)), c=[0.1, -0.3, 0.5, 0.2])
curve("polynomial-stacked", lambda p, t: torch.stack([t**k for k in range(4)], -1) @ p.c, c=[0.1, -0.3, 0.5, 0.2])
curve("rational", lambda p, t: (p.a + p.b * t) / (1 + p.c * t + p.d * t**2), a=0.2, b=1.0, c=0.5, d=0.3)
curve("one-vector-of-parameters", lambda p, t: p.q[0] * torch.exp(-p.q[1] * t) + p.q[2], q=[1.2, 0.7, 0.1])
curve("unbound-vector", lambda p, t: (lambda a, k, c: a * torch.exp(-k * t) + c)(*p.q.unbind()), q=[1.2, 0.7, 0.1])
curve("softplus-rate", lambda p, t: F.softplus(p.a) * torch.exp(-F.softplus(p.k) * t), a=0.5, k=0.3)
curve("sigmoid-bounded", lambda p, t: 2 * torch.sigmoid(p.a) * torch.exp(-(0.1 + 3 * torch.sigmoid(p.k)) * t), a=0.5, k=0.3)
curve("voigt-like", lambda p, t: torch.sigmoid(p.e) / (1 + ((t - p.m) / p.w) ** 2)
      + (1 - torch.sigmoid(p.e)) * torch.exp(-((t - p.m) / p.w) ** 2), e=0.2, m=0.9, w=0.5)
curve("piecewise", lambda p, t: torch.where(t < 1, p.a * t, p.a + p.b * (t - 1)), a=0.8, b=-0.5)
curve("arrhenius", lambda p, t: torch.exp(p.a - p.b / t), a=0.3, b=0.4)
curve("atan-step", lambda p, t: p.a * torch.atan(p.k * (t - p.m)), a=0.8, k=3.0, m=1.1)
curve("airy-of-angles", lambda p, t: torch.sinc(p.k * t) ** 2 * p.a, a=1.2, k=0.7)
curve("bessel", lambda p, t: p.a * torch.special.i0e(p.k * t), a=1.2, k=0.7)


@case("curve fits")
def ellipse_through_points(g):
    p = g.values(c=[0.1, -0.2], log_axes=[0.3, -0.1], angle=0.4)
    d = g.batch(x=(g.n, 2))

    def outputs():
        c, s = torch.cos(p.angle), torch.sin(p.angle)
        R = torch.stack([torch.stack([c, -s]), torch.stack([s, c])])
        return (((d.x - p.c) @ R / torch.exp(p.log_axes)) ** 2).sum(1) - 1

    return g.residuals(p, outputs)


@case("curve fits")
def trilateration(g):
    p, anchors = g.values(x=[0.3, -0.2, 0.5]), g.randn(g.n, 3)
    d = g.batch(r=lambda: g.uniform(g.n, low=1, high=2))
    return g.residuals(p, lambda: (p.x - anchors).norm(dim=1) - d.r)


@case("curve fits")
def per_series_offsets(g):
    p, m = g.values(a=(6,), b=()), g.n
    d = g.batch(t=(m,), which=lambda: g.integers(6, m), y=(m,))
    return g.residuals(p, lambda: p.a[d.which] + p.b * d.t - d.y)


@case("curve fits")
def matrix_factorization(g):
    p = g.values(U=(10, 3), V=(12, 3))
    d = g.batch(X=(10, 12))
    return g.residuals(p, lambda: p.U @ p.V.T - d.X)


@case("curve fits")
def masked_matrix_factorization(g):
    p = g.values(U=(10, 3), V=(12, 3))
    d = g.batch(X=(10, 12), i=lambda: g.integers(10, 40), j=lambda: g.integers(12, 40))
    return g.residuals(p, lambda: (p.U[d.i] * p.V[d.j]).sum(1) - d.X[d.i, d.j])


@case("curve fits")
def nonnegative_matrix_factorization(g):
    p = g.values(U=(10, 3), V=(12, 3))
    d = g.batch(X=lambda: g.uniform(10, 12))
    return g.residuals(p, lambda: F.softplus(p.U) @ F.softplus(p.V).T - d.X)


# Weights of a network that are computed from parameters.

def weights(name, made, **shapes):
    """A network x -> v . tanh(W x) whose W (12, 3) is made from parameters."""
    @case("computed weights", name)
    def make(g):
        p = g.values(**(shapes or {"W": (12, 3)}), v=(1, 12))
        constants = Values(mask=(g.uniform(12, 3) > 0.3).to(g.dtype), base=g.randn(12, 3)).requires_grad_(False)
        d = g.batch(x=(g.n, 3), y=(g.n, 1))
        return g.fit(p, lambda x: F.linear(torch.tanh(F.linear(x, made(p, constants))), p.v), d)


weights("softplus", lambda p, c: F.softplus(p.W))
weights("mask", lambda p, c: p.W * c.mask)
weights("scaled", lambda p, c: 0.1 * p.W)
weights("exp", lambda p, c: torch.exp(p.W))
weights("square", lambda p, c: p.W**2)
weights("lora", lambda p, c: c.base + 0.5 * p.A @ p.B, A=(12, 2), B=(2, 3))
weights("low-rank", lambda p, c: p.A @ p.B, A=(12, 2), B=(2, 3))
weights("dora", lambda p, c: p.m * F.normalize(c.base + p.A @ p.B, dim=1), A=(12, 2), B=(2, 3), m=(12, 1))
weights("plus-and-minus", lambda p, c: torch.cat([p.W, -p.W]), W=(6, 3))
weights("symmetric", lambda p, c: torch.cat([p.S + p.S.T] * 4), S=(3, 3))
weights("normalized-rows", lambda p, c: F.normalize(p.W, dim=1))
weights("normalized-by-norm", lambda p, c: p.W / p.W.norm(dim=1, keepdim=True))
weights("standardized", lambda p, c: (p.W - p.W.mean(1, keepdim=True)) / p.W.std(1, keepdim=True))
weights("softmax", lambda p, c: torch.softmax(p.W, 1))
weights("kronecker", lambda p, c: torch.kron(p.A, p.B), A=(4, 1), B=(3, 3))
weights("circulant", lambda p, c: torch.stack([p.w.roll(k) for k in range(12)])[:, :3], w=(12,))
weights("shared-by-index", lambda p, c: p.w[torch.arange(36).view(12, 3) % 7], w=(7,))
weights("averaged", lambda p, c: 0.7 * p.A + 0.3 * p.B, A=(12, 3), B=(12, 3))
weights("rotation-of-inputs", lambda p, c: c.base @ torch.matrix_exp(p.S - p.S.T), S=(3, 3))
weights("binary-straight-through", lambda p, c: p.W + (torch.sign(p.W) - p.W).detach())
weights("quantized-straight-through", lambda p, c: p.W + (torch.round(4 * p.W) / 4 - p.W).detach())


@case("computed weights")
def parametrized_module(g):
    net = g.net(3, 12, 1)

    class Positive(torch.nn.Module):
        def forward(self, W):
            return F.softplus(W)

    parametrize.register_parametrization(net[0], "weight", Positive())
    return g.fit(net, net, g.batch(x=(g.n, 3), y=(g.n, 1)))


@case("computed weights")
def rbf_with_scale(g):
    p, c = g.values(s=0.3, w=(10,)), g.randn(10, 2)
    d = g.batch(x=(g.n, 2), y=(g.n,))
    return g.residuals(p, lambda: torch.exp(-torch.exp(p.s) * ((d.x[:, None] - c) ** 2).sum(-1)) @ p.w - d.y)


@case("computed weights")
def monotone_network(g):
    p = g.values(W=(12, 1), b=(12,), V=(1, 12))
    d = g.batch(x=(g.n, 1), y=(g.n, 1))
    return g.fit(p, lambda x: torch.tanh(x @ torch.exp(p.W).T + p.b) @ F.softplus(p.V).T, d)


@case("computed weights")
def input_convex_network(g):
    p = g.values(A=(12, 2), b=(12,), Z=(1, 12), B=(1, 2))
    d = g.batch(x=(g.n, 2), y=(g.n, 1))
    return g.fit(p, lambda x: F.softplus(x @ p.A.T + p.b) @ F.softplus(p.Z).T + x @ p.B.T, d)


@case("computed weights")
def temperature(g):
    net, p = g.net(3, 12, 4), g.values(t=0.3)
    d = g.batch(x=(g.n, 3), y=lambda: g.integers(4, g.n))
    return g.problem([net, p], lambda: F.cross_entropy(net(d.x) * torch.exp(p.t), d.y), lambda: net(d.x) * torch.exp(p.t),
                     lambda z: F.cross_entropy(z, d.y))
