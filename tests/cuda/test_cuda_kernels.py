"""Every CUDA kernel, emulated on the CPU, against the reference."""

import pytest
import torch
import torch.nn.functional as F
from helpers import TIGHT, damping_of, gradient, mlp, rand, reference, relative
from torch import nn

import pgdfast
from pgdfast.kernels import cuda

pytestmark = pytest.mark.usefixtures("on_cuda")


def products(lin, ref):
    """The largest relative error of everything that is multiplied with J."""
    assert type(lin.kernels()) is cuda.Kernels
    v, u = rand(lin.num_parameters, seed=3), rand(lin.num_residuals, seed=4)
    pairs = [
        (lin.jvp(v), ref.jvp(v)), (lin.vjp(u), ref.vjp(u)), (lin.dense(), ref.dense()), (lin.gram(), ref.gram()),
        (lin.diagonal(), ref.diagonal()),
    ]
    return max(relative(a, b) for a, b in pairs)


def both(closure, params):
    return pgdfast.linearize(closure, params), reference.linearize(closure, params)


# Around the tiles of products (32) and of K (32 and, in float64, 64), and primes.
@pytest.mark.parametrize("rows", [1, 7, 31, 33, 67])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_networks(rows, outputs, dtype):
    """Residuals below and beyond the 283 or so parameters."""
    model = mlp(3, 13, 11, outputs, dtype=dtype)
    params = list(model.parameters())
    x, y = rand(rows, 3, seed=1, dtype=dtype), rand(rows, outputs, seed=2, dtype=dtype)
    lin, ref = both(lambda: F.mse_loss(model(x), y), params)
    exact = dtype == torch.float64
    assert products(lin, ref) < (1e-13 if exact else 1e-6)
    mu = damping_of(ref)
    expected = reference.solve(ref, mu).step
    for solver in ("dual", "primal", "cg"):
        solution = pgdfast.solve(lin, mu, solver=solver, cg=TIGHT if exact else pgdfast.CG(2000, 1e-6))
        assert solution.status == "solved"
        assert relative(solution.step, expected) < (1e-11 if exact else 2e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("rows", [200, 641])
def test_the_large_tiles(rows, dtype):
    """So many rows that K is built by tiles of 128 (float32) and 64 (float64)."""
    model = mlp(2, 5, 1, dtype=dtype)
    x = rand(rows, 2, seed=1, dtype=dtype)
    lin, ref = both(lambda: model(x), list(model.parameters()))
    K = lin.gram()
    assert lin.kernels()._info(6) == (32 if rows == 200 and dtype == torch.float32 else 64 if dtype == torch.float64 else 128)
    assert relative(K, ref.gram()) < (1e-14 if dtype == torch.float64 else 1e-6)
    assert torch.equal(K, K.T)


class Convolution(nn.Module):
    """A convolution as products with patches: a weight that every row uses at several places."""

    def __init__(self):
        super().__init__()
        self.patch, self.head = nn.Linear(6, 3), nn.Linear(3 * 6, 2)

    def forward(self, x):
        patches = x.unfold(2, 3, 1).transpose(1, 2).flatten(2)
        return self.head(torch.relu(self.patch(patches)).flatten(1))


class Attention(nn.Module):
    def __init__(self, width=6, tokens=4):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(9, width), nn.LayerNorm(width)
        self.qkv, self.head = nn.Linear(width, 3 * width), nn.Linear(width, 5)
        self.place = nn.Parameter(0.1 * torch.ones(tokens, width))

    def forward(self, tokens):
        x = self.embedding(tokens) + self.place
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).unbind(-3)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        weights = torch.softmax(q @ k.mT / 2, -1)
        return self.head((weights @ v).transpose(1, 2).flatten(2)[:, -1])


def convolution():
    model, x = Convolution(), rand(5, 2, 8, seed=1)
    return model, lambda: F.mse_loss(model(x), rand(5, 2, seed=2))


def attention():
    model, tokens = Attention(), torch.arange(28).reshape(7, 4) * 5 % 9
    return model, lambda: F.cross_entropy(model(tokens), torch.arange(7) % 5)


def pinn():
    model, x, edge = mlp(2, 7, 6, 1), rand(9, 2, seed=1).requires_grad_(), rand(4, 2, seed=2)

    def residuals():
        slopes = gradient(model(x), x)
        bends = sum(gradient(slopes[:, d].sum(), x)[:, d] for d in range(2))
        return bends + x[:, 0].detach().sin(), model(edge)

    return model, residuals


def wide_pinn():
    """A weight that is factored, forwards and transposed."""
    model, x = mlp(2, 40, 40, 1), rand(7, 2, seed=1).requires_grad_()
    return model, lambda: gradient(gradient(model(x), x)[:, 0].sum(), x)[:, 0]


def shared_by_the_batch():
    """Batch statistics: residuals that do not separate into rows."""
    model, x = mlp(3, 5, 2), rand(6, 3, seed=1)

    def normed():
        centred = model(x) - model(x).mean(0)
        return centred / (1 + centred.square().mean(0))

    return model, normed


def shared_rows():
    """Residual tensors over the same points, one of them over some of those, in another order."""
    model, x, some = mlp(2, 40, 40, 2), rand(9, 2, seed=1), torch.tensor([7, 5, 6, 1])

    def residuals():
        u = model(x)
        return u[some, 1] * u[some, 0], u[:, 0] - x[:, 1], u[:, 1] - x[:, 0]

    return model, residuals


