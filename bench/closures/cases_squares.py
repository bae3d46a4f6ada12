"""Every way to write a sum of squares, and functions of such sums."""

import math

import torch
import torch.nn.functional as F

from .corpus import case

# (prediction z (n, 2), target y) -> loss; the weight w in w ||z - y||^2, of the number of elements k.
SUMS = {
    "mse-loss": (F.mse_loss, lambda k: 1 / k),
    "mse-loss-sum": (lambda z, y: F.mse_loss(z, y, reduction="sum"), lambda k: 1.0),
    "mse-loss-swapped": (lambda z, y: F.mse_loss(y, z), lambda k: 1 / k),
    "mse-loss-none-mean": (lambda z, y: F.mse_loss(z, y, reduction="none").mean(1).sum(), lambda k: 0.5),
    "mse-module": (lambda z, y: torch.nn.MSELoss()(z, y), lambda k: 1 / k),
    "pow-mean": (lambda z, y: ((z - y) ** 2).mean(), lambda k: 1 / k),
    "pow-float": (lambda z, y: (z - y).pow(2.0).sum() / len(z), lambda k: 2 / k),
    "square": (lambda z, y: torch.square(z - y).sum(), lambda k: 1.0),
    "half": (lambda z, y: 0.5 * (z - y).square().sum(), lambda k: 0.5),
    "times-itself": (lambda z, y: (lambda r: (r * r).mean())(z - y), lambda k: 1 / k),
    "times-itself-written-twice": (lambda z, y: ((z - y) * (z - y)).mean(), lambda k: 1 / k),
    "negated": (lambda z, y: -(-((y - z) ** 2)).mean(), lambda k: 1 / k),
    "absolute-square": (lambda z, y: (z - y).abs().square().mean(), lambda k: 1 / k),
    "absolute-pow": (lambda z, y: ((z - y).abs() ** 2).mean(), lambda k: 1 / k),
    "expanded": (lambda z, y: (z**2 - 2 * z * y + y**2).mean(), lambda k: 1 / k),
    "dot": (lambda z, y: (lambda r: r @ r)((z - y).flatten()), lambda k: 1.0),
    "torch-dot": (lambda z, y: (lambda r: torch.dot(r, r))((z - y).flatten()), lambda k: 1.0),
    "vdot": (lambda z, y: (lambda r: torch.vdot(r, r))((z - y).flatten()), lambda k: 1.0),
    "inner": (lambda z, y: (lambda r: torch.inner(r, r))((z - y).flatten()), lambda k: 1.0),
    "einsum": (lambda z, y: (lambda r: torch.einsum("ij,ij->", r, r))(z - y), lambda k: 1.0),
    "einsum-vector": (lambda z, y: (lambda r: torch.einsum("i,i->", r, r))((z - y).flatten()), lambda k: 1.0),
    "transpose-product-squeezed": (lambda z, y: (lambda r: (r.T @ r).squeeze())((z - y).reshape(-1, 1)), lambda k: 1.0),
    "trace": (lambda z, y: (lambda r: torch.trace(r.T @ r))(z - y), lambda k: 1.0),
    "batched-product": (lambda z, y: (lambda r: (r[:, None] @ r[:, :, None]).mean())(z - y), lambda k: 2 / k),
    "norm-squared": (lambda z, y: torch.linalg.norm(z - y) ** 2, lambda k: 1.0),
    "vector-norm-squared": (lambda z, y: torch.linalg.vector_norm(z - y).square(), lambda k: 1.0),
    "old-norm-squared": (lambda z, y: (z - y).norm() ** 2 / len(z), lambda k: 2 / k),
    "norm-of-rows-squared": (lambda z, y: ((z - y).norm(dim=1) ** 2).mean(), lambda k: 2 / k),
    "matrix-norm-squared": (lambda z, y: torch.linalg.matrix_norm(z - y).pow(2), lambda k: 1.0),
    "sum-of-sums": (lambda z, y: sum(((z[:, k] - y[:, k]) ** 2).mean() for k in range(2)), lambda k: 2 / k),
    "python-accumulation": (lambda z, y: sum((z[i] - y[i]).square().sum() for i in range(len(z))), lambda k: 1.0),
    "stacked-losses": (lambda z, y: torch.stack([((z - y)[:, k] ** 2).mean() for k in range(2)]).sum(), lambda k: 2 / k),
    "stacked-losses-mean": (lambda z, y: torch.stack([((z - y)[:, k] ** 2).mean() for k in range(2)]).mean(), lambda k: 1 / k),
    "losses-written-into-a-tensor": (lambda z, y: _written(z, y), lambda k: 2 / k),
    "nanmean": (lambda z, y: ((z - y) ** 2).nanmean(), lambda k: 1 / k),
    "nansum": (lambda z, y: ((z - y) ** 2).nansum(), lambda k: 1.0),
    "mean-of-dims": (lambda z, y: ((z - y) ** 2).mean(1).mean(0), lambda k: 1 / k),
    "divided-by-a-tensor": (lambda z, y: ((z - y) ** 2).sum() / torch.tensor(7.0), lambda k: 1 / 7),
    "times-a-number": (lambda z, y: 3.0 * F.mse_loss(z, y), lambda k: 3 / k),
    "over-detached": (lambda z, y: F.mse_loss(z, y) / F.mse_loss(z, y).detach(), None),
    "view-flatten-sum": (lambda z, y: ((z - y) ** 2).view(-1).sum(0), lambda k: 1.0),
    "average-of-half": (lambda z, y: 0.5 * torch.mean(torch.pow(torch.sub(z, y), 2)), lambda k: 0.5 / k),
    "addmm-norm": (lambda z, y: (lambda r: torch.mm(r.reshape(1, -1), r.reshape(-1, 1)).sum())(z - y), lambda k: 1.0),
    "linalg-vecdot": (lambda z, y: (lambda r: torch.linalg.vecdot(r, r).mean())(z - y), lambda k: 2 / k),
    "float-power": (lambda z, y: torch.float_power(z - y, 2).mean(), lambda k: 1 / k),
    "in-place": (lambda z, y: (1.0 * (z - y)).pow_(2).mean(), lambda k: 1 / k),
    "relu-of-square": (lambda z, y: F.relu((z - y) ** 2).mean(), lambda k: 1 / k),
    "cosine-free-frobenius": (lambda z, y: torch.norm(z - y, p="fro") ** 2, lambda k: 1.0),
}


