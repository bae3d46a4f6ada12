"""Convolutions, pooling, normalizing layers, attention and embeddings."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from .corpus import case


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def _shuffled(x):
    return x.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)


# Convolutions: images or signals in, one number per image out.

def convolution(name, layers, shape, flat):
    """A network of layers over images of a shape, then a linear layer from `flat` numbers to 2."""
    @case("convolutions", name)
    def make(g):
        net = g.of(nn.Sequential(*layers(), nn.Flatten(), nn.Linear(flat, 2)))
        m = max(g.n // 4, 6)
        return g.fit(net, net, g.batch(x=(m, *shape), y=(m, 2)))


convolution("conv1d", lambda: [nn.Conv1d(2, 4, 3), nn.Tanh()], (2, 10), 32)
convolution("conv1d-padding-stride", lambda: [nn.Conv1d(2, 4, 3, 2, 1), nn.Tanh(), nn.Conv1d(4, 3, 3, padding=1)], (2, 10), 15)
convolution("conv1d-dilated", lambda: [nn.Conv1d(2, 4, 3, dilation=2), nn.Tanh()], (2, 10), 24)
convolution("conv1d-circular", lambda: [nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular"), nn.Tanh()], (2, 10), 40)
convolution("conv1d-causal", lambda: [nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(2, 4, 3), nn.Tanh()], (2, 8), 32)
convolution("conv2d", lambda: [nn.Conv2d(1, 3, 3), nn.Tanh()], (1, 6, 6), 48)
convolution("conv2d-same-relu", lambda: [nn.Conv2d(1, 3, 3, padding="same"), nn.ReLU(), nn.Conv2d(3, 2, 3, stride=2)],
            (1, 6, 6), 8)
convolution("conv2d-groups", lambda: [nn.Conv2d(4, 4, 3, groups=2), nn.Tanh()], (4, 5, 5), 36)
convolution("conv2d-depthwise-separable", lambda: [nn.Conv2d(3, 3, 3, groups=3), nn.Tanh(), nn.Conv2d(3, 4, 1)], (3, 5, 5), 36)
convolution("conv2d-without-bias", lambda: [nn.Conv2d(1, 3, 3, bias=False), nn.SiLU()], (1, 5, 5), 27)
convolution("conv3d", lambda: [nn.Conv3d(1, 2, 2), nn.Tanh()], (1, 3, 4, 4), 36)
convolution("conv-transpose-1d", lambda: [nn.ConvTranspose1d(2, 3, 3, 2), nn.Tanh()], (2, 4), 27)
convolution("conv-transpose-2d", lambda: [nn.ConvTranspose2d(2, 2, 2, 2), nn.Tanh()], (2, 3, 3), 72)
convolution("max-pool", lambda: [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2)], (1, 6, 6), 12)
convolution("avg-pool", lambda: [nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AvgPool2d(2)], (1, 6, 6), 12)
convolution("adaptive-avg-pool", lambda: [nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1)], (1, 6, 6), 3)
convolution("adaptive-max-pool", lambda: [nn.Conv1d(2, 3, 3), nn.Tanh(), nn.AdaptiveMaxPool1d(2)], (2, 10), 6)
convolution("global-mean-of-conv1d", lambda: [nn.Conv1d(2, 6, 3), nn.Tanh(), Layer(lambda x: x.mean(-1))], (2, 10), 6)
convolution("lp-pool", lambda: [nn.Conv1d(2, 3, 3), nn.Tanh(), nn.LPPool1d(2, 2)], (2, 10), 12)
convolution("upsample-nearest", lambda: [nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Upsample(scale_factor=2)], (1, 5, 5), 72)
convolution("upsample-bilinear", lambda: [nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Upsample(scale_factor=2, mode="bilinear")],
            (1, 4, 4), 32)
convolution("pixel-shuffle", lambda: [nn.Conv2d(1, 4, 3), nn.Tanh(), nn.PixelShuffle(2)], (1, 5, 5), 36)
convolution("unfold", lambda: [nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Unfold(2)], (1, 4, 4), 32)
convolution("conv-batch-norm", lambda: [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU()], (1, 5, 5), 27)
convolution("channel-shuffle", lambda: [nn.Conv1d(2, 4, 3), nn.Tanh(), Layer(_shuffled), nn.Conv1d(4, 2, 1, groups=2)],
            (2, 8), 12)


@case("convolutions")
def u_net(g):
    down, up, out = g.of(nn.Conv1d(1, 4, 3, 2, 1)), g.of(nn.ConvTranspose1d(4, 4, 2, 2)), g.of(nn.Conv1d(5, 1, 3, padding=1))
    d = g.batch(x=(max(g.n // 16, 3), 1, 8), y=(max(g.n // 16, 3), 1, 8))
    return g.fit([down, up, out], lambda x: out(torch.cat([x, torch.tanh(up(torch.tanh(down(x))))], -2)), d)


@case("convolutions")
def weights_by_functional_conv(g):
    p, m = g.values(K=(3, 2, 3), b=(3,)), max(g.n // 8, 4)
    d = g.batch(x=(m, 2, 6), y=(m, 3, 4))
    return g.fit(p, lambda x: torch.tanh(F.conv1d(x, 0.5 * p.K, p.b)), d)


@case("convolutions")
def grid_sample(g):
    net, image = g.net(2, 8, 2), g.randn(1, 2, 5, 5)
    m = max(g.n // 8, 4)
    d = g.batch(x=lambda: g.uniform(m, 2, low=-0.8, high=0.8), y=(m, 2))

    def outputs():
        at = d.x + 0.1 * torch.tanh(net(d.x))
        return F.grid_sample(image, at[None, None], align_corners=True)[0, :, 0].T - d.y

    return g.residuals(net, outputs)


# Norms.

def normed(name, layer, train=True, shape=(), **more):
    """A network with a normalizing layer after its first layer."""
    @case("norms", name, **more)
    def make(g):
        net = g.of(nn.Sequential(nn.Linear(3, 8), layer(), nn.Tanh(), nn.Linear(8, 1)))
        m = g.n if not shape else max(g.n // 4, 6)
        d = g.batch(x=(m, *shape, 3), y=(m, *shape, 1))
        if not train:
            net(d.x)
            net.eval()
        return g.fit(net, net, d)


def _of_channels(module):
    """The norm over channels that stand last, of sequences."""
    return lambda: nn.Sequential(Layer(lambda x: x.transpose(1, 2)), module(), Layer(lambda x: x.transpose(1, 2)))


normed("batch-norm-train", lambda: nn.BatchNorm1d(8))
normed("batch-norm-eval", lambda: nn.BatchNorm1d(8), train=False)
normed("batch-norm-no-affine", lambda: nn.BatchNorm1d(8, affine=False))
normed("batch-norm-no-running-stats", lambda: nn.BatchNorm1d(8, track_running_stats=False))
normed("batch-norm-float32", lambda: nn.BatchNorm1d(8), dtype=torch.float32)
normed("batch-norm-sequences", _of_channels(lambda: nn.BatchNorm1d(8)), shape=(4,))
normed("layer-norm", lambda: nn.LayerNorm(8))
normed("layer-norm-no-affine", lambda: nn.LayerNorm(8, elementwise_affine=False))
normed("group-norm", lambda: nn.GroupNorm(2, 8))
normed("rms-norm", lambda: nn.RMSNorm(8))
normed("instance-norm", _of_channels(lambda: nn.InstanceNorm1d(8, affine=True)), shape=(4,))
normed("local-response-norm", _of_channels(lambda: nn.LocalResponseNorm(2)), shape=(4,))
normed("rms-by-hand", lambda: Layer(lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)))
normed("layer-norm-by-hand", lambda: Layer(lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt()))
normed("batch-norm-by-hand", lambda: Layer(lambda x: (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()))
normed("l2-normalized", lambda: Layer(lambda x: F.normalize(x, dim=-1)))
normed("divided-by-norm", lambda: Layer(lambda x: x / x.norm(dim=-1, keepdim=True)))
normed("softmax-temperature", lambda: Layer(lambda x: torch.softmax(3 * x, -1)))


def reparametrized(name, wrap):
    @case("norms", name)
    def make(g):
        net = nn.Sequential(wrap(nn.Linear(3, 8)), nn.Tanh(), wrap(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 1))
        net = g.of(net)
        return g.fit(net, net, g.batch(x=(g.n, 3), y=(g.n, 1)))


reparametrized("weight-norm", parametrizations.weight_norm)
reparametrized("weight-norm-old", torch.nn.utils.weight_norm)
reparametrized("spectral-norm", lambda layer: parametrizations.spectral_norm(layer).eval())
reparametrized("orthogonal-exp", lambda layer: parametrizations.orthogonal(layer, orthogonal_map="matrix_exp"))
reparametrized("orthogonal-cayley", lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley"))
reparametrized("orthogonal-householder", lambda layer: parametrizations.orthogonal(layer, orthogonal_map="householder"))


# Attention and embeddings.

def transformer(name, layer, **more):
    """A sequence model over (m, 5, 8), and a readout."""
    @case("attention", name, **more)
    def make(g):
        body, head = g.of(layer()), g.net(8, 1)
        m = max(g.n // 5, 4)
        return g.fit([body, head], lambda x: head(body(x)), g.batch(x=(m, 5, 8), y=(m, 5, 1)))


class Attention(nn.Module):
    def __init__(self, attend, heads=2):
        super().__init__()
        self.inputs, self.heads, self.attend = nn.Linear(8, 24), heads, attend

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for t in self.inputs(x).chunk(3, -1))
        return self.attend(q, k, v).transpose(-2, -3).flatten(-2)


def _attend(q, k, v, mask=None):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(mask, float("-inf"))
    return torch.softmax(scores, -1) @ v


def _encoder_layer(**more):
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **more)


def _multihead():
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    wrapper = Layer(lambda x: module(x, x, x, need_weights=False)[0])
    wrapper.module = module
    return wrapper


CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)

transformer("encoder-layer", _encoder_layer)
transformer("encoder-layer-pre-norm", lambda: _encoder_layer(norm_first=True, activation="gelu"))
transformer("multihead", _multihead)
transformer("by-hand", lambda: Attention(_attend))
transformer("by-hand-causal", lambda: Attention(lambda q, k, v: _attend(q, k, v, CAUSAL)))
transformer("scaled-dot-product", lambda: Attention(F.scaled_dot_product_attention))
transformer("scaled-dot-product-causal", lambda: Attention(
    lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)))
transformer("linear-attention", lambda: Attention(lambda q, k, v: (F.elu(q) + 1) @ ((F.elu(k) + 1).transpose(-1, -2) @ v)))
transformer("einsum-attention", lambda: Attention(lambda q, k, v: torch.einsum(
    "bhqk,bhkd->bhqd", torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k), -1), v)))
transformer("relu-squared", lambda: Attention(lambda q, k, v: F.relu(q @ k.transpose(-1, -2)) ** 2 @ v / 5))
transformer("encoder-layer-float32", _encoder_layer, dtype=torch.float32)


def embedded(name, layer, ids=5, read=lambda h: h, classes=3, **more):
    """Tokens, an embedding of 8, tanh, and logits."""
    @case("embeddings", name, **more)
    def make(g):
        table, head, m = g.of(layer()), g.net(8, 12, classes), max(g.n // 3, 8)
        d = g.batch(x=lambda: g.integers(12, m, ids), y=lambda: g.integers(classes, m))
        logits = lambda: head(read(table(d.x)))   # noqa: E731
        return g.problem([table, head], lambda: F.cross_entropy(logits(), d.y), logits, lambda z: F.cross_entropy(z, d.y))


embedded("mean", lambda: nn.Embedding(12, 8), read=lambda h: h.mean(1))
embedded("flattened-padding", lambda: nn.Embedding(12, 8, padding_idx=0), read=lambda h: h.sum(1))
embedded("max-norm-free-last", lambda: nn.Embedding(12, 8), read=lambda h: h[:, -1])
embedded("bag-mean", lambda: nn.EmbeddingBag(12, 8, mode="mean"))
embedded("bag-sum", lambda: nn.EmbeddingBag(12, 8, mode="sum"))
embedded("bag-max", lambda: nn.EmbeddingBag(12, 8, mode="max"))
embedded("sparse", lambda: nn.Embedding(12, 8, sparse=True), read=lambda h: h.mean(1))
embedded("scaled-by-frequency", lambda: nn.Embedding(12, 8), read=lambda h: h.prod(1))


@case("embeddings")
def sparse_beside_other_operations(g):
    table, head, m = g.of(nn.Embedding(12, 4, sparse=True)), g.net(4, 1), g.n
    d = g.batch(i=lambda: g.integers(12, m), y=(m, 1))
    return g.residuals([table, head], lambda: head(torch.tanh(table(d.i)).cumsum(0) / m) - d.y)


@case("embeddings")
def recommender(g):
    users, items = g.of(nn.Embedding(10, 4)), g.of(nn.Embedding(12, 4))
    d = g.batch(u=lambda: g.integers(10, g.n), i=lambda: g.integers(12, g.n), y=(g.n,))
    return g.residuals([users, items], lambda: (users(d.u) * items(d.i)).sum(1) - d.y)


@case("embeddings")
def language_model_tied(g):
    table, m = g.of(nn.Embedding(9, 8)), max(g.n // 8, 4)
    body = g.net(8, 8)
    d = g.batch(x=lambda: g.integers(9, m, 4))
    logits = lambda: (torch.tanh(body(table(d.x[:, :-1]))) @ table.weight.T).flatten(0, 1)   # noqa: E731
    loss = lambda z: F.cross_entropy(z, d.x[:, 1:].flatten())   # noqa: E731
    return g.problem([table, body], lambda: loss(logits()), logits, loss)


@case("embeddings")
def one_hot_product(g):
    p, m = g.values(E=(7, 4), v=(4,)), g.n
    d = g.batch(i=lambda: g.integers(7, m), y=(m,))
    return g.residuals(p, lambda: torch.tanh(F.one_hot(d.i, 7).to(g.dtype) @ p.E) @ p.v - d.y)
