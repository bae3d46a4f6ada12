"""The Jacobian by autograd alone: by rows and columns, in batches, widened; and which solver it goes to."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    SOLVERS,
    TIGHT,
    ByNumpy,
    damping_of,
    forget_rules,
    jacobian_agreement,
    mlp,
    perturb,
    rand,
    relative,
    spectrum,
)

import pgdfast
from pgdfast import reference
from pgdfast.linear import EnsembleLinearizer, Linearizer, double_backward
from pgdfast.linear.announce import called

X, Y = rand(6, 3, seed=1), rand(6, 4, seed=2)
pytestmark = pytest.mark.filterwarnings("ignore:pgdfast. no tape rule")


@pytest.fixture(autouse=True)
def no_rules(monkeypatch):
    forget_rules(monkeypatch, "CumsumBackward0", "RollBackward0", "TrilinearBackward0")


class Once(torch.autograd.Function):
    """The cube, which says that it can be differentiated once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


FORMS = {
    "cumsum": lambda z: z.cumsum(0),
    "two blocks": lambda z: (z.cumsum(0), z[:2].cumsum(1)),
    "mse of two": lambda z: F.mse_loss(z.cumsum(0), 0.5 * z),
    "cross-entropy": lambda z: F.cross_entropy(z.cumsum(0), torch.arange(6) % 4),
    "numpy": ByNumpy.apply,
    "once": Once.apply,
    "nothing": lambda z: (z[:0].cumsum(0), z.cumsum(0)[:1]),
}


@pytest.mark.parametrize("memory", ["cache", "few", "one"])
@pytest.mark.parametrize("columns", [0.0, 1e9], ids=["columns", "rows"])
@pytest.mark.parametrize("form", FORMS)
def test_rows_and_columns(form, columns, memory, monkeypatch):
    monkeypatch.setattr(double_backward, "_COLUMN", columns)
    if memory != "cache":
        monkeypatch.setattr(double_backward, "_CACHE_BYTES", 0)
    if memory == "one":
        monkeypatch.setattr(double_backward, "_FEW_BYTES", 0)
    model = mlp(3, 5, 4)
    params = list(model.parameters())
    closure = lambda: FORMS[form](model(X))  # noqa: E731
    linearizer = Linearizer(params)
    for visit in range(2):
        assert jacobian_agreement(linearizer, closure, params, seed=visit) < 1e-12
        lin = linearizer(closure)
        size = {"few": 8, "one": 1}.get(memory)
        assert size is None or lin.kernels().rows_per_sweep == size
        U, V = rand(3, lin.num_residuals, seed=3), rand(3, lin.num_parameters, seed=4)
        products, J = (lin.kernels().vjp(U), lin.kernels().jvp(V)), lin.dense()
        assert relative(products[0], U @ J) < 1e-12 and relative(products[1], V @ J.T) < 1e-12
        assert relative(lin.kernels().normal(), J.T @ J) < 1e-12
        assert form == "numpy" or lin.kernels().learned.batched == {"rows": True, "columns": True}
        perturb(params, seed=visit)


def test_a_backward_that_misreads_a_batch_is_noticed():
    batched = torch._C._functorch.is_batchedtensor

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return 3 * g if batched(g) else 2 * g

    model = mlp(3, 5, 4)
    params = list(model.parameters())
    linearizer = Linearizer(params)
    for _ in range(2):
        J = linearizer(lambda: Wrong.apply(model(X)).cumsum(0)).dense()
        assert relative(J, reference.linearize(lambda: (2 * model(X)).cumsum(0), params).dense()) < 1e-12


