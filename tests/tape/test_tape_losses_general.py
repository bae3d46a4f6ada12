"""Losses of other forms than squares and cross-entropies by name, against explicit output Hessians and the reference."""

import pytest
import torch
import torch.nn.functional as F
from helpers import EVERYWHERE, agreement, mlp, perturb, rand, relative
from losses import CONVEX, HOLES, LABELS, LOSSES, MONOTONE, REWEIGHTED, ROBUST, ROW, SQUARES, D, K, N, X, Y
from torch.func import functional_call, jacrev, stack_module_state, vmap

import pgdfast
from pgdfast import LM, reference
from pgdfast.linear import EnsembleLinearizer, Linearizer


def network(dtype=torch.float64):
    model = mlp(D, 5, K, dtype=dtype)
    return model, list(model.parameters())


def output_jacobian(model):
    """dz/dtheta by torch.func, (N K, P)."""
    found = jacrev(lambda p: functional_call(model, p, (X,)))(dict(model.named_parameters()))
    return torch.cat([j.reshape(N * K, -1) for j in found.values()], 1).detach()


def hessian(loss, z):
    return torch.autograd.functional.hessian(loss, z).reshape(N * K, N * K)


def expected(name, model):
    """J^T H J with the output Hessian that the loss is documented to take."""
    z, J = model(X).detach(), output_jacobian(model)
    if name in MONOTONE:
        _, inner, slope = MONOTONE[name]
        H = slope(inner(z)) * hessian(inner, z)
    elif name in SQUARES or name in CONVEX:
        H = hessian(LOSSES[name], z)
    else:
        h = hessian(LOSSES[name], z).diagonal()
        slope = torch.autograd.functional.jacobian(LOSSES[name], z).reshape(-1)
        ratio = slope / (z - Y).reshape(-1)
        H = torch.where(h > 1e-3 * ratio, h, ratio).diag()
    return J.T @ H @ J


def gradient(loss, params):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, params)])


@pytest.mark.parametrize("name", [n for group in (SQUARES, CONVEX, REWEIGHTED, ROBUST, MONOTONE) for n in group])
def test_gauss_newton_matrix(name):
    model, params = network()
    linearizer = Linearizer(params)
    for visit in range(3):
        lin = linearizer(lambda: LOSSES[name](model(X)))
        J = lin.dense()
        assert relative(J.T @ J, expected(name, model)) < 1e-10
        assert lin.has_squares_only == (name in SQUARES)
        perturb(params, seed=visit)


