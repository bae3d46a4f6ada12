"""Regression by networks: every activation, and forms of networks."""

import torch
import torch.nn.functional as F
from torch import nn

from .corpus import case

ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "logsigmoid": F.logsigmoid,
    "sin": torch.sin,
    "cos": torch.cos,
    "softplus": F.softplus,
    "softplus-options": lambda x: F.softplus(x, beta=2.0, threshold=1.5),
    "elu": F.elu,
    "selu": F.selu,
    "celu": lambda x: F.celu(x, alpha=0.7),
    "leaky-relu": lambda x: F.leaky_relu(x, 0.1),
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "softsign": F.softsign,
    "softshrink": F.softshrink,
    "hardshrink": F.hardshrink,
    "tanhshrink": F.tanhshrink,
    "threshold": lambda x: F.threshold(x, 0.1, -0.2),
    "rrelu-eval": lambda x: F.rrelu(x, training=False),
    "exp-square": lambda x: torch.exp(-x * x),
    "erf": torch.erf,
    "erfc": torch.erfc,
    "atan": torch.atan,
    "asinh": torch.asinh,
    "sinc": torch.sinc,
    "snake": lambda x: x + torch.sin(2 * x) ** 2 / 2,
    "quadratic": torch.square,
    "cubic": lambda x: x**3 - x,
    "rational": lambda x: x / (1 + x.abs()),
    "root": lambda x: torch.sqrt(1 + x * x),
    "log1p-abs": lambda x: torch.log1p(x.abs()),
    "log-cosh": lambda x: torch.log(torch.cosh(x)),
    "lgamma": lambda x: torch.lgamma(2 + torch.sigmoid(x)),
    "logaddexp": lambda x: torch.logaddexp(x, -0.3 * x),
    "xlogy": lambda x: torch.xlogy(F.softplus(x), 1 + x * x),
    "square-relu": lambda x: F.relu(x) ** 2,
    "softmax-features": lambda x: torch.softmax(x, -1),
    "log-softmax-features": lambda x: torch.log_softmax(x, -1),
    "softmin-features": lambda x: F.softmin(x, -1),
    "glu": lambda x: F.glu(torch.cat([x, x.roll(1, 0).detach()], -1)),
    "swiglu": lambda x: F.silu(x[..., ::2]).repeat_interleave(2, -1) * x,
    "maxout": lambda x: x.view(*x.shape[:-1], -1, 2).amax(-1).repeat_interleave(2, -1),
    "clamp": lambda x: x.clamp(-0.7, 0.8),
    "where": lambda x: torch.where(x > 0, x, torch.expm1(x)),
    "sinh-atan": lambda x: torch.sinh(torch.atan(x)),
}