def test_a_lack_of_memory_does_not_end_batches(monkeypatch):
    model = mlp(3, 5, 4)
    linearizer, own = Linearizer(model.parameters()), double_backward._grad
    error = [RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried")]

    def failing(outputs, inputs, cotangents, batched):
        if batched:
            raise error[0]
        return own(outputs, inputs, cotangents, batched)

    monkeypatch.setattr(double_backward, "_grad", failing)
    lin = linearizer(lambda: model(X).cumsum(0))
    lin.dense()
    assert lin.kernels().learned.batched["rows"]
    error[0] = ZeroDivisionError()   # anything else does
    lin = linearizer(lambda: model(X).cumsum(0))
    lin.dense()
    assert not lin.kernels().learned.batched["rows"]


def test_few_parameters_take_few_products():
    """P = 3, M = 20,000: the columns, not the rows."""
    p, t = rand(3).requires_grad_(), torch.linspace(0, 1, 20000, dtype=torch.float64)
    closure = lambda: (p[0] * torch.exp(-p[1] * t) + p[2]).cumsum(0) / 100  # noqa: E731
    lin = pgdfast.linearize(closure, [p])
    operator, passes = lin.kernels(), []
    own = operator._pushed
    operator._pushed = lambda v: passes.append(v.shape) or own(v)
    J = lin.dense()
    assert passes == [(3, 3)] and relative(lin.vjp(rand(20000)), J.T @ rand(20000)) < 1e-12
    decay = torch.exp(-p[1] * t).detach()
    exact = torch.stack([decay, -p[0].detach() * t * decay, torch.ones_like(t)], 1).cumsum(0) / 100
    assert relative(J, exact) < 1e-12
    optimizer = pgdfast.LM([p], solver="auto")
    optimizer.step(closure)
    assert optimizer.report.solver == "primal" and optimizer.report.status == "accepted"


def test_a_large_jacobian_passes_in_blocks(monkeypatch):
    monkeypatch.setattr(double_backward, "_KEPT_BYTES", 1000)
    monkeypatch.setattr(double_backward, "_LARGEST", 5)
    model = mlp(3, 5, 4)
    closure = lambda: model(X).cumsum(0)  # noqa: E731
    lin, expected = pgdfast.linearize(closure, model.parameters()), reference.linearize(closure, list(model.parameters()))
    step = pgdfast.solve(lin, 0.1, solver="primal").step
    assert relative(lin.diagonal(), expected.diagonal()) < 1e-12
    assert lin.kernels()._jacobian is None and relative(step, reference.solve(expected, 0.1).step) < 1e-10
    lin = pgdfast.linearize(closure, model.parameters())
    lin.kernels().dense()
    assert relative(lin.kernels().normal(), expected.dense().T @ expected.dense()) < 1e-12


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (300, 3)])
@pytest.mark.parametrize("solver", ["dual", "primal", "eigh", "auto"])
def test_float32_is_widened(solver, shape):
    J, b = spectrum(*shape, 1e-3).float(), rand(shape[0], seed=5).float()
    w = torch.zeros(shape[1], requires_grad=True)
    closure = lambda: (J @ w - b).roll(1, 0)  # noqa: E731
    ref = reference.linearize(closure, [w])
    mu = damping_of(ref, 5e4)
    lin = pgdfast.linearize(closure, [w])
    assert relative(pgdfast.solve(lin, mu, solver=solver).step, reference.solve(ref, mu).step) < 1e-6
    wide, v, u = lin.widened(), rand(shape[1], seed=1), rand(shape[0], seed=2)
    assert wide.widened() is wide and lin.widened() is wide and wide.dtype == torch.float64
    exact = ref.dense()
    for found, expected in (
        (wide.jvp(v), exact @ v), (wide.vjp(u), exact.T @ u), (wide.gram(), exact @ exact.T), (wide.dense(), exact),
        (wide.kernels().normal(), exact.T @ exact), (wide.diagonal(), exact.square().sum(0)),
    ):
        assert found.dtype == torch.float64 and relative(found, expected) < 1e-7
    lin.release()
    with pytest.raises(RuntimeError, match="released"):
        wide.jvp(v)


# --- which solver -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [
    ByNumpy.apply, Once.apply, lambda z: F.embedding_bag(torch.arange(1400).view(-1, 2) % 700, z),
    lambda z: torch.cdist(z, z[:2].detach() + 1),
], ids=["numpy", "once", "embedding_bag", "cdist"])
def test_auto_leaves_cg_where_it_has_no_product(form):
    """At some 1,400 rows it took CG with products that lacked what a backward pass cannot be differentiated for."""
    model, x = mlp(2, 4, 2), rand(700, 2, seed=5)
    closure = lambda: form(model(x)).roll(1, 0) / 30  # noqa: E731
    optimizer = pgdfast.LM(model.parameters(), damping=0.1, damping_rule="constant")
    expected = reference.solve(reference.linearize(closure, list(model.parameters())), 0.1).step
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    optimizer.step(closure)
    moved = before - torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert optimizer.report.residuals >= 1400 and optimizer.report.solver in ("dual", "primal")
    assert relative(moved, expected) < 1e-9


def test_the_cost_is_counted_from_the_tape():
    """The same in every run, and CG where J would be dear."""
    model, x = mlp(2, 30, 30, 1), rand(3000, 2, seed=5)
    closure = lambda: model(x).cumsum(0) / 50  # noqa: E731
    first, second = (pgdfast.linearize(closure, model.parameters()).kernels() for _ in range(2))
    assert first.flops == second.flops and first.jacobian_flops == second.jacobian_flops > 1000 * first.flops
    assert pgdfast.solve(pgdfast.linearize(closure, model.parameters()), 1.0).solver == "cg"


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("form", ["numpy", "once"])
def test_every_solver_agrees_where_backward_cannot_be_differentiated(form, solver):
    model = mlp(3, 5, 4)
    closure = lambda: FORMS[form](model(X))  # noqa: E731
    linearizer, params = Linearizer(model.parameters()), list(model.parameters())
    for visit in range(2):
        expected = reference.solve(reference.linearize(closure, params), 0.1).step
        assert relative(pgdfast.solve(linearizer(closure), 0.1, solver=solver, cg=TIGHT).step, expected) < 1e-8
        perturb(params, seed=visit)


