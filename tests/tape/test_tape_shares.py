"""The loss on all rows from those on parts: values and gradients, for every kind of loss, against the closure on all rows."""

import pytest
import torch
import torch.nn.functional as F
from helpers import gradient, mlp, rand, relative

import pgdfast
from pgdfast.parts.combine import Combination, common_penalties
from pgdfast.tape import Tracer

N, D, K, M = 13, 3, 4, 26  # rows, inputs, outputs, points on the boundary
LABELS = torch.tensor([0, 1, 2, -100, 3, 1, 2, 0, -100, 1, 3, 3, 2])
MASK = torch.tensor([1.0, 0, 1, 0, 1, 1, 1, 0, 1, 0, 1, 1, 1]).double()
CLASS = rand(K, seed=4).square() + 0.1
METRIC = (lambda w: w @ w.T + torch.eye(K))(rand(K, K, seed=9))
UNEQUAL = ([4, 0, 6, 3], [12, 1], [2, 2, 9])


class Batch:
    """Rows of the data, and twice as many points on a boundary, here unequally."""

    def __init__(self, rows: slice, edge: slice):
        self.x, self.y = rand(N, D, seed=1)[rows], rand(N, K, seed=2)[rows]
        self.w = rand(N, K, seed=3).square()[rows]
        self.m = MASK[rows]
        self.c = LABELS[rows]
        self.t = LABELS.abs()[rows] % K
        self.q = torch.softmax(self.y, 1)
        self.b = rand(M, D, seed=7)[edge]
        self.n = len(self.x)


def batches(sizes):
    start, found = 0, []
    for size in sizes:
        found.append(Batch(slice(start, start + size), slice(2 * start, 2 * (start + size))))
        start += size
    return found, Batch(slice(0, start), slice(0, 2 * start))


def ce(z, d, **options):
    return F.cross_entropy(z, d.t, **options)


