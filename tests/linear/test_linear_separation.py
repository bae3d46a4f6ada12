"""Residuals whose rows separate once blocks share theirs, shared quantities are chained, or a few rows are set aside."""

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, TIGHT, gradient, jacobian_agreement, mlp, parameters, rand, relative

import pgdfast
from pgdfast import reference
from pgdfast.linear import EnsembleLinearizer, Linearizer, plan

N = 36
MASK = (rand(9, 9, seed=5) > 0).double()
MIXING = rand(N, N, seed=6) / 6


def laplacian(u, x):
    slope = gradient(u, x)
    return sum(gradient(slope[:, d], x)[:, d] for d in range(x.shape[1]))


def network(residuals, outputs=1, extra=()):
    """residuals(u, x, data, *extra parameters) of a tanh network u(x) at points that change with every step."""
    model, more = mlp(2, 9, 9, outputs), parameters(*extra)

    def closure(step):
        x = rand(N, 2, seed=10 + step).requires_grad_()
        return residuals(model(x), x, rand(N, 1, seed=50 + step), *more)

    return [*model.parameters(), *more], closure


def weighted(weight, *extra):
    """A network whose middle weight is computed from parameters."""
    first, middle, last, *more = parameters((9, 2), (9, 9), (1, 9), *extra)

    def closure(step):
        h = torch.tanh(rand(N, 2, seed=10 + step) @ first.T)
        return torch.tanh(h @ weight(middle, *more).T) @ last.T - rand(N, 1, seed=50 + step)

    return [first, middle, last, *more], closure


def fitted(model, *shapes):
    """A model f(x, *parameters)."""
    params = parameters(*shapes)
    return params, lambda step: model(rand(N, 2, seed=10 + step), *params) - rand(N, 1, seed=50 + step)[:, 0]


def flow(u, x, data):
    """Two momenta and the divergence, on one forward pass."""
    slopes = [gradient(u[:, k], x) for k in range(3)]
    momenta = [
        u[:, 0] * s[:, 0] + u[:, 1] * s[:, 1] + slopes[2][:, d] - 0.1 * gradient(s[:, d], x)[:, d]
        for d, s in enumerate(slopes[:2])
    ]
    return (*momenta, slopes[0][:, 0] + slopes[1][:, 1] - data[:, 0])


def normalized(step, weights, factor):
    h = rand(N, 7, seed=10 + step)
    for w in weights[:-1]:
        h = h @ (factor * w).T
        h = h - h.mean(0)
        h = torch.tanh(h / (1e-3 + (h * h).mean(0)).sqrt())
    return h @ (factor * weights[-1]).T


def batch_statistics(factor):
    weights = parameters((3, 7), (1, 3))
    return weights, lambda step: normalized(step, weights, factor)


def column(parts):
    return tuple(part[:, None] for part in parts)