@pytest.mark.parametrize("solver", ["dual", "primal", "cg"])
def test_float32_ensembles_are_widened(solver):
    J, b = torch.stack([spectrum(20, 12, 1e-3, seed=s) for s in range(3)]).float(), rand(3, 20, seed=5).float()
    w = torch.zeros(3, 12, requires_grad=True)
    lin = EnsembleLinearizer([w], 3)(lambda: ((J @ w[:, :, None])[:, :, 0] - b).roll(1, 1))
    for k in range(3):
        one = w[k].detach().requires_grad_()
        ref = reference.linearize(lambda one=one, k=k: (J[k] @ one - b[k]).roll(1, 0), [one])
        mu = damping_of(ref, 5e4)
        assert relative(pgdfast.solve(lin.member(k), mu, solver=solver, cg=TIGHT).step, reference.solve(ref, mu).step) < 1e-6
        assert lin.member(k).widened().dense().dtype == torch.float64


def test_members_of_an_ensemble_share_batches():
    values = rand(3, 5, seed=1).requires_grad_()
    lin = EnsembleLinearizer([values], 3)(lambda: values.cumsum(1).tanh())
    J = lin.dense()
    for b in range(3):
        v = values[b].detach().requires_grad_()
        exact = torch.func.jacrev(lambda v: v.cumsum(0).tanh())(v).detach()
        assert relative(J[b], exact) < 1e-12 and relative(lin.member(b).dense(), exact) < 1e-12


# --- parameters and gradients of every kind ---------------------------------------------------------------------------------


def test_sparse_gradients():
    table = torch.nn.Embedding(6, 3, sparse=True, dtype=torch.float64)
    closure = lambda: table(torch.tensor([0, 1, 2, 2])).cumsum(0)  # noqa: E731
    assert jacobian_agreement(Linearizer([table.weight]), closure, [table.weight]) < 1e-12
    optimizer = pgdfast.LM(table.parameters())
    optimizer.step(closure)
    assert optimizer.report.status == "accepted"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_is_not_called_converged(dtype):
    model, x = mlp(1, 10, 1, dtype=dtype), torch.linspace(-1, 1, 20)[:, None].to(dtype)
    optimizer = pgdfast.LM(model.parameters())
    for _ in range(20):
        optimizer.step(lambda: F.mse_loss(model(x), torch.sin(3 * x)))
    assert optimizer.report.status == "stalled" and "this is not convergence" in optimizer.report.advice
    assert "float32" in optimizer.report.advice and "converged" not in optimizer.report.advice


# --- announcements ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node, name", [
    ("CumsumBackward0", "torch.cumsum"), ("TrilinearBackward0", "nn.Bilinear / torch._trilinear"),
    ("CubeBackward", "Function Cube"),
    ("LinalgMatrixExpBackward0", "torch.linalg.matrix_exp"), ("SpecialI0EBackward0", "torch.special.i0"),
    ("UpsampleBilinear2DBackward0", "F.interpolate"), ("CopySlices", "an assignment into a part of a tensor"),
    ("HardswishBackward0", "F.hardswish"), ("RollBackward0", "torch.roll"), ("CdistBackward0", "torch.cdist"),
])
def test_operations_are_called_as_users_call_them(node, name):
    assert name in called(node) and node in called(node)


def test_the_announcement_says_cost_and_cure(monkeypatch):
    monkeypatch.setattr("pgdfast.linear.linearization._announced", set())
    linear = torch.nn.Bilinear(3, 3, 2, dtype=torch.float64)
    with pytest.warns(UserWarning) as caught:
        pgdfast.linearize(lambda: linear(X, X), linear.parameters())
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "nn.Bilinear / torch._trilinear (TrilinearBackward0)" in text
    assert "about 12 backward passes a step (one for each residual" in text
    assert "Write nn.Bilinear / torch._trilinear with matrix products" in text


def test_what_is_learnt_is_the_linearizers():
    model = mlp(3, 5, 4)
    optimizer = pgdfast.LM(model.parameters(), check="every")
    optimizer.step(lambda: model(X).cumsum(0))
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin._tools.backend.check == "every" and twin._tools.backend._linearizer is None