@pytest.mark.parametrize("name, backend", [
    *((name, "native") for name in LOSSES), *((name, "torch") for name in list(LOSSES)[::3]),
])
def test_form_agrees_with_the_reference(name, backend):
    model, params = network()
    linearizer = Linearizer(params, backend)
    for visit in range(3):
        assert agreement(linearizer, lambda: LOSSES[name](model(X)), params, seed=visit) < 1e-10
        perturb(params, seed=visit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_that_of_autograd(name, dtype):
    model, params = network(dtype)
    loss = lambda: LOSSES[name](model(X.to(dtype)).double())  # noqa: E731
    linearizer = Linearizer(params)
    for visit in range(3):
        lin = linearizer(loss)
        assert relative(lin.gradient(), gradient(loss(), params)) < 50 * torch.finfo(dtype).eps
        assert relative(lin.loss, loss()) < 10 * torch.finfo(dtype).eps
        perturb(params, seed=visit)


IN_SINGLE = {
    "huber": F.huber_loss,
    "cauchy": lambda z, y: torch.log1p((z - y).square()).mean(),
    "rmse": lambda z, y: F.mse_loss(z, y).sqrt(),
    "l1": lambda z, y: (z - y).abs().mean(),
    "softplus": lambda z, y: (F.softplus(z) - y.sigmoid() * z).mean(),
    "product": lambda z, y: ((z - y) * (z - y)).sum(),
    "quadratic form": lambda z, y: ((z - y) @ ROW.to(z.dtype) * (z - y)).sum(),
    "logsumexp": lambda z, y: (torch.logsumexp(z, 1) - z[torch.arange(N), LABELS]).mean(),
    "learned variance": lambda z, y: F.gaussian_nll_loss(z[:, :2], y[:, :2], torch.exp(z[:, 2:])),
}


@pytest.mark.parametrize("name", IN_SINGLE)
def test_losses_in_single_precision(name):
    """All of it in float32, the loss's own operations too, against float64."""
    (model, params), (single, few), loss = network(), network(torch.float32), IN_SINGLE[name]
    wide = pgdfast.linearize(lambda: loss(model(X), Y), params)
    lin = pgdfast.linearize(lambda: loss(single(X.float()), Y.float()), few)
    v = rand(lin.num_parameters)
    assert lin.dtype == torch.float32
    assert relative(lin.gradient(), wide.gradient()) < 1e-5 and relative(lin.ggn(v.float()), wide.ggn(v)) < 1e-4


@pytest.mark.parametrize("name, backend", [
    *((name, "native") for name in LOSSES), *((name, "reference") for name in list(LOSSES)[::5]),
])
def test_steps_go_downhill(name, backend):
    model, params = network()
    opt = LM(params, backend=backend)
    losses = [float(opt.step(lambda: LOSSES[name](model(X)))) for _ in range(6)]
    assert all(b <= a for a, b in zip(losses, losses[1:], strict=False)) and losses[-1] < losses[0]


@pytest.mark.parametrize("name", LOSSES)
def test_gain_ratio_tends_to_one(name):
    model, params = network()
    opt = LM(params, damping=1e6, damping_rule="gain-ratio")
    opt.step(lambda: LOSSES[name](model(X)))
    assert opt.report.status == "accepted" and abs(opt.report.gain_ratio - 1) < 1e-3


# --- missing numbers, exact fits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [
    lambda z: ((z - HOLES) ** 2).nansum(), lambda z: ((z - HOLES) ** 2).nanmean(), lambda z: (z - HOLES).square().nanmean(),
])
def test_missing_numbers_count_for_nothing(loss):
    model, params = network()
    known, linearizer = ~HOLES.isnan(), Linearizer(params)
    count = 1 if loss(torch.zeros_like(Y)) > 2 * HOLES[known].square().mean() else int(known.sum())
    for visit in range(3):
        closure = lambda: (model(X) - Y)[known].square().sum() / count  # noqa: E731
        lin, same = linearizer(lambda: loss(model(X))), pgdfast.linearize(closure, params)
        v = rand(lin.num_parameters, seed=visit)
        assert relative(lin.gradient(), same.gradient()) < 1e-12 and relative(lin.ggn(v), same.ggn(v)) < 1e-12
        assert agreement(linearizer, lambda: loss(model(X)), params) < 1e-12
        perturb(params, seed=visit)


@pytest.mark.parametrize("loss", [
    torch.linalg.vector_norm, lambda r: r.square().mean().sqrt(), lambda r: r.abs().mean(), torch.std,
    lambda r: torch.maximum(0.3 * r, -0.7 * r).sum(), lambda r: r.norm(dim=1).sum(), lambda r: torch.log1p(r**2).mean(),
], ids=range(7))
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_no_residual_where_the_fit_is_exact(loss, backend):
    model, params = network()
    target, before = model(X).detach(), [p.detach().clone() for p in params]
    opt = LM(params, backend=backend)
    assert float(opt.step(lambda: loss(model(X) - target))) == 0
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True)) and opt.converged


