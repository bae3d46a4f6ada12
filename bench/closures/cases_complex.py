"""Complex numbers on the tape, in losses and as parameters; views, in-place operations, precisions, constants that change."""

import torch
import torch.nn.functional as F

from .cases_machinery import plain
from .corpus import Values, case

# Complex numbers.

def imaginary(name, outputs, **more):
    """Residuals of a network q (n, 4) and complex constants."""
    @case("complex", name, **more)
    def make(g):
        net = g.net(3, 8, 4)
        d = g.batch(x=(g.n, 3), y=(g.n,), c=lambda: torch.complex(g.randn(g.n, 4), g.randn(g.n, 4)))
        return g.residuals(net, lambda: outputs(torch.tanh(net(d.x)), d.c) - d.y)


imaginary("lazy-negative-constant", lambda q, c: (q * c.conj().imag).sum(1))
imaginary("lazy-conjugate-constant", lambda q, c: (torch.complex(q, q) * c.conj()).sum(1).real)
imaginary("view-as-complex", lambda q, c: (torch.view_as_complex(q.view(-1, 2, 2).contiguous()) * c[:, :2]).sum(1).imag)
imaginary("polar", lambda q, c: torch.polar(torch.exp(q[:, 0]), q[:, 1]).real)
imaginary("abs", lambda q, c: (q * c).sum(1).abs())
imaginary("abs-squared", lambda q, c: (q * c).sum(1).abs() ** 2)
imaginary("angle", lambda q, c: (3 + (0.1 * q * c).sum(1)).angle())
imaginary("product-of-complex", lambda q, c: (lambda z: (z * z * c[:, 0]).real)(torch.complex(q[:, 0], q[:, 1])))
imaginary("exp", lambda q, c: (torch.exp(1j * q) * c).sum(1).real)
imaginary("division", lambda q, c: (1 / (q + c + 3)).sum(1).imag)
imaginary("matmul", lambda q, c: (torch.complex(q, 2 * q) @ c[:4].T).sum(1).real)
imaginary("z-times-conj", lambda q, c: (lambda z: (z * z.conj()).real.sum(1))(torch.complex(q, q**2) + c))


