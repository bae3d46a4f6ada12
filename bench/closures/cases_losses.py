"""Losses that are no sums of squares: classification, robust losses, likelihoods, penalties, and what must raise."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .cases_squares import predictions
from .corpus import case

CLASSES = 4


def classification(name, loss, of=None, curvature=None, **more):
    """A loss of logits (n, 4) and a batch with labels y, probabilities q, class weights w."""
    @case("classification", name, **more)
    def make(g):
        net = g.net(3, 12, CLASSES)
        d = g.batch(x=(g.n, 3), y=lambda: g.integers(CLASSES, g.n), q=lambda: torch.softmax(g.randn(g.n, CLASSES), 1),
                    w=lambda: g.uniform(CLASSES, low=0.5, high=2), ignored=lambda: g.integers(CLASSES + 1, g.n) - 1)
        return g.problem(net, lambda: loss(net(d.x), d), lambda: net(d.x), lambda z: (of or loss)(z, d),
                         curvatures=() if curvature is None else (lambda z: curvature(z, d),))


def _ce(z, d):
    return F.cross_entropy(z, d.y)


classification("cross-entropy", _ce)
classification("cross-entropy-sum", lambda z, d: F.cross_entropy(z, d.y, reduction="sum"))
classification("cross-entropy-module", lambda z, d: nn.CrossEntropyLoss()(z, d.y))
classification("cross-entropy-none", lambda z, d: F.cross_entropy(z, d.y, reduction="none").mean())
classification("cross-entropy-weights", lambda z, d: F.cross_entropy(z, d.y, weight=d.w))
classification("cross-entropy-ignore", lambda z, d: F.cross_entropy(z, d.ignored, ignore_index=-1))
classification("cross-entropy-smoothing", lambda z, d: F.cross_entropy(z, d.y, label_smoothing=0.1))
classification("cross-entropy-soft-labels", lambda z, d: F.cross_entropy(z, d.q))
classification("nll-of-log-softmax", lambda z, d: F.nll_loss(F.log_softmax(z, 1), d.y))
classification("gather-of-log-softmax", lambda z, d: -F.log_softmax(z, 1).gather(1, d.y[:, None]).mean())
classification("index-of-log-softmax", lambda z, d: -F.log_softmax(z, 1)[torch.arange(len(z)), d.y].mean())
classification("soft-labels-by-hand", lambda z, d: -(d.q * F.log_softmax(z, 1)).sum(1).mean())
classification("one-hot-by-hand", lambda z, d: -(F.one_hot(d.y, CLASSES) * torch.log_softmax(z, 1)).sum() / len(z))
classification("logsumexp-by-hand", lambda z, d: (torch.logsumexp(z, 1) - z.gather(1, d.y[:, None])[:, 0]).mean(), _ce)
classification("log-of-softmax", lambda z, d: -torch.log(torch.softmax(z, 1))[torch.arange(len(z)), d.y].mean(), _ce)
classification("log-of-sum-of-exp", lambda z, d: (torch.exp(z).sum(1).log() - z[torch.arange(len(z)), d.y]).mean(), _ce)
classification("nll-of-log-of-softmax", lambda z, d: F.nll_loss(torch.log(torch.softmax(z, 1) + 0.0), d.y), _ce)
classification("categorical", lambda z, d: -torch.distributions.Categorical(logits=z).log_prob(d.y).mean(), _ce)
classification("kl-div", lambda z, d: F.kl_div(F.log_softmax(z, 1), d.q, reduction="batchmean"))
classification("kl-div-log-target", lambda z, d: F.kl_div(F.log_softmax(z, 1), d.q.log(), reduction="batchmean",
                                                                log_target=True))
classification("distillation", lambda z, d: F.kl_div(F.log_softmax(z / 2, 1), d.q, reduction="batchmean") * 4 + _ce(z, d))
classification("multi-margin-squared", lambda z, d: (F.relu(1 - z.gather(1, d.y[:, None]) + z) ** 2).mean())


def _focal(z, d):
    ce = F.cross_entropy(z, d.y, reduction="none")
    return ((1 - torch.exp(-ce)) ** 2 * ce).mean()


def _focal_curvature(z, d):
    """Of f(ce), row by row: f'(ce) times the curvature of the cross-entropy; f is convex nowhere and everywhere increasing."""
    p = torch.softmax(z, 1)
    ce = F.cross_entropy(z, d.y, reduction="none").requires_grad_()
    (slope,) = torch.autograd.grad(((1 - torch.exp(-ce)) ** 2 * ce).mean(), ce)
    blocks = slope[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None])
    return torch.block_diag(*blocks)