def penalized():
    model, x = mlp(2, 4, 1), rand(11, 2, seed=1)
    return model, lambda: F.mse_loss(model(x), x[:, :1]) + 1e-2 * sum(p.square().sum() for p in model.parameters())


CLOSURES = {f.__name__: f for f in (convolution, attention, pinn, wide_pinn, shared_by_the_batch, shared_rows, penalized)}


def made(name):
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        model, closure = CLOSURES[name]()
    finally:
        torch.set_default_dtype(before)
    return list(model.parameters()), closure


@pytest.mark.parametrize("name", CLOSURES)
def test_programs_of_every_kind(name):
    params, closure = made(name)
    lin, ref = both(closure, params)
    if name != "penalized":   # the reference has the penalty as rows of J
        assert products(lin, ref) < 1e-12
    mu = damping_of(ref)
    expected = reference.solve(ref, mu).step
    for solver in ("dual", "primal", "cg", "lsmr", "auto"):
        assert relative(pgdfast.solve(lin, mu, solver=solver, cg=TIGHT).step, expected) < 1e-9, solver
    if lin.num_residuals * lin.num_parameters < 20000:
        assert relative(pgdfast.solve(lin, mu, scale=1 + rand(lin.num_parameters).square(), solver="dual").step,
                        reference.solve(ref, mu, scale=1 + rand(lin.num_parameters).square()).step) < 1e-9


def tied(p, q, x):
    return torch.tanh(x @ p) @ p.T + q


FORMS = {   # as in tests/kernels/test_kernels_dense.py: closures whose uses of a weight differ in form
    "tied": lambda p, q, x: tied(p, q, x),
    "two blocks": lambda p, q, x: (tied(p, q, x), torch.sin(x[:5] @ p)[:, :2] * q[:2]),
    "rows shared by blocks": lambda p, q, x: (tied(p, q, torch.cat([x, x[:3]])), (x @ p).sum(1)),
    "slices": lambda p, q, x: torch.tanh(x @ p[:, :3]) @ p[:3] + q,
    "a row vector": lambda p, q, x: torch.tanh(x @ p[:, :1]) @ p[:1] + q,
    "elementwise": lambda p, q, x: torch.tanh(x * q) @ p,
    "one number": lambda p, q, x: torch.tanh(x * q[0]).sum(1) * p[0, 0],
    "a long sum": lambda p, q, x: (torch.tanh(x.repeat(500, 1) + q) @ p).mean(0),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [6, 33])
def test_forms_of_use(form, rows):
    p, q = nn.Parameter(rand(4, 4, seed=1)), nn.Parameter(rand(4, seed=2))
    x = rand(rows, 4, seed=3)
    lin, ref = both(lambda: FORMS[form](p, q, x), [p, q])
    assert products(lin, ref) < 1e-12


@pytest.mark.parametrize("name", ["pinn", "attention", "convolution"])
def test_no_result_depends_on_the_order_of_threads_or_blocks(name, order):
    params, closure = made(name)
    found = []
    for kind in (0, 1, 2):
        order(kind)
        lin = pgdfast.linearize(closure, params)
        v, u = rand(lin.num_parameters, seed=3), rand(lin.num_residuals, seed=4)
        steps = [pgdfast.solve(lin, 0.1, solver=s, cg=pgdfast.CG(60, 1e-12, preconditioner="nystrom")).step
                 for s in ("dual", "primal", "cg")]
        found.append([lin.jvp(v), lin.vjp(u), lin.dense(), lin.gram(), lin.diagonal(), *steps])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_the_whole_optimizer_trains_as_with_the_core(on_cuda):
    losses = []
    for backend in ("native", "reference"):
        model = mlp(2, 9, 1)
        x = rand(40, 2, seed=1)
        optimizer = pgdfast.LM(model.parameters(), damping_rule="gain-ratio", backend=backend)
        losses.append([float(optimizer.step(lambda: F.mse_loss(model(x), x[:, :1].sin()))) for _ in range(8)])  # noqa: B023
    assert relative(torch.tensor(losses[0]), torch.tensor(losses[1])) < 1e-7
    assert losses[0][-1] < 0.1 * losses[0][0]


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_what_is_not_finite_leaves_a_zero_step(solver):
    theta, root = nn.Parameter(rand(5)), nn.Parameter(torch.zeros(1, dtype=torch.float64))
    A = rand(9, 5, seed=1)
    bad = pgdfast.solve(pgdfast.linearize(lambda: A @ theta + root.sqrt(), [theta, root]), 0.1, solver=solver)
    assert not bad.usable and not bad.step.any()


def test_float64_products_of_a_float32_model_and_refinement():
    model = mlp(2, 24, 1, dtype=torch.float32)
    x = rand(300, 2, seed=1, dtype=torch.float32)
    lin, ref = both(lambda: model(x), list(model.parameters()))
    wide = lin.widened()
    v = rand(lin.num_parameters)
    assert wide.jvp(v).dtype == torch.float64 and relative(wide.jvp(v), ref.jvp(v)) < 1e-6
    mu = damping_of(ref, condition=1e5)
    for solver in ("dual", "primal"):
        assert relative(pgdfast.solve(lin, mu, solver=solver).step, reference.solve(ref, mu).step) < 1e-3