def test_another_weight_matrix_is_noticed(monkeypatch):
    """Its eigenvectors are kept as long as it is the same."""
    z, found = rand(12, seed=1).requires_grad_(), []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda A: found.append(0) or eigh(A))
    linearizer = Linearizer([z])
    for visit, (seed, decompositions) in enumerate([(2, 1), (2, 1), (2, 1), (3, 2), (3, 2)]):
        root = rand(12, 12, seed=seed)
        W = root @ root.T
        J = linearizer(lambda W=W: (lambda r: r @ W @ r)(3 * z)).dense()
        assert relative(J.T @ J, 18 * W) < 1e-12 and len(found) == decompositions, visit
        perturb([z], seed=visit)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_a_hinge_is_pulled_to_its_kink(backend):
    z, y = rand(20, seed=1).requires_grad_(), rand(20, seed=2).sign()
    linearize = reference.linearize if backend == "reference" else pgdfast.linearize
    lin = linearize(lambda: torch.maximum(torch.zeros_like(z), 1 - y * z).sum(), [z])
    short = (1 - y * z.detach()).clamp(min=0)
    found, floor = lin.dense(), 1e-3 * (1 - y * z.detach()).abs().mean()
    expected = torch.where(short > 0, 1 / torch.maximum(short, floor), 0.0)
    assert relative(found.T @ found, expected.diag()) < 1e-12


# --- losses of a location, whose minimum is known -----------------------------------------------------------------------------

DATA = rand(101, seed=3)


@pytest.mark.parametrize("loss, minimum", [
    (lambda r: r.abs().mean(), DATA.median()),
    (lambda r: torch.maximum(0.1 * r, -0.9 * r).mean(), DATA.quantile(0.9)),
    (lambda r: torch.max(0.75 * r, -0.25 * r).mean(), DATA.quantile(0.25)),
    (lambda r: torch.linalg.vector_norm(r), DATA.mean()),
    (lambda r: torch.log(r.square().mean()), DATA.mean()),
], ids=range(5))
def test_location_converges_to_its_minimum(loss, minimum):
    p = torch.tensor([4.0], dtype=torch.float64, requires_grad=True)
    opt = LM([p])
    for _ in range(60):
        opt.step(lambda: loss(p - DATA))
    assert float(loss(p.detach() - DATA) - loss(minimum - DATA)) < 1e-4


# --- parameters in the loss ---------------------------------------------------------------------------------------------------


def scale(value):
    return torch.tensor([value], dtype=torch.float64, requires_grad=True)


HEADS = rand(2, 3, K, seed=9)


def kl(mean, log_variance):
    """Of a normal distribution from the standard one: linear in the logarithm of the variance, beside its exponential."""
    return -0.5 * torch.sum(1 + log_variance - mean.pow(2) - log_variance.exp())


