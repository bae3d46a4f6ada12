"""Losses as users write them, as functions of the outputs z, (N, K), in groups by what is known of their output Hessian."""

import math

import torch
import torch.nn.functional as F
from helpers import rand

N, K, D = 6, 4, 3   # samples, outputs, inputs
X, Y = rand(N, D, seed=1), rand(N, K, seed=2)
WEIGHTS = rand(N, K, seed=3).square()
LABELS = torch.tensor([0, 1, 2, 3, 3, 1])
SOFT = torch.softmax(Y, 1)
HARD = (Y > 0).double()
COLUMN, ROW = (lambda m: m @ m.T)(rand(N, N, seed=6)), (lambda m: m @ m.T)(rand(K, K, seed=5))
SINGULAR = (lambda m: m @ m.T)(rand(N, 2, seed=7))
HOLES = torch.where(WEIGHTS > 2, torch.nan, Y)


def written(z, *values):
    """Losses written into a tensor, one after the other, and summed."""
    losses = torch.zeros(len(values), dtype=z.dtype)
    for k, value in enumerate(values):
        losses[k] = value
    return losses.sum()


def of(function, *arguments):
    """A function of the residual z - Y."""
    return lambda z: function(z - Y, *arguments)


SQUARES = {   # sums of squares with constant weights
    "inner": of(lambda r: torch.inner(r.flatten(), r.flatten())),
    "vdot": of(lambda r: torch.vdot(r.flatten(), r.flatten())),
    "einsum": of(lambda r: torch.einsum("ij,ij->", r, r)),
    "einsum transposed": of(lambda r: torch.einsum("ij,ji->", r, r.T)),
    "einsum rows": of(lambda r: torch.einsum("ij,ij->i", r, r).mean()),
    "trace": of(lambda r: torch.trace(r.T @ r)),
    "column": lambda z: (lambda r: (r.T @ r).squeeze())((z - Y)[:, :1]),
    "weighted column": lambda z: (lambda r: (r.T @ COLUMN @ r).squeeze())((z - Y)[:, :1]),
    "weighted vector": lambda z: (lambda r: r @ COLUMN @ r)((z - Y)[:, 1]),
    "weighted column, sliced twice": lambda z: z[:, 0] @ COLUMN @ z[:, 0],
    "weighted samples": of(lambda r: (WEIGHTS[:, 0] * torch.einsum("ni,ij,nj->n", r, ROW, r)).sum()),
    "singular weights": lambda z: (lambda r: r @ SINGULAR @ r)((z - Y)[:, 1]),
    "weighted columns": of(lambda r: (r * (COLUMN @ r)).sum()),
    "weighted rows": of(lambda r: ((r @ ROW) * r).mean()),
    "mahalanobis": of(lambda r: torch.einsum("ni,ij,nj->n", r, ROW, r).mean()),
    "written twice": lambda z: ((z - Y) * (z - Y)).sum(),
    "expanded": lambda z: (z**2 - 2 * z * Y + Y**2).mean(),
    "expanded in sums": lambda z: (z**2).mean() - 2 * (z * Y).mean() + (Y**2).mean(),
    "variance": of(torch.var),
    "variance of rows": of(lambda r: torch.var(r, dim=1, correction=0).sum()),
    "kept variance": of(lambda r: (torch.var(r, dim=0, keepdim=True) * WEIGHTS[0]).mean()),
    "in place": lambda z: written(z, (z - Y).square().mean(), F.mse_loss(z, 2 * Y)),
    "squared hinge": lambda z: F.relu(1 - Y.sign() * z).pow(2).mean(),
    "split": lambda z: sum(part.sum() for part in z.square().split([1, 3], 1)),
    "normal": lambda z: -torch.distributions.Normal(z, 0.3).log_prob(Y).mean(),
    "gaussian nll": lambda z: F.gaussian_nll_loss(z, Y, WEIGHTS + 0.1),
}
CONVEX = {   # the Hessian is positive (semi)definite, and taken as it is
    "logsumexp": lambda z: (torch.logsumexp(z, 1) - z[torch.arange(N), LABELS]).mean(),
    "logsumexp in sums": lambda z: torch.logsumexp(z, 1).mean() - z.gather(1, LABELS[:, None]).mean(),
    "log of a sum of exponentials": lambda z: (torch.exp(z).sum(1).log() - z[torch.arange(N), LABELS]).mean(),
    "log of a mean of exponentials": lambda z: (torch.log(torch.exp(z / 2).mean(1)) - z[torch.arange(N), LABELS] / 2).sum(),
    "quotient of exponentials": lambda z: (lambda e: -torch.log(e / e.sum(-1, keepdim=True))[range(N), LABELS].mean())(z.exp()),
    "exponentials below 1": lambda z: (
        lambda d: (d.exp().sum(1).log() - d.gather(1, LABELS[:, None])[:, 0]).mean())(z - z.amax(1, keepdim=True).detach()),
    "log of softmax": lambda z: -torch.log(torch.softmax(z, 1)[torch.arange(N), LABELS]).mean(),
    "soft labels": lambda z: -(SOFT * torch.log(torch.softmax(z, 1))).sum(1).mean(),
    "categorical": lambda z: -torch.distributions.Categorical(logits=z).log_prob(LABELS).mean(),
    "bernoulli": lambda z: -torch.distributions.Bernoulli(logits=z).log_prob(HARD).mean(),
    "kl_div": lambda z: F.kl_div(F.log_softmax(z, 1), SOFT, reduction="batchmean"),
    "bce of probabilities": lambda z: F.binary_cross_entropy(torch.sigmoid(z), SOFT, WEIGHTS),
    "bce by hand": lambda z: (lambda p: -(SOFT * p.log() + (1 - SOFT) * (1 - p).log()).mean())(torch.sigmoid(z)),
    "softplus": lambda z: (F.softplus(z) - SOFT * z).mean(),
    "stable bce": lambda z: (z.clamp(min=0) - z * SOFT + torch.log1p(torch.exp(-z.abs()))).mean(),
    "multilabel soft margin": lambda z: F.multilabel_soft_margin_loss(z, HARD),
    "soft margin": lambda z: F.soft_margin_loss(z, Y.sign()),
    "pseudo-huber": of(lambda r: (torch.sqrt(1 + (r / 2) ** 2) - 1).mean()),
    "log-cosh": of(lambda r: torch.log(torch.cosh(r)).mean()),
    "log-cosh by softplus": of(lambda r: (r + F.softplus(-2 * r) - math.log(2)).mean()),
    "power 4": of(lambda r: (r**4).sum()),
    "power 1.5": of(lambda r: (r.abs() ** 1.5 * WEIGHTS).sum()),
    "poisson": lambda z: F.poisson_nll_loss(z, Y.abs()),
    "poisson of rates": lambda z: F.poisson_nll_loss(z.exp(), Y.abs(), log_input=False),
    "poisson of softplus": lambda z: F.poisson_nll_loss(F.softplus(z), Y.abs(), log_input=False),
}
REWEIGHTED = {   # piecewise linear: reweighted, h = f'/a
    "l1": of(lambda r: r.abs().mean()),
    "l1_loss": lambda z: F.l1_loss(z, Y),
    "1-norm": of(lambda r: torch.linalg.vector_norm(r, 1)),
    "laplace": lambda z: -torch.distributions.Laplace(z, 0.3).log_prob(Y).mean(),
    "quantile": of(lambda r: torch.maximum(0.3 * r, -0.7 * r).mean()),
    "quantile, written twice": lambda z: torch.maximum(0.9 * (Y - z), -0.1 * (Y - z)).mean(),
    "quantile by max": lambda z: (lambda e: torch.max(0.3 * e, (0.3 - 1) * e).mean())(Y - z),
    "quantile by clamp": of(lambda r: (0.3 * r.clamp(min=0) + 0.7 * (-r).clamp(min=0)).sum()),
    "quantile by relu": of(lambda r: (0.3 * F.relu(r) + 0.7 * F.relu(-r)).sum()),
    "quantile by abs": of(lambda r: (0.5 * r.abs() - 0.2 * r).mean()),
}
ROBUST = {   # f'' where it is positive, f'/a where not
    "huber": lambda z: F.huber_loss(z, Y),
    "huber weighted": lambda z: (WEIGHTS * F.huber_loss(z, Y, reduction="none", delta=0.5)).sum(),
    "huber swapped": lambda z: F.huber_loss(Y, z, delta=0.3, reduction="sum"),
    "huber by hand": of(lambda r: torch.where(r.abs() < 0.5, 0.5 * r**2, 0.5 * (r.abs() - 0.25)).mean()),
    "smooth_l1": lambda z: F.smooth_l1_loss(z, Y, beta=0.4),
    "cauchy": of(lambda r: torch.log(1 + r**2).mean()),
    "lorentzian": of(lambda r: torch.log1p(0.5 * r.square()).sum()),
    "geman-mcclure": of(lambda r: (lambda s: (s / (1 + s)).mean())(r**2)),
    "welsch": of(lambda r: (1 - torch.exp(-(r**2))).mean()),
    "student": lambda z: -torch.distributions.StudentT(4.0, z, 0.3).log_prob(Y).mean(),
}
MONOTONE = {   # (loss, sum, phi'(sum))
    "norm": (of(torch.norm), of(lambda r: r.square().sum()), lambda s: 0.5 / s.sqrt()),
    "linalg norm": (of(torch.linalg.norm), of(lambda r: r.square().sum()), lambda s: 0.5 / s.sqrt()),
    "dist": (lambda z: torch.dist(z, Y), of(lambda r: r.square().sum()), lambda s: 0.5 / s.sqrt()),
    "rmse": (lambda z: torch.sqrt(F.mse_loss(z, Y)), lambda z: F.mse_loss(z, Y), lambda s: 0.5 / s.sqrt()),
    "power of mse": (lambda z: F.mse_loss(z, Y) ** 0.5, lambda z: F.mse_loss(z, Y), lambda s: 0.5 / s.sqrt()),
    "relative": (of(lambda r: r.norm() / Y.norm()), of(lambda r: r.square().sum()), lambda s: 0.5 / s.sqrt() / Y.norm()),
    "log of mse": (lambda z: torch.log(F.mse_loss(z, Y)), lambda z: F.mse_loss(z, Y), lambda s: 1 / s),
    "log10 of mse": (lambda z: torch.log10(F.mse_loss(z, Y)), lambda z: F.mse_loss(z, Y), lambda s: 1 / (s * math.log(10))),
    "exp of mse": (lambda z: torch.exp(F.mse_loss(z, Y)), lambda z: F.mse_loss(z, Y), torch.exp),
    "deviation": (of(torch.std), of(torch.var), lambda s: 0.5 / s.sqrt()),
    "log of cross-entropy": (
        lambda z: F.cross_entropy(z, LABELS).log(), lambda z: F.cross_entropy(z, LABELS), lambda s: 1 / s),
}
OTHERS = {   # exact gradients and agreement with the reference, no formula of their own
    "quantile by where": of(lambda r: torch.where(r >= 0, 0.3 * r, -0.7 * r).mean()),
    "two differences": lambda z: ((z[:, :2] - z[:, 2:].sin()) * (z[:, :2] - z[:, 2:].sin())).sum(),
    "row norms": of(lambda r: (r.norm(dim=1) / Y.norm(dim=1)).mean()),
    "huber of two outputs": lambda z: F.huber_loss(z[:, :2], z[:, 2:].sin()),
    "stacked": lambda z: torch.stack([F.huber_loss(z, Y), F.mse_loss(z, Y)]).sum(),
    "huber in place": lambda z: written(z, F.huber_loss(z, Y), F.mse_loss(z, 2 * Y)),
    "rmse and cross-entropy": lambda z: torch.sqrt(F.mse_loss(z, Y)) + F.cross_entropy(z, LABELS),
    "hinge": lambda z: F.relu(1 - Y.sign() * z).mean(),
    "focal": lambda z: (lambda ce: ((1 - torch.exp(-ce)) ** 2 * ce).mean())(F.cross_entropy(z, LABELS, reduction="none")),
    "focal of probabilities": lambda z: (lambda p: -((1 - p) ** 2 * p.log()).mean())(torch.softmax(z, 1)[range(N), LABELS]),
    "categorical of probabilities": lambda z: (
        -torch.distributions.Categorical(probs=torch.softmax(z, 1)).log_prob(LABELS).mean()),
    "probability": lambda z: 1 - torch.softmax(z, 1)[range(N), LABELS].mean(),
    "charbonnier": of(lambda r: torch.sqrt(r**2 + 1e-6).mean()),
    "learned variance": lambda z: F.gaussian_nll_loss(z[:, :2], Y[:, :2], torch.exp(z[:, 2:])),
    "learned log variance": lambda z: (0.5 * z[:, 2:] + 0.5 * (z[:, :2] - Y[:, :2]) ** 2 * torch.exp(-z[:, 2:])).mean(),
    "learned deviation": lambda z: -torch.distributions.Normal(z[:, :2], torch.exp(z[:, 2:])).log_prob(Y[:, :2]).mean(),
    "softplus variance": lambda z: F.gaussian_nll_loss(z[:, :2], Y[:, :2], F.softplus(z[:, 2:])),
}
LOSSES = SQUARES | CONVEX | REWEIGHTED | ROBUST | {name: loss for name, (loss, _, _) in MONOTONE.items()} | OTHERS