ADDITIVE = {
    "residuals": lambda z, d, net: z - d.y,
    "tuple of residuals": lambda z, d, net: (z - d.y, net(d.b)[:, 0] ** 2),
    "transposed residuals": lambda z, d, net: (z - d.y).T,
    "mse": lambda z, d, net: F.mse_loss(z, d.y),
    "mse sum": lambda z, d, net: F.mse_loss(z, d.y, reduction="sum"),
    "mse none": lambda z, d, net: F.mse_loss(z, d.y, reduction="none").sum(),
    "mse none mean": lambda z, d, net: (d.w * F.mse_loss(z, d.y, reduction="none")).mean(),
    "mse weight": lambda z, d, net: F.mse_loss(z, d.y, weight=d.w),
    "half mse": lambda z, d, net: 0.5 * F.mse_loss(z, d.y),
    "half sum": lambda z, d, net: 0.5 * (z - d.y).square().sum(),
    "mean": lambda z, d, net: (z - d.y).square().mean(),
    "mean of mean": lambda z, d, net: (z - d.y).square().mean(1).mean(0),
    "sum of means over outputs": lambda z, d, net: (z - d.y).square().mean(1).sum(),
    "sum of means over rows": lambda z, d, net: (z - d.y).square().mean(0).sum(),
    "mean of sums over outputs": lambda z, d, net: (z - d.y).square().sum(1).mean(),
    "mean of sums over rows": lambda z, d, net: (z - d.y).square().sum(0).mean(),
    "kept dimensions": lambda z, d, net: (z - d.y).square().mean(0, keepdim=True).sum(),
    "mean of transposed": lambda z, d, net: (z - d.y).square().T.mean(1).sum(),
    "sum of transposed": lambda z, d, net: (z - d.y).square().permute(1, 0).mean(0).sum(),
    "mean of reshaped": lambda z, d, net: (z - d.y).square().reshape(-1).mean(),
    "mean of pairs": lambda z, d, net: (z - d.y).square().view(-1, 2, 2).mean(2).sum(1).mean(),
    "one output": lambda z, d, net: (z - d.y).square()[:, 1].mean(),
    "every other output": lambda z, d, net: (z - d.y).square()[:, ::2].mean(),
    "weighted outputs": lambda z, d, net: torch.dot(CLASS, (z - d.y).square().mean(0)),
    "weighted outputs, summed": lambda z, d, net: torch.dot(CLASS, (z - d.y).square().sum(0)),
    "weighted": lambda z, d, net: (d.w * (z - d.y) ** 2).sum() / 7,
    "weighted mean": lambda z, d, net: (d.w[:, 0] * (z - d.y).square().mean(1)).mean(),
    "chosen": lambda z, d, net: torch.where(d.w > 1, (z - d.y) ** 2, 0.0).mean(),
    "masked fill": lambda z, d, net: ((z - d.y) ** 2).masked_fill(d.w > 1, 0.0).mean(),
    "expanded": lambda z, d, net: (d.w * ((z - d.y)[:, :1] ** 2).expand(d.n, K)).mean(),
    "stacked": lambda z, d, net: torch.stack([(z - d.y)[:, 0] ** 2, z[:, 1] ** 2]).mean(),
    "stacked terms": lambda z, d, net: torch.stack([F.mse_loss(z, d.y), z.square().mean()]).sum(),
    "joined": lambda z, d, net: torch.cat([(z - d.y) ** 2, z**2], 1).mean(),
    "dot": lambda z, d, net: (lambda r: r @ r)((z - d.y).reshape(-1)),
    "squared norm": lambda z, d, net: (z - d.y).norm() ** 2,
    "squared norms of rows": lambda z, d, net: (z - d.y).norm(dim=1).square().mean(),
    "norms of rows": lambda z, d, net: torch.linalg.vector_norm(z - d.y, dim=1).mean(),
    "roots": lambda z, d, net: ((z - d.y).square().sum(1) + 0.1).sqrt().mean(),
    "variance within rows": lambda z, d, net: z.reshape(-1, 2, 2).var(2).mean(),
    "over len": lambda z, d, net: (z - d.y).square().sum() / len(d.x),
    "over numel": lambda z, d, net: (z - d.y).square().sum() / z.numel(),
    "times one over n": lambda z, d, net: (z - d.y).square().sum() * (1 / max(d.n, 1)),
    "half over n": lambda z, d, net: (z - d.y).square().sum() / (2 * d.n),
    "divided before the sum": lambda z, d, net: ((z - d.y).square() / d.n).sum(),
    "mean times n": lambda z, d, net: d.n * F.mse_loss(z, d.y),
    "dot over n": lambda z, d, net: (lambda r: r @ r / d.n)((z - d.y).reshape(-1)),
    "over a constant": lambda z, d, net: (z - d.y).square().sum() / 4,
    "residuals over roots of n": lambda z, d, net: (z - d.y) / d.n**0.5,
    "squares of residuals over roots": lambda z, d, net: ((z - d.y) / d.n**0.5).square().sum(),
    "masked mean": lambda z, d, net: (d.m[:, None] * (z - d.y) ** 2).sum() / d.m.sum(),
    "masked mean of rows": lambda z, d, net: (d.m * (z - d.y).square().mean(1)).sum() / d.m.sum(),
    "picked by a mask": lambda z, d, net: ((z - d.y) ** 2)[d.w > 0.3].sum(),
    "mean of the picked": lambda z, d, net: ((z - d.y) ** 2)[d.w > 0.3].mean(),
    "weighted by weights": lambda z, d, net: (d.w * (z - d.y) ** 2).sum() / d.w.sum(),
    "ce": lambda z, d, net: ce(z, d),
    "ce sum": lambda z, d, net: ce(z, d, reduction="sum"),
    "ce none": lambda z, d, net: (d.w[:, 0] * ce(z, d, reduction="none")).mean(),
    "ce ignored": lambda z, d, net: F.cross_entropy(z, d.c),
    "ce class weights": lambda z, d, net: ce(z, d, weight=CLASS),
    "ce weights ignored": lambda z, d, net: F.cross_entropy(z, d.c, CLASS),
    "ce smoothing": lambda z, d, net: ce(z, d, label_smoothing=0.1),
    "ce weights smoothing": lambda z, d, net: ce(z, d, weight=CLASS, label_smoothing=0.1),
    "ce soft": lambda z, d, net: F.cross_entropy(z, d.q),
    "ce images": lambda z, d, net: F.cross_entropy(
        z.reshape(-1, 2, 2), torch.stack([d.t % 2, d.t // 2], 1)
    ),
    "nll by hand": lambda z, d, net: -torch.log_softmax(z, 1).gather(1, d.t[:, None]).mean(),
    "entropy by hand": lambda z, d, net: -(d.q * torch.log_softmax(z, 1)).sum(1).mean(),
    "kl batchmean": lambda z, d, net: F.kl_div(z.log_softmax(1), d.q, reduction="batchmean"),
    "bce": lambda z, d, net: F.binary_cross_entropy_with_logits(z, d.q),
    "bce weights": lambda z, d, net: F.binary_cross_entropy_with_logits(
        z, d.q, d.w, pos_weight=CLASS
    ),
    "bce of rows": lambda z, d, net: (
        F.binary_cross_entropy_with_logits(z, d.q, reduction="none").sum(1).mean()
    ),
    "huber": lambda z, d, net: F.huber_loss(z, d.y, delta=0.3),
    "huber sum": lambda z, d, net: F.huber_loss(z, d.y, reduction="sum"),
    "smooth l1": lambda z, d, net: F.smooth_l1_loss(z, d.y, beta=0.4),
    "l1": lambda z, d, net: F.l1_loss(z, d.y),
    "l1 sum": lambda z, d, net: (z - d.y).abs().sum(),
    "logcosh": lambda z, d, net: torch.log(torch.cosh(z - d.y)).mean(),
    "poisson": lambda z, d, net: F.poisson_nll_loss(z, d.w),
    "gaussian": lambda z, d, net: F.gaussian_nll_loss(z, d.y, d.w + 0.1),
    "softplus": lambda z, d, net: F.softplus(-z * d.y.sign()).sum(1).mean(),
    "quantile": lambda z, d, net: torch.maximum(0.9 * (d.y - z), -0.1 * (d.y - z)).mean(),
    "interior and boundary": lambda z, d, net: F.mse_loss(z, d.y) + 10 * net(d.b).square().mean(),
    "sum and mean": lambda z, d, net: (z - d.y).square().sum() + net(d.b).square().mean(),
    "four terms": lambda z, d, net: (
        F.mse_loss(z, d.y)
        + 0.1 * (z[:, 1] ** 2).mean()
        + 3 * F.huber_loss(net(d.b)[:, 0], d.b[:, 0])
        + ce(z, d)
    ),
    "ce and mse": lambda z, d, net: ce(z, d) + 2 * F.mse_loss(z, d.y),
    "one term twice": lambda z, d, net: (lambda t: t + t)(F.mse_loss(z, d.y)),
    "weight decay": lambda z, d, net: (
        F.mse_loss(z, d.y) + 1e-2 * sum(p.square().sum() for p in net.parameters())
    ),
    "sum and weight decay": lambda z, d, net: (
        (z - d.y).square().sum() + 1e-2 * sum(p.square().mean() for p in net.parameters())
    ),
    "sum and l1 of weights": lambda z, d, net: (
        (z - d.y).square().sum() + 1e-2 * net[0].weight.abs().sum()
    ),
    "mean and l1 of weights": lambda z, d, net: (
        F.mse_loss(z, d.y) + 1e-2 * net[0].weight.abs().mean()
    ),
    "orthogonal weights": lambda z, d, net: (
        (z - d.y).square().sum() + (net[0].weight.T @ net[0].weight - torch.eye(D)).square().sum()
    ),
    "drawn to others": lambda z, d, net: (
        (z - d.y).square().sum() + (CLASS.sum() * (net[0].bias - 0.3)).square().sum()
    ),
    "residuals and weights": lambda z, d, net: (z - d.y, 0.1 * net[0].weight.reshape(-1)),
    "vmapped": lambda z, d, net: torch.vmap(lambda a, b: (a - b).square().mean())(z, d.y).mean(),
    "vmapped sum": lambda z, d, net: torch.vmap(lambda a, b: (a - b).square().sum())(z, d.y).sum(),
    "mahalanobis": lambda z, d, net: (((z - d.y) @ METRIC) * (z - d.y)).sum(1).mean(),
    "mahalanobis by einsum": lambda z, d, net: torch.einsum(
        "ni,ij,nj->n", z - d.y, METRIC, z - d.y
    ).mean(),
    "squares by einsum": lambda z, d, net: (
        torch.einsum("ni,ni->", z - d.y, z - d.y) / max(d.n, 1)
    ),
    "log_prob": lambda z, d, net: -torch.distributions.Normal(z, 0.3).log_prob(d.y).mean(),
    "logsumexp": lambda z, d, net: (z.logsumexp(1) - z.gather(1, d.t[:, None])[:, 0]).mean(),
    "bce of probabilities": lambda z, d, net: F.binary_cross_entropy(z.sigmoid(), d.q),
    "average of terms": lambda z, d, net: sum([F.mse_loss(z, d.y), net(d.b).square().mean()]) / 2,
    "nanmean": lambda z, d, net: torch.nanmean((z - d.y) ** 2),
    "soft margin": lambda z, d, net: F.soft_margin_loss(z, d.y.sign()),
    "squared hinge": lambda z, d, net: F.relu(1 - z * d.y.sign()).square().mean(),
    "fourth powers": lambda z, d, net: ((z - d.y) ** 4).mean(),
    "cauchy": lambda z, d, net: torch.log1p((z - d.y) ** 2 / 0.3).mean(),
    "derivatives": lambda z, d, net: (
        lambda x: (gradient(net(x).sum(1), x) - d.x).square().mean()
    )(d.x.clone().requires_grad_()),
    "focal": lambda z, d, net: (lambda c: ((1 - torch.exp(-c)) ** 2 * c).mean())(
        ce(z, d, reduction="none")
    ),
    "masked rows": lambda z, d, net: ((z - d.y) ** 2)[d.m > 0].mean(),
    "counted where": lambda z, d, net: (
        torch.where(d.w > 0.2, (z - d.y) ** 2, 0.0).sum() / (d.w > 0.2).sum().clamp_min(1)
    ),
    "masked means of outputs": lambda z, d, net: (
        ((d.m[:, None] * (z - d.y) ** 2).sum(0) / d.m.sum()).mean()
    ),
    "outputs by a product": lambda z, d, net: ((z - d.y).square() @ CLASS).mean(),
    "a weight of one entry": lambda z, d, net: (CLASS[:1] * (z - d.y) ** 2).mean(),
    "probabilities": lambda z, d, net: (z.softmax(1) - d.q).square().sum(1).mean(),
    "outputs apart": lambda z, d, net: sum(t.square().mean() for t in (z - d.y).unbind(1)),
    "constant beside": lambda z, d, net: F.mse_loss(z, d.y) + 5.0,
}


COUNTED_IN_EVERY_PART = ("orthogonal weights",)   # the loss of a part holds what counts once


def problem(name, form, batch):
    """(closure, parameters) of a loss on a batch."""
    model = mlp(D, 5, K, seed=1)
    return (lambda: form(model(batch.x), batch, model)), list(model.parameters())


def read(name, form, batch):
    """(Linearization, shares, values of terms and of the penalties) of a loss on a batch."""
    closure, params = problem(name, form, batch)
    tracer, result = Tracer(params), closure()
    trace = tracer.trace(result)
    shares = tracer.shares(result, trace.residual)
    assert [s.size for s in shares] == [s.size for s in tracer.shares(result)]
    assert sum(s.size for s in shares) == trace.residual.numel()
    lin = pgdfast.linearize(closure, params) if batch.n else None
    return lin, shares, tracer.term_values(result), tracer.penalty_value(trace.penalties)


def gradient_of(lin, shares, scales):
    """sum_k s_k J_k^T r_k."""
    rows = torch.cat([torch.full((s.size,), c, dtype=torch.float64) for s, c in zip(shares, scales, strict=True)])
    return lin.vjp(rows * lin.residual)


@pytest.mark.filterwarnings("ignore:var")
@pytest.mark.parametrize("name", ADDITIVE)
def test_parts_combine_to_all_rows(name):
    for sizes in UNEQUAL:
        combined(name, ADDITIVE[name], sizes)


def combined(name, form, sizes):
    parts, everything = batches(sizes)
    full, _, terms, penalty = read(name, form, everything)
    found = [read(name, form, part) for part in parts]
    combination = Combination([shares for _, shares, _, _ in found])
    found_gradient = 0.0
    for part, (lin, shares, _, _), scales in zip(parts, found, combination.scales, strict=True):
        if part.n == 0:
            assert set(scales) <= {0.0}
        else:
            found_gradient = found_gradient + gradient_of(lin, shares, scales)
    if full.penalty is not None:
        found_gradient = found_gradient + full.penalty_gradient
    assert relative(found_gradient, full.gradient()) < 1e-12
    held = [k for k, part in enumerate(parts) if part.n]
    if combination.uniform is not None and name not in COUNTED_IN_EVERY_PART:
        losses = [float(found[k][0].loss) if k in held else float("nan") for k in range(len(parts))]
        penalties = [found[k][3] for k in range(len(parts))]
        total = combination.total(losses, penalties, penalty)
        assert total == pytest.approx(float(full.loss), rel=1e-12)
    values = [found[k][2] if k in held else [0.0] * len(found[k][1]) for k in range(len(parts))]
    assert (None in values) == (terms is None)
    if terms is not None:
        total = combination.total_of_terms(values, penalty)
        assert total == pytest.approx(sum(terms) + penalty, rel=1e-12)


UNDECIDED = {  # where all parts have the same number of rows
    "times one over n",
    "half over n",
    "mean times n",
    "residuals over roots of n",
    "squares of residuals over roots",
    "interior and boundary",
}


@pytest.mark.filterwarnings("ignore:var")
@pytest.mark.parametrize("name", ADDITIVE)
def test_equal_parts_combine_or_are_refused(name):
    for sizes in ([6, 6], [5, 5]):
        if name not in UNDECIDED:
            combined(name, ADDITIVE[name], sizes)
            continue
        if name == "interior and boundary" and sizes == [6, 6]:
            continue  # ten times the mean over twelve points
        with pytest.raises(ValueError, match="whether that number counts rows, or is a constant"):
            combined(name, ADDITIVE[name], sizes)


def normed(d):
    return d.w / d.w.sum()


def uncertain(z, d, net):
    return torch.exp(-net[0].bias[0]) * F.mse_loss(z, d.y) + net[0].bias[0]


REFUSED = {
    "norm": (lambda z, d, net: torch.linalg.norm(z - d.y), "torch.linalg.norm .* takes all rows together"),
    "root of a mean": (lambda z, d, net: F.mse_loss(z, d.y).sqrt(), "torch.sqrt .* is applied to a sum over rows"),
    "logarithm": (lambda z, d, net: F.mse_loss(z, d.y).log(), "torch.log .* is applied to a sum over rows"),
    "roots of sums": (lambda z, d, net: (z - d.y).square().sum(0).sqrt().sum(), "torch.sqrt .* is applied to a sum over rows"),
    "squared mean": (lambda z, d, net: (z - d.y).mean() ** 2, "function of one number"),
    "square of a loss": (lambda z, d, net: F.mse_loss(z, d.y) ** 2, "function of one number"),
    "variance": (lambda z, d, net: z.var(0).sum(), "torch.var .* takes all rows together"),
    "deviation": (lambda z, d, net: z.std(), "torch.std .* takes all rows together"),
    "distance": (lambda z, d, net: torch.dist(z, d.y), "torch.dist .* takes all rows together"),
    "softmax over rows": (
        lambda z, d, net: -(d.q * torch.log_softmax(z, 0)).sum(),
        "torch.log_softmax .* takes all rows together",
    ),
    "learned weight": (uncertain, "depends on other terms"),
    "product of losses": (
        lambda z, d, net: F.mse_loss(z, d.y) * net(d.b).square().mean(),
        "depends on other terms",
    ),
    "first rows": (lambda z, d, net: (z - d.y).square()[:2].sum(), "picks rows by their place"),
    "first row": (lambda z, d, net: (z - d.y).square()[0].sum(), "picks rows by their place"),
    "other factors": (lambda z, d, net: (0.1 * d.n + 0.01) * F.mse_loss(z, d.y), "is multiplied by"),
    "roots of n": (lambda z, d, net: (z - d.y).square().sum() / (d.n + 1.3), "is multiplied by"),
    "normalised weights": (
        lambda z, d, net: (normed(d) * (z - d.y) ** 2).sum(),
        "weights .* sum to one in every part",
    ),
    "decay over n": (
        lambda z, d, net: ((z - d.y).square().sum() + net[0].weight.square().sum()) / d.n,
        "divide a penalty of the parameters",
    ),
    "l1 over n": (
        lambda z, d, net: ((z - d.y).square().sum() + net[0].weight.abs().sum()) / d.n,
        "divide a penalty of the parameters",
    ),
    "terms of some parts": (
        lambda z, d, net: F.mse_loss(z, d.y) + (F.huber_loss(z, d.y) if d.n > 6 else 0.0),
        "has 1 term in part 0 and 2 terms in part 1",
    ),
    "the same in every part": (
        lambda z, d, net: F.mse_loss(z, d.y) + (net(rand(2, D)) - 1).square().sum(),
        "the same value.*in every part",
    ),
    "outputs first": (
        lambda z, d, net: (z - d.y).T.contiguous().square().mean(1).sum(),
        "its outputs are transposed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_combined_is_refused(name):
    form, message = REFUSED[name]
    parts, everything = batches([5, 7])
    with pytest.raises(ValueError, match=message):
        Combination([read(name, form, part)[1] for part in parts])
    assert Combination([read(name, form, everything)[1]]).scales  # one part is all rows


def test_known_shares_follow_the_numbers():
    parts, _ = batches([6, 6])
    model = mlp(D, 5, K)
    tracer = Tracer(list(model.parameters()))

    def shares(divisor, weight):
        result = weight * (model(parts[0].x) - parts[0].y).square().sum() / divisor
        (share,) = tracer.shares(result)
        return share.kind, share.count, share.factor

    for _ in range(2):
        assert shares(6, 0.3) == ("likely", 6.0, 0.3)
        assert shares(7, 0.3) == ("sum", 1.0, pytest.approx(0.3 / 7))
        assert shares(12, 0.4) == ("divided", 12.0, 0.4)


def test_parts_without_rows_count_for_nothing():
    parts, _ = batches([5, 7])
    shares = [read("", ADDITIVE["mse"], part)[1] for part in parts]
    assert Combination([None, *shares, None]).scales == [[], [5 / 12], [7 / 12], []]
    assert Combination([None, None]).scales == [[], []]
    combination = Combination([None, *shares])
    nan = float("nan")
    assert combination.total([nan, 1.2, 2.4], [nan, 0.0, 0.0], 0.5) == pytest.approx(0.5 + 0.5 + 1.4)


@pytest.mark.parametrize("name", ["mse", "over len", "masked mean", "ce class weights", "l1", "four terms"])
def test_float32(name):
    parts, everything = batches([5, 7])
    model = mlp(D, 5, K, seed=1).float()
    for d in (*parts, everything):
        for field in ("x", "y", "w", "m", "q", "b"):
            setattr(d, field, getattr(d, field).float())

    def form(z, d, net):
        if name != "ce class weights":
            return ADDITIVE[name](z, d, net)
        return F.cross_entropy(z, d.t, CLASS.float())

    tracer = Tracer(list(model.parameters()))
    shares = [tracer.shares(form(model(d.x), d, model)) for d in parts]
    total = sum(tracer.term_values(form(model(everything.x), everything, model)))
    values = [tracer.term_values(form(model(d.x), d, model)) for d in parts]
    assert Combination(shares).total_of_terms(values, 0.0) == pytest.approx(total, rel=1e-5)


COMPLEX = {
    "squares": lambda r: r.abs().square().mean(),
    "conjugates": lambda r: (r * r.conj()).real.sum(1).mean(),
    "real view": lambda r: torch.view_as_real(r).square().sum(),
    "norms of rows": lambda r: torch.linalg.vector_norm(r, dim=1).mean(),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_outputs(name):
    w = torch.complex(rand(D, K, seed=1), rand(D, K, seed=2)).requires_grad_()
    parts, everything = batches([5, 1, 7])
    tracer = Tracer([w])

    def loss(d):
        return COMPLEX[name](d.x.to(torch.complex128) @ w - d.y)

    scales = Combination([tracer.shares(loss(d)) for d in parts]).uniform
    total = sum(s * loss(d) for s, d in zip(scales, parts, strict=True))
    assert relative(total, loss(everything)) < 1e-13


def test_penalties_of_parts_must_be_the_same():
    assert common_penalties([{0: 0.2, 3: 1.0}, None, {0: 0.2, 3: 1.0}]) == {0: 0.2, 3: 1.0}
    assert common_penalties([None]) == {}
    with pytest.raises(ValueError, match="parameter 3 are multiplied by 0.5 in part 0 and by 0 in part 1"):
        common_penalties([{0: 0.2, 3: 1.0}, {0: 0.2}])