WITH_PARAMETERS = {   # of a model's outputs, its parameters, and a learned number s
    "l1 penalty": lambda z, ps, s: F.mse_loss(z, Y) + 0.01 * sum(p.abs().sum() for p in ps),
    "mean of all": lambda z, ps, s: F.mse_loss(z, Y) + 0.01 * torch.cat([p.flatten() for p in ps]).abs().mean(),
    "group lasso": lambda z, ps, s: F.mse_loss(z, Y) + 0.01 * sum(p.norm() for p in ps),
    "elastic net": lambda z, ps, s: F.cross_entropy(z, LABELS) + 0.01 * sum(p.abs().sum() + p.square().sum() for p in ps),
    "root beside a penalty": lambda z, ps, s: F.mse_loss(z, Y).sqrt() + 1e-3 * sum(p.square().sum() for p in ps),
    "uncertainty": lambda z, ps, s: (torch.exp(-s) * F.mse_loss(z, Y) + s).sum(),
    "uncertainty of two": lambda z, ps, s: (
        0.5 * torch.exp(-s) * F.mse_loss(z[:, :2], Y[:, :2]) + torch.exp(-2 * s) * F.huber_loss(z[:, 2:], Y[:, 2:]) + s).sum(),
    "deviation": lambda z, ps, s: (F.mse_loss(z, Y) / (2 * s**2) + torch.log(s)).sum(),
    "bounded deviation": lambda z, ps, s: (F.mse_loss(z, Y) / (2 * s**2) + torch.log(1 + s**2)).sum(),
    "deviation in the residual": lambda z, ps, s: ((z - Y) / s).square().mean() + torch.log(s).sum(),
    "variance": lambda z, ps, s: F.gaussian_nll_loss(z, Y, torch.exp(s).expand(N, K)),
    "normal": lambda z, ps, s: -torch.distributions.Normal(z, torch.exp(s)).log_prob(Y).mean(),
    "student": lambda z, ps, s: -torch.distributions.StudentT(3.0, z, torch.exp(s)).log_prob(Y).mean(),
    "laplace": lambda z, ps, s: -torch.distributions.Laplace(z, torch.exp(s)).log_prob(Y).mean(),
    "variational": lambda z, ps, s: F.mse_loss(z, Y) + 0.1 * kl(F.linear(z, HEADS[0]), F.linear(z, HEADS[1])),
    "poisson beside a penalty": lambda z, ps, s: (
        torch.exp(z).mean() - 0.3 * (z * Y.abs()).mean() + 0.01 * sum(p.abs().sum() for p in ps)),
    "learned weights": lambda z, ps, s: ((s + HEADS[0, 0]) ** 2 * (z - Y) ** 2).mean(),
    "learned weights of huber": lambda z, ps, s: (s**2 * F.huber_loss(z, Y, reduction="none")).mean(),
    "product of losses": lambda z, ps, s: F.mse_loss(z, Y) * F.huber_loss(2 * z, Y),
    "sum of logarithms": lambda z, ps, s: F.mse_loss(z, Y).log() + z.square().mean().log(),
    "three kinds": lambda z, ps, s: F.huber_loss(z, Y) + 3 * z[:2].square().mean() + 0.1 * (z[:3] - 1).abs().mean(),
}


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_parameters_in_the_loss(name):
    model, params = network()
    s = scale(1.3)
    loss = lambda: WITH_PARAMETERS[name](model(X), params, s)  # noqa: E731
    uses = torch.autograd.grad(loss(), s, allow_unused=True)[0] is not None
    learned = [*params, s] if uses else params
    linearizer = Linearizer(learned)
    for visit in range(3):
        assert agreement(linearizer, loss, learned, seed=visit) < 1e-12
        assert relative(linearizer(loss).gradient(), gradient(loss(), learned)) < 1e-12
        perturb(learned, seed=visit, size=0.03)
    opt = LM(learned)
    losses = [float(opt.step(loss)) for _ in range(6)]
    assert all(b <= a for a, b in zip(losses, losses[1:], strict=False)) and losses[-1] < losses[0]


def test_curvature_along_a_learned_scale():
    """exp(-s) L + s: second derivative exp(-s) L, and |1 - exp(-s) L| added, which vanishes at the minimum."""
    model, params = network()
    s = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    lin = pgdfast.linearize(lambda: (torch.exp(-s) * F.mse_loss(model(X), Y) + s).sum(), [*params, s])
    weighted = (torch.exp(-s) * F.mse_loss(model(X), Y)).item()
    assert float(lin.diagonal()[-1]) == pytest.approx(weighted + abs(1 - weighted), rel=1e-12)


@pytest.mark.parametrize("form", [
    lambda w, r: w**2 * r**2, lambda w, r: r**2 * w**2, lambda w, r: r.square() * torch.abs(w), lambda w, r: w**2 * (r**2).T.T,
])
def test_curvature_beside_learned_weights(form):
    """Of a square with its weight held."""
    model, params = network()
    w = (rand(N, K, seed=5) + 0.1).requires_grad_()
    loss, count = lambda: form(w, model(X) - Y).mean(), N * K
    lin = pgdfast.linearize(loss, [*params, w])
    weight, J = form(w, torch.ones_like(w)).detach().reshape(-1), output_jacobian(model)
    sub = lin.dense().T @ lin.dense()
    assert relative(sub[: J.shape[1], : J.shape[1]], J.T @ (2 / count * weight[:, None] * J)) < 1e-12
    held = torch.autograd.functional.hessian(lambda v: form(v, model(X) - Y).sum(), w.detach()).reshape(N * K, N * K) / count
    if bool(held.any()):   # of squares; of |w| there is none
        assert relative(sub[J.shape[1] :, J.shape[1] :], held.detach()) < 1e-12
    assert relative(lin.gradient(), gradient(loss(), [*params, w])) < 1e-12