def complex_loss(name, loss, weight=lambda k: 1.0):
    """weight * sum |z|^2 of z = q + i s - c."""
    @case("complex", name)
    def make(g):
        net = g.net(3, 8, 2)
        d = g.batch(x=(g.n // 2, 3), c=lambda: torch.complex(g.randn(g.n // 2), g.randn(g.n // 2)))
        z = lambda: torch.complex(*net(d.x).unbind(1)) - d.c   # noqa: E731
        return g.problem(net, lambda: loss(z()), lambda: (2 * weight(g.n // 2)) ** 0.5 * torch.view_as_real(z()))


complex_loss("loss-view-as-real", lambda z: torch.view_as_real(z).pow(2).sum())
complex_loss("loss-z-conj", lambda z: (z * z.conj()).real.sum())
complex_loss("loss-conj-z-mean", lambda z: (z.conj() * z).real.mean(), lambda k: 1 / k)
complex_loss("loss-abs-squared", lambda z: (z.abs() ** 2).mean(), lambda k: 1 / k)
complex_loss("loss-norm-squared", lambda z: torch.linalg.norm(z) ** 2)
complex_loss("loss-torch-norm-squared", lambda z: torch.norm(z) ** 2 / len(z), lambda k: 1 / k)
complex_loss("loss-vdot", lambda z: torch.vdot(z, z).real)
complex_loss("loss-parts", lambda z: (z.real**2 + z.imag**2).mean(), lambda k: 1 / k)


@case("complex")
def complex_residuals(g):
    net = g.net(3, 8, 2)
    d = g.batch(x=(g.n // 2, 3), c=lambda: torch.complex(g.randn(g.n // 2), g.randn(g.n // 2)))
    z = lambda: torch.complex(*net(d.x).unbind(1)) - d.c   # noqa: E731
    return g.problem(net, lambda: torch.view_as_real(z()), z)


def _complex_parameter(g, *shape):
    return 0.5 * torch.complex(g.randn(*shape), g.randn(*shape))


@case("complex")
def complex_parameters(g):
    p = Values(w=_complex_parameter(g, 4, 3), v=_complex_parameter(g, 4))
    d = g.batch(x=(g.n, 3), y=(g.n,))
    return g.residuals(p, lambda: (torch.tanh(d.x.to(g.complex) @ p.w.T) @ p.v).real - d.y)


@case("complex")
def complex_parameters_linear(g):
    p, net = Values(w=_complex_parameter(g, 4, 3)), g.net(8, 1)
    d = g.batch(x=lambda: torch.complex(g.randn(g.n, 3), g.randn(g.n, 3)), y=(g.n, 1))
    return g.residuals([p, net], lambda: net(torch.tanh(torch.view_as_real(d.x @ p.w.T).flatten(1))) - d.y)


@case("complex")
def complex_poles(g):
    p = Values(poles=_complex_parameter(g, 3), residues=_complex_parameter(g, 3))
    d = g.batch(s=lambda: g.uniform(g.n, low=1, high=3), y=(g.n, 2))
    return g.residuals(p, lambda: torch.view_as_real((p.residues / (1j * d.s[:, None] - p.poles)).sum(1)) - d.y)


@case("complex")
def fourier_layer_with_complex_weights(g):
    lift, head, p = g.net(1, 3), g.net(3, 1), Values(W=_complex_parameter(g, 3, 3, 3))
    d = g.batch(x=(4, 12, 1), y=(4, 12, 1))

    def outputs():
        modes = torch.fft.rfft(lift(d.x), dim=1)[:, :3]
        mixed = torch.einsum("bki,iok->bko", modes, p.W)
        return head(torch.tanh(torch.fft.irfft(F.pad(mixed, (0, 0, 0, 4)), n=12, dim=1))) - d.y

    return g.residuals([lift, head, p], outputs)


# Views, in-place operations, precisions, constants that change.

plain("in place", "tanh-in-place", lambda h: (2 * h).tanh_() * 1.0)
plain("in place", "add-in-place", lambda h: torch.sin(h).add_(0.3))
plain("in place", "mul-on-a-slice", lambda h: _scaled_slice(torch.tanh(h)))
plain("in place", "relu-in-place", lambda h: F.relu(h, inplace=True))
plain("in place", "chained-views", lambda h: torch.tanh(h).t().contiguous().t().unflatten(1, (2, 4)).flatten(1))
plain("in place", "detached-branch", lambda h: torch.tanh(h) + torch.sin(h.detach()))
plain("in place", "no-grad-branch", lambda h: torch.tanh(h) * _without_grad(h))
plain("in place", "clone-and-fill", lambda h: _filled(torch.tanh(h)))
plain("in place", "double-in-the-middle", lambda h: torch.tanh(h.double()).to(h.dtype), dtype=torch.float32)


def _scaled_slice(t):
    t = 1.0 * t
    t[:, 2:5].mul_(0.5)
    return t


def _without_grad(h):
    with torch.no_grad():
        return h.abs() + 1


def _filled(t):
    t = t.clone()
    t[:, 3].fill_(0.2)
    t[0] = 0.1
    return t


@case("in place")
def float32_network_float64_loss(g):
    net = g.net(3, 8, 1).double()
    d = g.batch(x=(g.n, 3), y=(g.n, 1))
    return g.residuals(net, lambda: (net(d.x.double()) - d.y.double()))


@case("in place", dtype=torch.float32)
def float32_with_a_float64_loss(g):
    net = g.net(3, 8, 1)
    d = g.batch(x=(g.n, 3), y=(g.n, 1))
    outputs = lambda: (net(d.x) - d.y).double() * (2 / g.n) ** 0.5   # noqa: E731
    return g.problem(net, lambda: ((net(d.x) - d.y).double() ** 2).mean(), outputs)


@case("in place")
def constant_that_changes_at_every_call(g):
    """Weights that the closure updates from its residuals, in place, as residual-based attention does."""
    net, w = g.net(3, 8, 1), torch.ones(g.n, 1, dtype=g.dtype)
    d = g.batch(x=(g.n, 3), y=(g.n, 1))

    def closure():
        r = net(d.x) - d.y
        w.copy_(1 + r.detach().abs())
        return (w * r**2).mean()

    def outputs():
        r = net(d.x) - d.y
        return r * (2 * (1 + r.detach().abs()) / g.n).sqrt()

    return g.problem(net, closure, outputs)


@case("in place")
def buffer_updated_by_the_module(g):
    net = g.net(3, 8, 1)
    net.register_buffer("seen", torch.zeros((), dtype=g.dtype))
    d = g.batch(x=(g.n, 3), y=(g.n, 1))

    def outputs():
        net.seen.add_(0)
        return (net(d.x) - d.y) * (1 + net.seen)

    return g.residuals(net, outputs)