EVERY_OTHER = torch.arange(N - 1, -1, -2)
CASES = {   # by what makes them separate
    "shared rows": {
        "three tensors": lambda: network(lambda u, x, y: column(flow(u, x, y)), 3),
        "three flat tensors": lambda: network(flow, 3),
        "three mean squares": lambda: network(
            lambda u, x, y: sum(w * r.square().mean() for w, r in enumerate(flow(u, x, y), 1)), 3),
        "a part of the points": lambda: network(lambda u, x, y: (u[:20] - y[:20], laplacian(u, x))),
        "every other point": lambda: network(lambda u, x, y: (u[EVERY_OTHER] - y[EVERY_OTHER], laplacian(u, x))),
        "permuted points": lambda: network(lambda u, x, y: (laplacian(u, x), u[torch.arange(N).flip(0)] - y)),
        "two outputs and one": lambda: network(lambda u, x, y: (u - y, gradient(u[:, 1], x)[:5].sum(1)), 2),
        "a boundary value": lambda: network(lambda u, x, y: (laplacian(u, x), u[0] - 1, gradient(u, x)[0])),
        "periodic pairs": lambda: network(lambda u, x, y: (laplacian(u, x) - y[:, 0], u[:3] - u[-3:])),
    },
    "border": {
        "data and a mean": lambda: network(lambda u, x, y: (u - y, 10 * u.mean().view(1))),
        "joined with two means": lambda: network(
            lambda u, x, y: torch.cat([(u - y)[:, 0], u.mean().view(1), (u * u).mean().view(1)])),
        "an integral in the middle": lambda: network(lambda u, x, y: torch.cat([u[:9] - y[:9], y.T @ u, u[9:] - y[9:]])),
        "a mean of several outputs": lambda: network(lambda u, x, y: (u - y, u.mean(0)), 3),
        "a mean beside shared rows": lambda: network(lambda u, x, y: (*flow(u, x, y), u[:, 2].sum().view(1)), 3),
    },
    "chain": {
        "exp(k)": lambda: network(lambda u, x, y, k: torch.exp(k) * laplacian(u, x) - y[:, 0], extra=[(1,)]),
        "1 - k": lambda: network(lambda u, x, y, k: (1 - k) * laplacian(u, x) - y[:, 0], extra=[(1,)]),
        "k**2": lambda: network(lambda u, x, y, k: k**2 * laplacian(u, x) - y[:, 0], extra=[(1,)]),
        "several coefficients": lambda: network(
            lambda u, x, y, k: torch.exp(k[0]) * laplacian(u, x) + F.softplus(k[1]) * k[2] * u[:, 0] - k[0], extra=[(3,)]),
        "a width": lambda: fitted(lambda x, s, a: torch.exp(-s.exp() * x[:, :1] ** 2) @ a, (7,), (7,)),
        "centres and widths": lambda: fitted(
            lambda x, s, c, a: torch.exp(-s.exp() * ((x[:, None] - torch.tanh(c)) ** 2).sum(2)) @ a, (7,), (7, 2), (7,)),
        "softplus": lambda: weighted(F.softplus),
        "products of parameters": lambda: weighted(lambda w, v: torch.tanh(w) * v + w, (9, 9)),
        "a mask": lambda: weighted(lambda w: w * MASK),
        "a multiple": lambda: weighted(lambda w: 0.1 * w),
        "a multiple of multiples": lambda: weighted(lambda w: (0.5 * (2 * w)).T / 3),
        "low rank": lambda: weighted(lambda w, a, b: w.detach() + b @ a, (2, 9), (9, 2)),
        "low rank and the weight": lambda: weighted(lambda w, a, b: w + b @ a, (2, 9), (9, 2)),
        "plus and minus": lambda: weighted(lambda w: torch.cat([w[:4], -w[:4], w[8:]])),
        "weight norm": lambda: weighted(lambda w, g: g[:, None] * w / (w * w).sum(1, keepdim=True).sqrt(), (9,)),
        "a symmetric weight": lambda: weighted(lambda w: w + w.T),
        "less the mean": lambda: network(lambda u, x, y: u - u.mean() - y),
        "a hard boundary value": lambda: network(lambda u, x, y: u - u[0] - y),
        "used twice": lambda: network(
            lambda u, x, y, k: (torch.exp(k) * laplacian(u, x), (k - k.exp()) * u - y, k - 1), extra=[(1,)]),
        "batch statistics": lambda: batch_statistics(1),
        "batch statistics of multiples": lambda: batch_statistics(0.7),
        "a mixture": lambda: network(lambda u, x, y: MIXING @ u - y),
        "differences": lambda: network(lambda u, x, y: u[2:] - 2 * u[1:-1] + u[:-2] - y[1:-1] * u[1:-1] ** 2),
        "a coefficient and a mean": lambda: network(lambda u, x, y, k: (k.exp() * u - y, u.mean().view(1) - k), extra=[(1,)]),
    },
}
ALL = {name: make for kind in CASES.values() for name, make in kind.items()}
BY_CHAIN = {*CASES["border"], *CASES["chain"]}


def move(params, step):
    with torch.no_grad():
        for k, p in enumerate(params):
            p.add_(0.1 * rand(*p.shape, seed=90 + 7 * step + k))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ALL)
def test_every_form_over_changing_data(name, backend):
    params, closure = ALL[name]()
    linearizer = Linearizer(params, backend)
    for step in range(3):
        ref, lin = reference.linearize(lambda: closure(step), params), linearizer(lambda: closure(step))   # noqa: B023
        J, mu = ref.dense(), 0.1 * float(ref.diagonal().mean())
        v, u = rand(J.shape[1], seed=1), rand(J.shape[0], seed=2)
        assert lin.row_layout() is not None and lin.coupling == ""
        assert (type(lin.kernels()).__name__ == "Chained") == (name in BY_CHAIN)
        for found, right in (
            (lin.residual, ref.residual), (lin.gram(), J @ J.T), (lin.dense(), J), (lin.diagonal(), ref.diagonal()),
            (lin.jvp(v), J @ v), (lin.vjp(u), J.T @ u), (lin.gram(), J @ J.T),
        ):
            assert relative(found, right) < 1e-11
        assert backend != "native" or torch.equal(lin.gram(), lin.gram().T)
        right = reference.solve(ref, mu).step
        scale = 1 + rand(J.shape[1], seed=3).square()
        for solver in ("dual", "primal", "cg", "eigh"):
            assert relative(pgdfast.solve(lin, mu, solver=solver, cg=TIGHT).step, right) < 1e-9
        for solver in ("dual", "primal"):
            found = pgdfast.solve(lin, mu, solver=solver, scale=scale).step
            assert relative(found, reference.solve(ref, mu, scale=scale).step) < 1e-9
        move(params, step)