classification("focal", _focal, None, _focal_curvature, raises="pgdfast", either=True)


def binary(name, loss, of=None, **more):
    """A loss of logits (n, 2) and a batch with targets t in {0, 1}, q in (0, 1), weights w."""
    @case("classification", name, **more)
    def make(g):
        net = g.net(3, 12, 2)
        d = g.batch(x=(g.n, 3), t=lambda: (g.uniform(g.n, 2) > 0.5).to(g.dtype), q=lambda: g.uniform(g.n, 2),
                    w=lambda: g.uniform(g.n, 2, low=0.5, high=2))
        return g.problem(net, lambda: loss(net(d.x), d), lambda: net(d.x), lambda z: (of or loss)(z, d))


def _bce(z, d):
    return F.binary_cross_entropy_with_logits(z, d.t)


binary("bce-logits", _bce)
binary("bce-logits-weighted", lambda z, d: F.binary_cross_entropy_with_logits(z, d.q, weight=d.w, pos_weight=d.w[0]))
binary("bce-of-sigmoid", lambda z, d: F.binary_cross_entropy(torch.sigmoid(z), d.t), _bce)
binary("bce-module-of-sigmoid", lambda z, d: nn.BCELoss()(z.sigmoid(), d.t), _bce)
binary("bce-by-hand", lambda z, d: -(d.t * torch.log(torch.sigmoid(z)) + (1 - d.t) * torch.log(1 - torch.sigmoid(z))).mean(),
       _bce)
binary("bce-by-softplus", lambda z, d: (F.softplus(z) - d.t * z).mean(), _bce)
binary("bce-by-logsigmoid", lambda z, d: -(d.t * F.logsigmoid(z) + (1 - d.t) * F.logsigmoid(-z)).mean(), _bce)
binary("soft-margin", lambda z, d: F.soft_margin_loss(z, 2 * d.t - 1))
binary("softplus-of-margin", lambda z, d: F.softplus(-(2 * d.t - 1) * z).mean())
binary("multilabel-soft-margin", lambda z, d: F.multilabel_soft_margin_loss(z, d.t))
binary("squared-hinge", lambda z, d: (F.relu(1 - (2 * d.t - 1) * z) ** 2).mean())
binary("logistic-regression", lambda z, d: torch.log1p(torch.exp(-(2 * d.t - 1) * z)).mean())
binary("bernoulli", lambda z, d: -torch.distributions.Bernoulli(logits=z).log_prob(d.t).mean(), _bce)


def _curvature(rho, weights):
    """rho'' where it is positive, else the weights."""
    def second(r):
        r = r.detach().requires_grad_()
        (first,) = torch.autograd.grad(rho(r).sum(), r, create_graph=True)
        h = torch.autograd.grad(first.sum(), r)[0] if first.requires_grad else torch.zeros_like(r)
        return torch.where(h > 0, h, weights(r.detach()))

    return second


def robust(name, loss, rho, **more):
    """A mean of rho(z - y): its curvature may be rho'' where positive and rho'(r) / r elsewhere, or the latter alone."""
    @case("robust", name, **more)
    def make(g):
        net, z, d = predictions(g)

        def weights(r):
            r = r.detach().requires_grad_()
            (slope,) = torch.autograd.grad(rho(r).sum(), r)
            return (slope / r).detach()

        second = _curvature(rho, weights)
        candidates = tuple(lambda z, h=h: (h(z - d.y) / z.numel()).reshape(-1) for h in (second, weights))
        return g.problem(net, lambda: loss(z(), d.y), z, lambda z: rho(z - d.y).mean(), curvatures=candidates, exact=False)


def _pinball(r):
    return torch.maximum(-0.3 * r, 0.7 * r)


_T0 = float(torch.distributions.StudentT(torch.tensor(3.0, dtype=torch.float64)).log_prob(torch.tensor(0.0)))


def _huber(r, delta=1.0):
    return torch.where(r.abs() <= delta, 0.5 * r * r, delta * (r.abs() - 0.5 * delta))