def _written(z, y):
    losses = torch.zeros(2, dtype=z.dtype)
    for k in range(2):
        losses[k] = ((z[:, k] - y[:, k]) ** 2).mean()
    return losses.sum()


def predictions(g, outputs=2):
    """(network, prediction (n, outputs), batch with y)."""
    net = g.net(3, 12, outputs)
    d = g.batch(x=(g.n, 3), y=(g.n, outputs))
    return net, lambda: net(d.x), d


def _sum(name):
    loss, weight = SUMS[name]

    @case("squares", name)
    def make(g):
        net, z, d = predictions(g)

        def outputs():
            r = z() - d.y
            w = weight(r.numel()) if weight else 1 / float(r.detach().square().sum())
            return math.sqrt(2 * w) * r

        def sample(x, y):
            return math.sqrt(2 * weight(d.y.numel())) * (net(x[None])[0] - y)

        return g.problem(net, lambda: loss(z(), d.y), outputs, samples=((sample, ("x", "y")),) if weight else ())


for _name in SUMS:
    _sum(_name)


def weighted(name, loss, factor):
    """A loss of (z, batch) that is 1/2 ||factor(batch, z - y)||^2."""
    @case("weighted squares", name)
    def make(g):
        net = g.net(3, 12, 2)
        root = g.randn(2 * g.n, 2 * g.n) / (2 * g.n) ** 0.5
        d = g.batch(x=(g.n, 3), y=(g.n, 2), w=lambda: g.uniform(g.n, 2, low=0.2, high=2), s=lambda: g.uniform(g.n, 2, low=0.3),
                    mask=lambda: g.uniform(g.n, 2) > 0.3, W=lambda: root.T @ root, root=lambda: root)
        return g.problem(net, lambda: loss(net(d.x), d), lambda: factor(net(d.x) - d.y, d))


weighted("elementwise", lambda z, d: (d.w * (z - d.y) ** 2).mean(), lambda r, d: (2 * d.w / r.numel()).sqrt() * r)
weighted("weights-inside", lambda z, d: F.mse_loss(d.w * z, d.w * d.y), lambda r, d: d.w * r * (2 / r.numel()) ** 0.5)
weighted("by-uncertainty", lambda z, d: (((z - d.y) / d.s) ** 2).sum(), lambda r, d: 2**0.5 * r / d.s)
weighted("average-by-weights", lambda z, d: (d.w * (z - d.y) ** 2).sum() / d.w.sum(),
         lambda r, d: (2 * d.w / d.w.sum()).sqrt() * r)
weighted("masked-by-index", lambda z, d: ((z - d.y)[d.mask] ** 2).mean(),
         lambda r, d: (2 / int(d.mask.sum())) ** 0.5 * r[d.mask])
weighted("masked-by-where", lambda z, d: torch.where(d.mask, (z - d.y) ** 2, 0.0).sum() / int(d.mask.sum()),
         lambda r, d: (2 / int(d.mask.sum())) ** 0.5 * r * d.mask)
weighted("masked-by-factor", lambda z, d: ((z - d.y) ** 2 * d.mask).sum() / int(d.mask.sum()),
         lambda r, d: (2 / int(d.mask.sum())) ** 0.5 * r * d.mask)
weighted("masked-select", lambda z, d: torch.masked_select(z - d.y, d.mask).square().mean(),
         lambda r, d: (2 / int(d.mask.sum())) ** 0.5 * r[d.mask])
weighted("quadratic-form", lambda z, d: (lambda r: r @ d.W @ r)((z - d.y).flatten()),
         lambda r, d: 2**0.5 * d.root @ r.flatten())
