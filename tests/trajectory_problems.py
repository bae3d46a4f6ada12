"""The problems whose trajectories `trajectories.py` records: small forms of every task and of what closures do.

`PROBLEMS` and `ENSEMBLES`: {name: function(dtype) -> (parameters or groups, closure(step))}. pgdfast's public names only.
"""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import pgdfast

PROBLEMS = {}


def problem(make):
    PROBLEMS[make.__name__] = make
    return make


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mlp(*widths, dtype, activation=nn.Tanh, seed=0):
    layers = []
    for k, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        layer = nn.Linear(a, b, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(rand(b, a, seed=100 * seed + 2 * k) / a**0.5)
            layer.bias.copy_(0.3 * rand(b, seed=100 * seed + 2 * k + 1))
        layers += [layer, activation()]
    return nn.Sequential(*layers[:-1])


def leaves(*shapes, dtype, size=0.5):
    return [(size * rand(*shape, seed=k + 1, dtype=dtype)).requires_grad_() for k, shape in enumerate(shapes)]


def waves(dtype, count=30):
    x = torch.linspace(-1, 1, count, dtype=dtype)[:, None]
    return x, torch.sin(5 * x)


@problem
def A(dtype):
    net, (x, y) = mlp(1, 16, 16, 1, dtype=dtype), waves(dtype)
    return net.parameters(), lambda step: F.mse_loss(net(x), y)


@problem
def A_residuals(dtype):
    net, (x, y) = mlp(1, 12, 1, dtype=dtype), waves(dtype, 50)
    return net.parameters(), lambda step: net(x) - y


@problem
def B(dtype):
    net, x = mlp(2, 14, 14, 1, dtype=dtype), rand(60, 2, seed=3, dtype=dtype)
    y = torch.sin(2 * x[:, :1]) * torch.cos(x[:, 1:])
    return net.parameters(), lambda step: (net(x) - y).square().mean()


def poisson(dtype, lap, *hidden):
    net, x = mlp(2, *hidden, 1, dtype=dtype), torch.rand(40, 2, generator=torch.Generator().manual_seed(1)).to(dtype)
    edge = torch.cat([x[:12].round(), x[12:20]])
    source = -2 * torch.pi**2 * torch.sin(torch.pi * x).prod(1, keepdim=True)
    return net.parameters(), lambda step: F.mse_loss(lap(net, x), source) + 3 * F.mse_loss(net(edge), edge[:, :1] * 0)


def nested_laplacian(net, x):
    x = x.clone().requires_grad_()
    slope, = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return sum(torch.autograd.grad(slope[:, k].sum(), x, create_graph=True)[0][:, k] for k in range(2))[:, None]


@problem
def C_nested(dtype):
    return poisson(dtype, nested_laplacian, 18)


@problem
def C_laplacian(dtype):
    return poisson(dtype, lambda net, x: pgdfast.pde.laplacian(net, x).laplacian, 18)


@problem
def C_deep(dtype):
    return poisson(dtype, lambda net, x: pgdfast.pde.laplacian(net, x).laplacian, 10, 8)


@problem
def D(dtype):
    first, second = leaves((20, 14), (7, 20), dtype=dtype)
    a, b = torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij")
    x = torch.cat([F.one_hot(a.reshape(-1), 7), F.one_hot(b.reshape(-1), 7)], 1)[::2].to(dtype)
    y = F.one_hot((a + b).reshape(-1) % 7, 7)[::2].to(dtype)
    return [first, second], lambda step: F.mse_loss(((x @ first.T) ** 2) @ second.T / 20, y)


@problem
def E(dtype):
    w, = leaves((30, 8), dtype=dtype)
    x = rand(45, 8, seed=9, dtype=dtype)
    y = (x @ rand(8, 2, seed=10, dtype=dtype)).square().sum(1)
    return [w], lambda step: 0.5 * ((x @ w.T).square().mean(1) - y).square().mean()


class Block(nn.Module):
    def __init__(self, dtype, vocabulary=7, width=8, dropout=0.0):
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.norm = nn.Embedding(vocabulary, width, dtype=dtype), nn.LayerNorm(width, dtype=dtype)
        self.qkv, self.out = nn.Linear(width, 3 * width, dtype=dtype), nn.Linear(width, width, dtype=dtype)
        self.up, self.down = nn.Linear(width, 12, dtype=dtype), nn.Linear(12, vocabulary, dtype=dtype)
        self.dropout = dropout

    def forward(self, ids):
        h = self.embed(ids)
        n, t, d = h.shape
        q, k, v = (s.view(n, t, 2, d // 2).transpose(1, 2) for s in self.qkv(self.norm(h)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, d)
        h = h + F.dropout(self.out(mixed), self.dropout)
        return self.down(F.gelu(self.up(h)))


@problem
def transformer(dtype):
    net, ids = Block(dtype), torch.randint(0, 7, (6, 5), generator=torch.Generator().manual_seed(4))
    return net.parameters(), lambda step: F.cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def digits(dtype):
    net, x = mlp(20, 10, 4, dtype=dtype, activation=nn.ReLU), rand(50, 20, seed=5, dtype=dtype)
    return net, x, torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(6))


@problem
def G_entropy(dtype):
    net, x, labels = digits(dtype)
    return net.parameters(), lambda step: F.cross_entropy(net(x), labels)


@problem
def G_squares(dtype):
    net, x, labels = digits(dtype)
    return net.parameters(), lambda step: F.mse_loss(net(x), F.one_hot(labels, 4).to(dtype))


@problem
def logistic(dtype):
    net, x, labels = digits(dtype)
    y = (F.one_hot(labels, 4)).to(dtype)
    return net.parameters(), lambda step: F.binary_cross_entropy_with_logits(net(x), y) + 1e-3 * net[0].weight.square().sum()


@problem
def curve(dtype):
    p = torch.tensor([1.0, 0.5, 0.2], dtype=dtype).requires_grad_()
    t = torch.linspace(0, 3, 40, dtype=dtype)
    y = 2.5 * torch.exp(-1.3 * t) + 0.5 + 0.01 * rand(40, seed=8, dtype=dtype)
    return [p], lambda step: p[0] * torch.exp(-p[1] * t) + p[2] - y


@problem
def rosenbrock(dtype):
    p, q = (torch.tensor([v], dtype=dtype).requires_grad_() for v in (-1.2, 1.0))
    return [p, q], lambda step: (10 * (q - p**2), 1 - p)


@problem
def logarithm(dtype):   # trial points where the residual is not a number
    p = torch.full((2,), 0.1, dtype=dtype).requires_grad_()
    return [p], lambda step: torch.log(p) - torch.tensor([4.0, -3.0], dtype=dtype)


@problem
def heat(dtype):
    net, x = mlp(2, 10, 10, 1, dtype=dtype), torch.rand(35, 2, generator=torch.Generator().manual_seed(2)).to(dtype)
    k = torch.tensor(0.3, dtype=dtype).requires_grad_()

    def closure(step):
        u, (u_t, _), (u_xx,) = pgdfast.pde.jet(net, x, [0, 1], order=[1, 2])
        return u_t - k * u_xx, u[:10] - torch.sin(x[:10, 1:])

    return [*net.parameters(), k], closure


@problem
def burgers(dtype):
    net, x = mlp(2, 12, 1, dtype=dtype), torch.rand(30, 2, generator=torch.Generator().manual_seed(3)).to(dtype)

    def closure(step):
        p = x.clone().requires_grad_()
        u = net(p)
        du, = torch.autograd.grad(u.sum(), p, create_graph=True)
        curved, = torch.autograd.grad(du[:, 1].sum(), p, create_graph=True)
        return (du[:, :1] + u * du[:, 1:] - 0.1 * curved[:, 1:]).square().mean() + u[:8].square().mean()

    return net.parameters(), closure


@problem
def penalty(dtype):
    net, (x, y) = mlp(1, 10, 10, 1, dtype=dtype), waves(dtype)
    return net.parameters(), lambda step: F.mse_loss(net(x), y) + 1e-3 * sum(p.square().sum() for p in net.parameters())


@problem
def tied(dtype):
    w, b = leaves((3, 6), (6,), dtype=dtype)
    x = rand(20, 6, seed=7, dtype=dtype)
    return [w, b], lambda step: F.mse_loss(torch.tanh(x @ w.T) @ w + b, x)


@problem
def frozen(dtype):
    net, (x, y) = mlp(1, 10, 10, 1, dtype=dtype), waves(dtype)
    net[0].requires_grad_(False)
    unused = torch.ones(2, dtype=dtype, requires_grad=True)
    return [*net.parameters(), unused], lambda step: F.mse_loss(net(x), y)


@problem
def groups(dtype):
    net, (x, y) = mlp(1, 10, 10, 1, dtype=dtype), waves(dtype)
    parts = [{"params": [*net[0].parameters()], "lr": 0.5}, {"params": [*net[2].parameters()], "weight_decay": 1e-3},
             {"params": [*net[4].parameters()], "lr": 0.8, "weight_decay": 1e-2}]
    return parts, lambda step: F.mse_loss(net(x), y)


@problem
def fallback_conv(dtype):
    w, b = leaves((3, 1, 5), (3,), dtype=dtype)
    x = rand(6, 1, 12, seed=11, dtype=dtype)
    return [w, b], lambda step: torch.tanh(F.conv1d(x, w, b)).sum(1) - x[:, 0, :8]


@problem
def fallback_products(dtype):
    net, x = mlp(2, 8, 3, dtype=dtype), rand(15, 2, seed=12, dtype=dtype)
    return net.parameters(), lambda step: (net(x).prod(1) - x[:, 0]).square().mean() + net(x).cumsum(1)[:, -1].square().mean()


@problem
def mixed_rows(dtype):   # residuals of a batch that do not separate by sample
    net, x = mlp(2, 8, 1, dtype=dtype), rand(20, 2, seed=13, dtype=dtype)
    return net.parameters(), lambda step: (net(x) - net(x).mean() - x[:, :1] * x[:, 1:]).square().mean()


@problem
def batches(dtype):
    net, x = mlp(2, 12, 1, dtype=dtype), rand(120, 2, seed=14, dtype=dtype)
    y = torch.sin(2 * x[:, :1]) + x[:, 1:]

    def closure(step):
        size = (20, 20, 15)[step % 3]
        return F.mse_loss(net(x[10 * step:10 * step + size]), y[10 * step:10 * step + size])

    return net.parameters(), closure


@problem
def dropout(dtype):
    net, ids = Block(dtype, dropout=0.2), torch.randint(0, 7, (4, 4), generator=torch.Generator().manual_seed(4))
    return net.parameters(), lambda step: F.cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@problem
def fresh_points(dtype):
    net = mlp(1, 12, 1, dtype=dtype)

    def closure(step):
        x = torch.rand(25, 1, dtype=dtype)
        return net(x) - torch.sin(4 * x) * (1 + 0.01 * random.random()) + 0.01 * float(np.random.rand())

    return net.parameters(), closure


# --- ensembles: every parameter stacked -------------------------------------------------------------------------------------

def networks_of(dtype, count):
    return pgdfast.functional_ensemble([mlp(1, 8, 8, 1, dtype=dtype, seed=b) for b in range(count)])


def ensemble(dtype, count=3):
    networks, (x, y) = networks_of(dtype, count), waves(dtype, 20)
    return networks.parameters(), lambda step: (networks(x) - y).square().mean((1, 2))


def ensemble_residuals(dtype, count=3):
    networks, (x, y) = networks_of(dtype, count), waves(dtype, 20)
    return networks.parameters(), lambda step: networks(x) - y


def ensemble_mixed(dtype, count=3):
    networks, (x, y) = networks_of(dtype, count), waves(dtype, 20)

    def loss(network):
        u = network(x)
        return (u - u.mean() - y).square().mean()

    return networks.parameters(), lambda step: networks.map(loss)


def ensemble_by_hand(dtype, count=3):
    w, b, v = leaves((count, 1, 9), (count, 1, 9), (count, 9, 2), dtype=dtype)
    x, labels = waves(dtype, 20)[0], torch.arange(20) % 2

    def closure(step):
        out = torch.tanh(torch.baddbmm(b, x.expand(count, 20, 1), w)) @ v
        return torch.stack([F.cross_entropy(out[k], labels) for k in range(count)])

    return [w, b, v], closure


def ensemble_fallback(dtype, count=3):
    w, v = leaves((count, 1, 4), (count, 4, 1), dtype=dtype)
    x, y = waves(dtype, 12)
    return [w, v], lambda step: ((torch.tanh(x @ w) @ v).cumsum(1) - y).square().mean((1, 2))


ENSEMBLES = {"": ensemble, "_residuals": ensemble_residuals, "_mixed": ensemble_mixed, "_by_hand": ensemble_by_hand,
             "_fallback": ensemble_fallback}