PENALIZED = {
    "a coefficient": lambda: network(
        lambda u, x, y, k: (k.exp() * u - y).square().mean() + 0.3 * k.square().sum(), extra=[(1,)]),
    "weights": lambda: penalized(weighted(lambda w, g: F.softplus(w) * g, (9,))),
    "a multiple": lambda: penalized(weighted(lambda w: 0.1 * w)),
    "a border": lambda: penalized(network(lambda u, x, y: torch.cat([u - y, u.mean().view(1, 1)]))),
    "shared rows": lambda: network(lambda u, x, y: sum(r.square().mean() for r in flow(u, x, y)), 3),
}


def penalized(problem):
    params, closure = problem
    squares = lambda: sum((0.1 + k) * p.square().sum() for k, p in enumerate(params[:3]))   # noqa: E731
    return params, lambda step: closure(step).square().mean() + squares()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PENALIZED)
def test_penalties_weigh_parameters(name, backend):
    params, closure = PENALIZED[name]()
    linearizer = Linearizer(params, backend)
    for step in range(2):
        ref, lin = reference.linearize(lambda: closure(step), params), linearizer(lambda: closure(step))   # noqa: B023
        assert lin.row_layout() is not None
        for mu in (0.3, 0.1):
            for solver in ("dual", "primal", "cg", "eigh"):
                found = pgdfast.solve(lin, mu, solver=solver, cg=TIGHT).step
                assert relative(found, reference.solve(ref, mu).step) < 1e-9
        move(params, step)


SINGLE = {
    "shared rows": lambda u, x, w: (u[:, 0] - x[:, 0], u[:, 1] * u[:, 0] - 1),
    "border": lambda u, x, w: (u - x, u.mean(0)),
    "chain": lambda u, x, w: torch.exp(w[0]) * u - w[1] * x,
    "mixture": lambda u, x, w: MIXING.to(u.dtype) @ u - x,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SINGLE)
def test_single_precision_is_widened(name, backend):
    """Steps of float32 problems too ill-conditioned for float32 sums, against the same rounded numbers in float64."""
    model, w, x = mlp(2, 9, 9, 2, dtype=torch.float32), rand(2, dtype=torch.float32), rand(N, 2, dtype=torch.float32)
    params = [*model.parameters(), w.requires_grad_()]
    lin = pgdfast.linearize(lambda: SINGLE[name](model(x), x, w), params, backend=backend)
    ref = reference.linearize(lambda: SINGLE[name](model(x), x, w), params)
    for solver in ("dual", "primal"):
        found, right = pgdfast.solve(lin, 1e-3, solver=solver).step, reference.solve(ref, 1e-3).step
        assert found.dtype == torch.float32 and lin.widened().row_layout() is not None
        assert relative(found, right) < 1e-3


def sweeps(monkeypatch):
    """A list that grows with each product with J^T of a whole program."""
    from pgdfast.kernels import torch_kernels

    seen = []
    product = torch_kernels.Kernels.vjp

    def counted(self, u):
        seen.extend([1] * (len(u) if u.dim() == 2 else 1))
        return product(self, u)

    monkeypatch.setattr(torch_kernels.Kernels, "vjp", counted)
    return seen


@pytest.mark.parametrize("name", ["three tensors", "permuted points", "data and a mean", "exp(k)", "a hard boundary value"])
def test_no_product_for_each_residual(name, monkeypatch):
    params, closure = ALL[name]()
    lin = pgdfast.linearize(lambda: closure(0), params, backend="torch")
    seen = sweeps(monkeypatch)
    lin.gram()
    assert len(seen) <= 4


def test_rows_of_several_tensors_cost_what_joined_ones_do():
    params, closure = network(lambda u, x, y: column(flow(u, x, y)), 3)
    joined, closure_of_joined = network(lambda u, x, y: torch.cat(column(flow(u, x, y)), 1), 3)
    a, b = (
        pgdfast.linearize(lambda c=c: c(0), p).row_layout() for p, c in ((params, closure), (joined, closure_of_joined))
    )
    assert (a.num_rows, a.max_outputs, a.flops, a.blocks) == (b.num_rows, b.max_outputs, b.flops, b.blocks)