robust("huber", F.huber_loss, _huber)
robust("huber-delta-sum", lambda z, y: F.huber_loss(z, y, delta=0.5, reduction="sum") / z.numel(), lambda r: _huber(r, 0.5))
robust("smooth-l1", F.smooth_l1_loss, _huber)
robust("smooth-l1-beta", lambda z, y: F.smooth_l1_loss(z, y, beta=0.5), lambda r: _huber(r, 0.5) / 0.5)
robust("huber-by-where", lambda z, y: _huber(z - y).mean(), _huber)
robust("pseudo-huber", lambda z, y: (torch.sqrt(1 + (z - y) ** 2) - 1).mean(), lambda r: torch.sqrt(1 + r * r) - 1)
robust("charbonnier", lambda z, y: torch.sqrt((z - y) ** 2 + 1e-2).mean(), lambda r: torch.sqrt(r * r + 1e-2))
robust("log-cosh", lambda z, y: torch.log(torch.cosh(z - y)).mean(), lambda r: torch.log(torch.cosh(r)))
robust("log-cosh-stable", lambda z, y: ((z - y) + F.softplus(-2 * (z - y)) - math.log(2)).mean(),
       lambda r: torch.log(torch.cosh(r)))
robust("cauchy", lambda z, y: torch.log1p((z - y) ** 2).mean(), lambda r: torch.log1p(r * r))
robust("cauchy-log", lambda z, y: torch.log(1 + ((z - y) / 2) ** 2).mean(), lambda r: torch.log(1 + r * r / 4))
robust("geman-mcclure", lambda z, y: (lambda s: (s / (1 + s)).mean())((z - y) ** 2), lambda r: r * r / (1 + r * r))
robust("welsch", lambda z, y: (1 - torch.exp(-0.5 * (z - y) ** 2)).mean(), lambda r: 1 - torch.exp(-0.5 * r * r))
robust("l1", F.l1_loss, torch.abs)
robust("l1-by-abs", lambda z, y: (z - y).abs().mean(), torch.abs)
robust("quantile", lambda z, y: _pinball(z - y).mean(), _pinball)
robust("fourth-power", lambda z, y: ((z - y) ** 4).mean(), lambda r: r**4)
robust("abs-to-the-1.5", lambda z, y: ((z - y).abs() ** 1.5).mean(), lambda r: r.abs() ** 1.5)
robust("student-t", lambda z, y: -torch.distributions.StudentT(torch.tensor(3.0, dtype=z.dtype), z).log_prob(y).mean() + _T0,
       lambda r: 2 * torch.log1p(r * r / 3))



def likelihood(name, loss, of=None, outputs=1, curvature=(), **more):
    """A loss of outputs z (n, k) and a batch with y (n, 1), positive v and counts c; its Hessian is the curvature."""
    @case("likelihoods", name, **more)
    def make(g):
        net = g.net(3, 12, outputs)
        d = g.batch(x=(g.n, 3), y=(g.n, 1), v=lambda: g.uniform(g.n, 1, low=0.3, high=2),
                    c=lambda: g.integers(5, g.n, 1).to(g.dtype))
        return g.problem(net, lambda: loss(net(d.x), d), lambda: net(d.x), lambda z: (of or loss)(z, d), exact=not curvature,
                         curvatures=tuple(lambda z, c=c: c(z, d) for c in curvature))


def _mean_and_log_variance(z, d):
    m, s = z[:, :1], z[:, 1:]
    return (0.5 * (s + (m - d.y) ** 2 * torch.exp(-s))).mean()


def _fisher(z, d):
    """E_y of the Hessian of a normal likelihood in (mean, log variance)."""
    s = z[:, 1]
    return torch.stack([torch.exp(-s), torch.full_like(s, 0.5)], 1).reshape(-1) / len(z)


def _second(z, d):
    """The diagonal of second derivatives in (mean, log variance)."""
    r, s = z[:, 0] - d.y[:, 0], z[:, 1]
    return torch.stack([torch.exp(-s), 0.5 * r * r * torch.exp(-s)], 1).reshape(-1) / len(z)