weighted("quadratic-form-column", lambda z, d: (lambda r: (r.T @ d.W @ r).squeeze())((z - d.y).reshape(-1, 1)),
         lambda r, d: 2**0.5 * d.root @ r.flatten())
weighted("quadratic-form-sum", lambda z, d: (lambda r: (r * (d.W @ r)).sum())((z - d.y).flatten()),
         lambda r, d: 2**0.5 * d.root @ r.flatten())
weighted("whitened", lambda z, d: (d.root @ (z - d.y).flatten()).square().sum(), lambda r, d: 2**0.5 * d.root @ r.flatten())
weighted("variance", lambda z, d: (z - d.y).var(), lambda r, d: (2 / (r.numel() - 1)) ** 0.5 * (r - r.mean()))
weighted("variance-of-columns", lambda z, d: (z - d.y).var(0, unbiased=False).sum(),
         lambda r, d: (2 / len(r)) ** 0.5 * (r - r.mean(0)))
weighted("detached-residual-weights", lambda z, d: ((z - d.y).detach().abs() * (z - d.y) ** 2).mean(),
         lambda r, d: (2 * r.detach().abs() / r.numel()).sqrt() * r)
weighted("differences-in-time", lambda z, d: torch.diff(z - d.y, dim=0).square().mean(),
         lambda r, d: (r[1:] - r[:-1]) * (2 / (r.numel() - 2)) ** 0.5)


def monotone(name, loss, of=None, factor=None, exact=False):
    """A loss f(S) of S = ||z - y||^2; the curvature is f'(S) times that of S, `factor` = 2 f'(S)."""
    @case("functions of a sum", name)
    def make(g):
        net, z, d = predictions(g)

        def of_outputs(z):
            return (of or loss)(z, d.y)

        def curvature(z):
            r = z - d.y
            return torch.full((r.numel(),), factor(float(r.square().sum()), r.numel(), d.y), dtype=z.dtype)

        return g.problem(net, lambda: loss(z(), d.y), z, of_outputs, curvatures=(curvature,), exact=exact)


monotone("norm", lambda z, y: torch.linalg.norm(z - y), factor=lambda S, k, y: S**-0.5, exact=True)
monotone("norm-method", lambda z, y: (z - y).norm(), factor=lambda S, k, y: S**-0.5, exact=True)
monotone("rmse", lambda z, y: torch.sqrt(F.mse_loss(z, y)), factor=lambda S, k, y: (S * k) ** -0.5, exact=True)
monotone("rmse-with-eps", lambda z, y: torch.sqrt(F.mse_loss(z, y) + 1e-3),
         factor=lambda S, k, y: (S / k + 1e-3) ** -0.5 / k, exact=True)
monotone("relative-l2", lambda z, y: (z - y).norm() / y.norm(), factor=lambda S, k, y: S**-0.5 / float(y.norm()), exact=True)
monotone("log-mse", lambda z, y: torch.log(F.mse_loss(z, y)), factor=lambda S, k, y: 2 / S)
monotone("log1p-mse", lambda z, y: torch.log1p(F.mse_loss(z, y)), factor=lambda S, k, y: 2 / (k + S))
monotone("log10-mse", lambda z, y: torch.log10(F.mse_loss(z, y)), factor=lambda S, k, y: 2 / S / math.log(10))
monotone("mse-to-a-power", lambda z, y: F.mse_loss(z, y) ** 0.5, factor=lambda S, k, y: (S * k) ** -0.5, exact=True)


@case("functions of a sum")
def relative_l2_per_sample(g):
    net, m = g.net(3, 12, 8), max(g.n // 8, 4)
    d = g.batch(x=(m, 3), y=(m, 8))
    loss = lambda z: ((z - d.y).norm(dim=1) / d.y.norm(dim=1)).mean()   # noqa: E731

    def curvature(z):
        return (1 / (z - d.y).norm(dim=1) / d.y.norm(dim=1) / m)[:, None].expand(z.shape).reshape(-1)

    return g.problem(net, lambda: loss(net(d.x)), lambda: net(d.x), loss, curvatures=(curvature,))


# Losses with one element that are no scalars: the loss, or a sentence.

def one_element(name, loss, weight=None):
    @case("one element", name, raises="shape|scalar|one element|0-dim", either=True)
    def make(g):
        net, z, d = predictions(g)

        def outputs():
            r = z() - d.y
            return (2 * (weight or 1 / r.numel())) ** 0.5 * r

        return g.problem(net, lambda: loss(z(), d.y), outputs, plain=lambda: loss(z(), d.y).sum())


one_element("accumulated-into-zeros-of-1", lambda z, y: torch.zeros(1, dtype=z.dtype) + F.mse_loss(z, y))
one_element("times-a-vector-of-1", lambda z, y: torch.ones(1, dtype=z.dtype) * F.mse_loss(z, y))
one_element("transpose-product", lambda z, y: (lambda r: r.T @ r)((z - y).reshape(-1, 1)), 1.0)
one_element("keepdim", lambda z, y: ((z - y) ** 2).flatten().mean(0, keepdim=True))
one_element("unsqueezed", lambda z, y: F.mse_loss(z, y).unsqueeze(0))