# --- without rules, corrected, of ensembles -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:pgdfast. no tape rule")
@pytest.mark.parametrize("name", list(LOSSES)[::3])
def test_products_without_a_program(name):
    model, params = network()

    def closure():
        z = model(X)
        z.register_hook(lambda g: 1 * g)
        return LOSSES[name](z)

    assert agreement(Linearizer(params), closure, params) < 1e-10


@pytest.mark.parametrize("acceleration", ["geodesic", "chord"])
@pytest.mark.parametrize("name", SQUARES)
def test_squares_may_be_corrected(name, acceleration):
    model, params = network()
    opt = LM(params, acceleration=acceleration)
    losses = [float(opt.step(lambda: LOSSES[name](model(X)))) for _ in range(4)]
    assert all(b <= a for a, b in zip(losses, losses[1:], strict=False))
    twin, same = network()
    rows = reference.linearize(lambda: LOSSES[name](twin(X)), same)
    assert rows.squares_only


@pytest.mark.parametrize("name", ["huber", "l1", "rmse", "logsumexp", "cauchy", "learned variance"])
def test_others_may_not(name):
    model, params = network()
    with pytest.raises(ValueError, match="not a sum of squares with constant weights"):
        LM(params, acceleration="chord").step(lambda: LOSSES[name](model(X)))


OF_MEMBERS = {   # (B, N, K) outputs -> (B,)
    "huber": lambda z: F.huber_loss(z, Y.expand_as(z), reduction="none").mean((-2, -1)),
    "log-cosh": lambda z: torch.log(torch.cosh(z - Y)).mean((-2, -1)),
    "cauchy": lambda z: torch.log1p((z - Y) ** 2).sum((-2, -1)),
    "rmse": lambda z: ((z - Y) ** 2).mean((-2, -1)).sqrt(),
    "norm": lambda z: torch.linalg.vector_norm(z - Y, dim=(-2, -1)),
    "logsumexp": lambda z: (torch.logsumexp(z, -1) - z[..., 0]).mean(-1),
    "mahalanobis": lambda z: torch.einsum("...ni,ij,...nj->...n", z - Y, ROW, z - Y).mean(-1),
    "variance": lambda z: (z - Y).var((-2, -1)),
    "quantile": lambda z: (lambda e: torch.maximum(0.3 * e, -0.7 * e).mean((-2, -1)))(z - Y),
    "learned variance": lambda z: F.gaussian_nll_loss(
        z[..., :2], Y[:, :2].expand_as(z[..., :2]), torch.exp(z[..., 2:]), reduction="none").mean((-2, -1)),
}


@pytest.mark.parametrize("name", OF_MEMBERS)
def test_members_of_an_ensemble_are_as_alone(name):
    members = [mlp(D, 5, K, seed=b) for b in range(3)]
    values, buffers = stack_module_state(members)
    ensemble = EnsembleLinearizer(list(values.values()), 3)

    def closure():
        return OF_MEMBERS[name](vmap(lambda p, b: functional_call(members[0], (p, b), (X,)))(values, buffers))

    for _ in range(3):
        lin = ensemble(closure)
    assert lin.separates
    for b, model in enumerate(members):
        alone, member = pgdfast.linearize(lambda m=model: OF_MEMBERS[name](m(X)), list(model.parameters())), lin.member(b)
        v = rand(alone.num_parameters, seed=b)
        assert relative(member.gradient(), alone.gradient()) < 1e-12 and relative(member.ggn(v), alone.ggn(v)) < 1e-12