def _majorizing(z, d):
    """The same, and in log variance the size of the slope added, so that no step is longer than 1."""
    r, s = z[:, 0] - d.y[:, 0], z[:, 1]
    second = 0.5 * r * r * torch.exp(-s)
    return torch.stack([torch.exp(-s), second + (0.5 - second).abs()], 1).reshape(-1) / len(z)


likelihood("poisson-nll", lambda z, d: F.poisson_nll_loss(z, d.c))
likelihood("poisson-by-hand", lambda z, d: (torch.exp(z) - d.c * z).mean())
likelihood("gaussian-nll-fixed-variance", lambda z, d: F.gaussian_nll_loss(z, d.y, d.v))
likelihood("normal-log-prob", lambda z, d: -torch.distributions.Normal(z, d.v).log_prob(d.y).mean())
likelihood("gaussian-nll-learned-variance", lambda z, d: F.gaussian_nll_loss(z[:, :1], d.y, torch.exp(z[:, 1:]), eps=1e-12),
           _mean_and_log_variance, 2, (_fisher, _second, _majorizing))
likelihood("gaussian-nll-by-hand", _mean_and_log_variance, None, 2, (_fisher, _second, _majorizing))
likelihood("exponential", lambda z, d: (z + d.v * torch.exp(-z)).mean())
likelihood("laplace-fixed-scale", lambda z, d: ((z - d.y).abs() / d.v).mean(), None, 1,
           (lambda z, d: (1 / (z - d.y).abs() / d.v / len(z)).reshape(-1),))


# Penalties, sums of losses, and learned weights.

def penalized(name, penalty, loss=F.mse_loss, exact=True, curvature=None, **more):
    """A mean square of a network plus a function of its parameters."""
    @case("penalties", name, **more)
    def make(g):
        net, z, d = predictions(g)
        of = lambda z, *p: F.mse_loss(z, d.y) + penalty(list(p))   # noqa: E731
        params = list(net.parameters())
        outputs = lambda: (z(), *[1.0 * p for p in params])   # noqa: E731
        candidates = () if curvature is None else (lambda z, *p: torch.cat([
            torch.full((z.numel(),), 2 / z.numel(), dtype=z.dtype), *[curvature(q).reshape(-1) for q in p]]),)
        return g.problem(net, lambda: loss(z(), d.y) + penalty(params), outputs, of, exact=exact, curvatures=candidates)


penalized("l2", lambda p: 1e-2 * sum(q.square().sum() for q in p))
penalized("l2-norms-squared", lambda p: 1e-2 * sum(q.norm() ** 2 for q in p))
penalized("l2-of-weights-mean", lambda p: 0.1 * sum((q**2).mean() for q in p if q.dim() > 1))
penalized("l2-concatenated", lambda p: 0.01 * torch.cat([q.flatten() for q in p]).square().sum())
penalized("ridge-half-dot", lambda p: 0.5 * sum(1e-2 * torch.dot(q.flatten(), q.flatten()) for q in p))
penalized("l1", lambda p: 1e-2 * sum(q.abs().sum() for q in p), exact=False, curvature=lambda q: 1e-2 / q.abs())
penalized("smooth-l1", lambda p: 1e-2 * sum(torch.sqrt(q * q + 0.1).sum() for q in p), exact=True,
          curvature=lambda q: 1e-2 / torch.sqrt(q * q + 0.1))


@case("penalties")
def l2_towards_a_start(g):
    net, z, d = predictions(g)
    anchors = [0.9 * p.detach().clone() for p in net.parameters()]
    penalty = lambda: 0.05 * sum((p - a).square().sum() for p, a in zip(net.parameters(), anchors, strict=True))   # noqa: E731
    outputs = lambda: (z() * z().numel() ** -0.5 * 2**0.5 - d.y * d.y.numel() ** -0.5 * 2**0.5,   # noqa: E731
                       *[0.1**0.5 * (p - a) for p, a in zip(net.parameters(), anchors, strict=True)])
    return g.problem(net, lambda: F.mse_loss(z(), d.y) + penalty(), outputs)


@case("penalties")
def activations_penalty(g):
    net = g.net(3, 12, 2)
    d = g.batch(x=(g.n, 3), y=(g.n, 2))
    h = lambda: torch.tanh(net[0](d.x))   # noqa: E731
    outputs = lambda: ((net(d.x) - d.y) * (1 / g.n) ** 0.5, h() * (0.2 / h().numel()) ** 0.5)   # noqa: E731
    return g.problem(net, lambda: F.mse_loss(net[2](h()), d.y) + 0.1 * h().square().mean(), outputs)