def attention():
    weight, = parameters((5, 5))
    x = rand(N, 5)
    return [weight], lambda: torch.softmax(x @ weight @ x.T, 0) @ x


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_separate_says_why(backend):
    params, closure = attention()
    lin = pgdfast.linearize(closure, params, backend=backend)
    assert lin.row_layout() is None and "mixes all points" in lin.coupling
    ref = reference.linearize(closure, params)
    assert relative(lin.dense(), ref.dense()) < 1e-12
    found = pgdfast.solve(lin, 0.1)
    assert relative(found.step, reference.solve(ref, 0.1).step) < 1e-9
    assert "mixes all points" in found.reason


@pytest.mark.parametrize("threads", [1, 2])
def test_few_parameters_take_products_with_J(threads):
    params = parameters((3,), (1,))
    x = rand(N, 3)
    closure = lambda: torch.softmax((x @ params[0] + params[1]), 0)   # noqa: E731
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        lin, ref = pgdfast.linearize(closure, params, backend="native"), reference.linearize(closure, params)
        assert lin.row_layout() is None
        assert relative(lin.dense(), ref.dense()) < 1e-12
    finally:
        torch.set_num_threads(before)


def test_members_of_an_ensemble_share_rows():
    networks = [mlp(2, 6, 2, seed=b) for b in range(3)]
    stack = pgdfast.functional_ensemble(networks)
    x = rand(20, 2)

    def residuals(u):
        return u[..., 0] - 1, u[..., 5:, 1] * u[..., 5:, 0]

    params = list(stack.parameters())
    lin = EnsembleLinearizer(params, 3)(lambda: residuals(stack(x)))
    for b, model in enumerate(networks):
        alone = reference.linearize(lambda: residuals(model(x)), list(model.parameters()))   # noqa: B023
        member = lin.member(b)
        assert member.row_layout() is not None
        assert relative(member.gram(), alone.gram()) < 1e-12


def test_an_optimizer_goes_the_way_of_the_reference():
    finals = []
    for backend in ("native", "torch", "reference"):
        params, closure = ALL["a coefficient and a mean"]()
        optimizer = pgdfast.LM(params, damping_rule="gain-ratio", backend=backend)
        for step in range(6):
            optimizer.step(lambda: closure(step % 2))   # noqa: B023
        finals.append(torch.cat([p.detach().reshape(-1) for p in params]))
    assert relative(finals[0], finals[2]) < 1e-8 and relative(finals[1], finals[2]) < 1e-8


@pytest.mark.parametrize("loss", [
    lambda r: (r.reshape(-1, 1).T @ r.reshape(-1, 1)).squeeze(), lambda r: (r.reshape(1, -1) @ r.reshape(1, -1).T).squeeze(),
    lambda r: r.flatten() @ r.flatten(), lambda r: r.reshape(1, 1, -1).square().sum(),
])
def test_residuals_in_one_row_or_column_are_rows_of_what_makes_them(loss):
    """What is flat but for dimensions of 1 has the rows of the matrix product before it."""
    model, x, y = mlp(3, 6, 2), rand(10, 3, seed=1), rand(10, 2, seed=2)
    params = list(model.parameters())
    lin = pgdfast.linearize(lambda: loss(model(x) - y), params)
    assert (lin.row_layout().num_rows, lin.row_layout().max_outputs) == (10, 2)
    assert jacobian_agreement(Linearizer(params), lambda: loss(model(x) - y), params) < 1e-12


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("width, searches", [(6, 3), (400, 8)])
def test_rows_are_not_looked_for_at_every_step_where_products_are_cheaper(width, searches, more, wide, monkeypatch):
    """A mask of residuals that changes, or takes other numbers of them: of small networks J is made by columns in the end."""
    model, count = mlp(3, width, 2, dtype=torch.float32 if wide else torch.float64), []
    params, x, y = list(model.parameters()), rand(30, 3, seed=1), rand(30, 2, seed=2)
    x, y = x.to(params[0].dtype), y.to(params[0].dtype)
    find = plan.separation
    monkeypatch.setattr(plan, "separation", lambda *given: count.append(0) or find(*given))
    linearizer = Linearizer(params, "native")
    for step in range(8):
        kept = torch.randperm(60, generator=torch.Generator().manual_seed(step)) < 40 + step % 3 * more
        closure = lambda kept=kept: (model(x) - y).flatten()[kept]  # noqa: E731
        lin, ref = linearizer(closure), reference.linearize(closure, params)
        lin = lin.widened() if wide else lin
        assert (lin.row_layout() is None) == (step >= searches)
        pairs = [(lin.dense(), ref.dense()), (lin.gram(), ref.gram()), (lin.gradient(), ref.vjp(ref.residual))]
        assert max(relative(a, b) for a, b in pairs) < (1e-5 if wide else 1e-12)
    assert len(count) == searches