class Layer(nn.Module):
    """An activation as a layer."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def _activation(name):
    @case("activations", name)
    def make(g):
        net = g.net(3, 16, 16, 1, activation=lambda: Layer(ACTIVATIONS[name]))
        d = g.batch(x=(g.n, 3), y=(g.n, 1))
        return g.fit(net, net, d)


for _name in ACTIVATIONS:
    _activation(_name)


def regression(g, net, inputs=3, outputs=1, predict=None):
    d = g.batch(x=(g.n, inputs), y=(g.n, outputs))
    return g.fit(net, predict or net, d)


@case("networks")
def wide(g):
    return regression(g, g.net(3, 40, 40, 1))


@case("networks")
def linear(g):
    return regression(g, g.net(3, 5), 3, 5)


@case("networks")
def many_outputs(g):
    return regression(g, g.net(3, 16, 4), 3, 4)


@case("networks", dtype=torch.float32)
def float32(g):
    return regression(g, g.net(3, 24, 24, 1))


@case("networks", dtype=torch.float32)
def float32_relu(g):
    return regression(g, g.net(3, 24, 24, 2, activation=nn.ReLU), 3, 2)


@case("networks")
def prelu(g):
    return regression(g, g.net(3, 16, 16, 1, activation=nn.PReLU))


@case("networks")
def prelu_per_channel(g):
    return regression(g, g.net(3, 16, 16, 1, activation=lambda: nn.PReLU(16)))


@case("networks")
def residual_blocks(g):
    first, blocks, last = g.net(3, 12), [g.net(12, 12, 12) for _ in range(3)], g.net(12, 1)

    def predict(x):
        h = first(x)
        for block in blocks:
            h = h + torch.tanh(block(h))
        return last(h)

    return regression(g, [first, *blocks, last], predict=predict)


@case("networks")
def dense_concatenation(g):
    a, b, c = g.net(3, 8), g.net(11, 8), g.net(19, 1)

    def predict(x):
        h = torch.cat([x, torch.tanh(a(x))], -1)
        h = torch.cat([h, torch.tanh(b(h))], -1)
        return c(h)

    return regression(g, [a, b, c], predict=predict)


@case("networks")
def tied_layers(g):
    first, middle, last = g.net(3, 12), g.net(12, 12), g.net(12, 1)

    def predict(x):
        h = first(x)
        for _ in range(3):
            h = torch.tanh(middle(h))
        return last(h)

    return regression(g, [first, middle, last], predict=predict)


@case("networks")
def autoencoder_tied_transposed(g):
    p = g.values(W=(4, 8), b=(4,), c=(8,))
    d = g.batch(x=(g.n // 8 + 1, 8))
    code = lambda: torch.tanh(F.linear(d.x, p.W, p.b))   # noqa: E731
    return g.residuals(p, lambda: F.linear(code(), p.W.T, p.c) - d.x)


@case("networks")
def frozen_first_layer(g):
    net = g.net(3, 16, 16, 1)
    net[0].requires_grad_(False)
    return regression(g, net)


@case("networks")
def bilinear(g):
    layer, out = g.of(nn.Bilinear(3, 3, 12)), g.net(12, 1)
    return regression(g, [layer, out], predict=lambda x: out(torch.tanh(layer(x, x))))


@case("networks")
def siren(g):
    net = g.net(2, 16, 16, 1, activation=lambda: Layer(torch.sin))
    return regression(g, net, 2, predict=lambda x: net(5 * x))


@case("networks")
def fourier_features(g):
    B, net = g.randn(2, 8), g.net(16, 16, 1)
    return regression(g, net, 2, predict=lambda x: net(torch.cat([torch.sin(x @ B), torch.cos(x @ B)], -1)))


@case("networks")
def trained_fourier_features(g):
    p, net = g.values(B=(2, 8)), g.net(16, 16, 1)
    return regression(g, [p, net], 2, predict=lambda x: net(torch.cat([torch.sin(x @ p.B), torch.cos(x @ p.B)], -1)))


@case("networks")
def deeponet(g):
    branch, trunk, p = g.net(6, 16, 10), g.net(1, 16, 10), g.values(bias=())
    d = g.batch(u=(g.n // 10 + 1, 6), t=(10, 1), y=(g.n // 10 + 1, 10))
    return g.residuals([branch, trunk, p], lambda: branch(d.u) @ trunk(d.t).T + p.bias - d.y)


@case("networks")
def deeponet_einsum(g):
    branch, trunk = g.net(6, 16, 10), g.net(1, 16, 10)
    d = g.batch(u=(g.n // 10 + 1, 6), t=(10, 1), y=(g.n // 10 + 1, 10))
    outputs = lambda: (torch.einsum("bk,tk->bt", branch(d.u), trunk(d.t)) - d.y) * (2 / d.y.numel()) ** 0.5   # noqa: E731
    return g.problem([branch, trunk], lambda: (0.5 * outputs() ** 2).sum(), outputs)


@case("networks")
def mixture_of_experts(g):
    experts, gate = [g.net(3, 8, 1) for _ in range(3)], g.net(3, 3)

    def predict(x):
        weights = torch.softmax(gate(x), -1)
        return (weights * torch.cat([e(x) for e in experts], -1)).sum(-1, keepdim=True)

    return regression(g, [*experts, gate], predict=predict)


@case("networks")
def mixture_of_experts_top1(g):
    experts, gate = [g.net(3, 8, 1) for _ in range(3)], g.net(3, 3)

    def predict(x):
        weights = torch.softmax(gate(x), -1)
        best, which = weights.max(-1, keepdim=True)
        return best * torch.cat([e(x) for e in experts], -1).gather(-1, which)

    return regression(g, [*experts, gate], predict=predict)


@case("networks")
def hypernetwork(g):
    hyper = g.net(2, 12, 3 * 6 + 6)
    d = g.batch(z=(g.n // 8 + 1, 2), x=(g.n // 8 + 1, 8, 3), y=(g.n // 8 + 1, 8))

    def outputs():
        made = hyper(d.z)
        W, v = made[:, :18].view(-1, 3, 6), made[:, 18:]
        return torch.einsum("bni,bi->bn", torch.tanh(d.x @ W), v) - d.y

    return g.residuals(hyper, outputs)


@case("networks")
def modulated(g):
    net, film = g.net(2, 10, 1), g.net(1, 20)
    first, last = net[0], net[2]
    d = g.batch(x=(g.n, 2), c=(g.n, 1), y=(g.n, 1))

    def outputs():
        scale, shift = film(d.c).chunk(2, -1)
        return last(torch.tanh((1 + scale) * first(d.x) + shift)) - d.y

    return g.residuals([net, film], outputs)


@case("networks")
def dropout_train(g):
    net = g.of(nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1)))
    d = g.batch(x=(g.n, 3), y=(g.n, 1))
    outputs = lambda: (net(d.x) - d.y) * (2 / d.y.numel()) ** 0.5   # noqa: E731
    return g.problem(net, lambda: F.mse_loss(net(d.x), d.y), outputs)


@case("networks")
def noise_in_the_closure(g):
    net = g.net(3, 16, 1)
    d = g.batch(x=(g.n, 3), y=(g.n, 1))
    return g.residuals(net, lambda: net(d.x + 0.1 * torch.randn(d.x.shape, dtype=torch.float64)) - d.y)


@case("networks")
def changing_batch_sizes(g):
    net = g.net(3, 16, 1)
    rows = lambda: g.n // 2 + int(g.integers(g.n // 2, 1))   # noqa: E731
    d = g.batch(data=lambda: g.randn(rows(), 4))
    outputs = lambda: (net(d.data[:, :3]) - d.data[:, 3:]) * (2 / len(d.data)) ** 0.5   # noqa: E731
    return g.problem(net, lambda: ((net(d.data[:, :3]) - d.data[:, 3:]) ** 2).mean(), outputs)


@case("networks")
def minibatch_by_index(g):
    net, X, Y = g.net(3, 16, 1), g.randn(400, 3), g.randn(400, 1)
    d = g.batch(index=lambda: torch.randperm(400, generator=g.generator)[:g.n])
    return g.residuals(net, lambda: net(X[d.index]) - Y[d.index])


@case("networks")
def siamese_difference(g):
    net = g.net(3, 16, 1)
    d = g.batch(a=(g.n, 3), b=(g.n, 3), y=(g.n, 1))
    return g.residuals(net, lambda: net(d.a) - net(d.b) - d.y)


@case("networks")
def pairwise_distances(g):
    net, m = g.net(3, 12, 4), 15
    d = g.batch(x=(m, 3), D=lambda: g.uniform(m, m))
    return g.residuals(net, lambda: (lambda z: ((z[:, None] - z[None]) ** 2).sum(-1) - d.D)(net(d.x)))


@case("networks")
def cdist_distances(g):
    net, m = g.net(3, 12, 4), 12
    d = g.batch(x=(m, 3), c=(m + 2, 4), D=lambda: g.uniform(m, m + 2))
    return g.residuals(net, lambda: torch.cdist(net(d.x), d.c) - d.D)