@case("penalties")
def mse_and_cross_entropy(g):
    net = g.net(3, 12, 5)
    d = g.batch(x=(g.n, 3), y=(g.n, 1), c=lambda: g.integers(4, g.n))
    loss = lambda z: F.mse_loss(z[:, :1], d.y) + 0.5 * F.cross_entropy(z[:, 1:], d.c)   # noqa: E731
    return g.problem(net, lambda: loss(net(d.x)), lambda: net(d.x), loss)


@case("penalties")
def uncertainty_weighting(g):
    net, p = g.net(3, 12, 2), g.values(s=(2,))
    d = g.batch(x=(g.n, 3), y=(g.n, 2))

    def loss(z, s):
        return sum(torch.exp(-s[k]) * ((z[:, k] - d.y[:, k]) ** 2).mean() + s[k] for k in range(2))

    def curvature(z, s):   # squares with their weights held, and the second derivative in s
        sums = torch.exp(-s) * ((z - d.y) ** 2).mean(0)
        return torch.cat([(2 * torch.exp(-s) / len(z)).expand(z.shape).reshape(-1), sums])

    def majorizing(z, s):   # the same, and the size of the slope in s added
        sums = torch.exp(-s) * ((z - d.y) ** 2).mean(0)
        return curvature(z, s) + torch.cat([torch.zeros(z.numel(), dtype=z.dtype), (1 - sums).abs()])

    return g.problem([net, p], lambda: loss(net(d.x), p.s), lambda: (net(d.x), 1.0 * p.s), loss, exact=False,
                     curvatures=(curvature, majorizing))


@case("penalties")
def learned_weights(g):
    net, p = g.net(3, 12, 1), g.values(root=(g.n, 1))
    d = g.batch(x=(g.n, 3), y=(g.n, 1))
    loss = lambda z, w: (w**2 * (z - d.y) ** 2).sum()   # noqa: E731

    def of_products(z, w):   # squares of w (z - y)
        rows = torch.cat([torch.diag(w[:, 0]), torch.diag((z - d.y)[:, 0])], 1)
        return 2 * rows.T @ rows

    def held(z, w):   # squares with their weights held, and the second derivative in w
        return torch.cat([2 * w**2, 2 * (z - d.y) ** 2])[:, 0]

    def majorizing(z, w):   # the same, and the size of the slope in w added
        return held(z, w) + torch.cat([0 * z, 2 * (w * (z - d.y) ** 2).abs()])[:, 0]

    return g.problem([net, p], lambda: loss(net(d.x), p.root), lambda: (net(d.x), 1.0 * p.root), loss, exact=False,
                     curvatures=(of_products, held, majorizing))


@case("penalties", "product-of-losses", raises="pgdfast", either=True)
def _product(g):
    """If anything, each factor's curvature times the other factor."""
    net, z, d = predictions(g)
    loss = lambda z: F.mse_loss(z[:, 0], d.y[:, 0]) * F.mse_loss(z[:, 1], d.y[:, 1])   # noqa: E731
    held = lambda z: (2 / len(z) * ((z - d.y) ** 2).mean(0).flip(0)).expand(z.shape).reshape(-1)   # noqa: E731
    return g.problem(net, lambda: loss(z()), z, loss, exact=False, curvatures=(held,))


# No loss with a Gauss-Newton step: a sentence that says so.

def refused(name, loss, pattern="pgdfast"):
    @case("must raise", name, raises=pattern)
    def make(g):
        net, z, d = predictions(g)
        return g.problem(net, lambda: loss(z(), d.y), z)


refused("negative-square", lambda z, y: -F.mse_loss(z, y))
refused("difference-of-losses", lambda z, y: F.mse_loss(z, y) - 2 * F.mse_loss(z, 2 * y))
refused("no-graph", lambda z, y: F.mse_loss(z, y).detach())
refused("not-a-number", lambda z, y: F.mse_loss(z, y) * float("nan"), "nan")
refused("a-float", lambda z, y: F.mse_loss(z, y).item())
refused("linear", lambda z, y: (z * y).sum())
refused("scalar-in-a-tuple", lambda z, y: (z - y, F.mse_loss(z, y)))
