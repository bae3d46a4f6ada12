"""The Triton backend on whole problems against pgdfast.reference: products, forms, every solver, LM.

Runs where there is a GPU, and under Triton's interpreter, which test_triton.py starts; problems are small for its sake.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from helpers import fit, flat, gradient, mlp, rand, relative
from torch import nn

import pgdfast
from pgdfast import kernels
from pgdfast.linear import Linearizer

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("there is no GPU; test_triton.py runs these tests under the interpreter", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter of Triton 3.6 takes scalars from arrays of one element, of which numpy warns.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


def on(x):
    return x.to(DEVICE)


def regression(dtype=torch.float64, N=37, outputs=2):
    model = mlp(3, 17, 9, outputs, dtype=dtype).to(DEVICE)
    x, y = on(rand(N, 3, dtype=dtype)), on(rand(N, outputs, seed=1, dtype=dtype))
    return list(model.parameters()), lambda: F.mse_loss(model(x), y)


def pinn(outputs=1):
    """A nested derivative: weights used along and against their rows, two blocks of residuals."""
    model = mlp(2, 20, 20, outputs).to(DEVICE)
    x, edge = on(rand(11, 2, seed=1)).requires_grad_(), on(rand(4, 2, seed=2))

    def residuals():
        y = model(x)
        slopes = [gradient(y[:, o].sum(), x) for o in range(outputs)]
        bends = [sum(gradient(s[:, d].sum(), x)[:, d] for d in range(2)) for s in slopes]
        return torch.stack(bends, 1) + 1, model(edge)

    return list(model.parameters()), residuals


def classification():
    model = mlp(4, 11, 5, activation=nn.SiLU).to(DEVICE)
    x, t = on(rand(29, 4)), on(torch.arange(29) % 5)
    return list(model.parameters()), lambda: F.cross_entropy(model(x), t)


def transformer():
    torch.manual_seed(0)
    embedding = nn.Embedding(7, 8, dtype=torch.float64)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, dtype=torch.float64)
    head = nn.Linear(8, 3, dtype=torch.float64)
    model = nn.Sequential(embedding, layer, head).to(DEVICE)
    ids = on(torch.randint(0, 7, (4, 5), generator=torch.Generator().manual_seed(1)))
    t = on(torch.arange(4) % 3)
    return list(model.parameters()), lambda: F.cross_entropy(model(ids)[:, -1], t)


def penalized():
    params, loss = regression()
    return params, lambda: loss() + 0.05 * params[0].square().sum() + 0.01 * params[2].square().sum()


def blocks():
    """Rows with different numbers of residuals, shared by a weight's uses; slices and elementwise uses."""
    p, q = (nn.Parameter(on(rand(*shape, seed=k))) for k, shape in enumerate([(4, 4), (4,)]))
    x = on(rand(9, 4, seed=3))

    def residuals():
        h = torch.tanh(x @ p) @ p.T + q
        return h, torch.sin(x[:5] @ p)[:, :2] * q[:2], torch.tanh(x @ p[:, :1]) @ p[:1] + q

    return [p, q], residuals


def batch_statistics():
    """Residuals that do not separate into rows."""
    model = mlp(3, 4, 2).to(DEVICE)
    x = on(rand(4, 3))
    return list(model.parameters()), lambda: model(x) - model(x).mean(0)


PROBLEMS = {
    "regression": regression, "one output": lambda: regression(outputs=1), "N > P": lambda: regression(N=230, outputs=1),
    "pinn": pinn, "pinn of two": lambda: pinn(2), "classification": classification, "transformer": transformer,
    "penalty": penalized, "blocks": blocks, "no rows": batch_statistics,
}


def both(name):
    params, closure = PROBLEMS[name]()
    return pgdfast.linearize(closure, params, backend="triton"), pgdfast.reference.linearize(closure, params)


@pytest.mark.parametrize("name", [n for n in PROBLEMS if n != "N > P"])
def test_products_and_forms(name):
    lin, ref = both(name)
    assert lin.kernels().name == "triton"
    v, J = on(rand(lin.num_parameters)), lin.dense()
    pairs = [
        (lin.gradient(), ref.vjp(ref.residual)), (lin.ggn(v), ref.ggn(v)), (lin.diagonal(), ref.diagonal()),
        (lin.jvp(v), J @ v), (lin.gram(), J @ J.T),
    ]
    if name not in ("classification", "transformer", "penalty"):   # other roots of the Hessian, rows of the penalty
        pairs += [(lin.residual, ref.residual), (J, ref.dense())]
    assert max(relative(a, b) for a, b in pairs) < 1e-11


DUAL = ["regression", "one output", "pinn", "classification", "transformer", "penalty", "blocks"]
PRIMAL = ["regression", "N > P", "penalty", "blocks", "no rows"]


@pytest.mark.parametrize("solver, name", [("dual", n) for n in DUAL] + [("primal", n) for n in PRIMAL])
def test_direct_solves(name, solver):
    lin, ref = both(name)
    mu = 1e-2
    solution = pgdfast.solve(lin, mu, solver=solver)
    assert solution.status == "solved" and solution.solver == solver
    expected = pgdfast.reference.solve(ref, mu).step
    assert relative(solution.step, expected) < 1e-9
    g = lin.gradient().double()
    assert abs(solution.gain - float(g @ expected)) < 1e-9 * abs(solution.gain)
    u = on(rand(lin.num_residuals, seed=5))
    again = torch.linalg.solve(
        lin.dense().T @ lin.dense() + torch.diag(mu + (lin.penalty if lin.penalties else torch.zeros_like(g))), lin.vjp(u)
    )
    assert relative(solution.solve_with_same_factor(u), again) < 1e-9


def test_dampings_share_a_gram_matrix_and_new_parameters_do_not(monkeypatch):
    params, closure = regression()
    linearizer = Linearizer(params, "triton")
    lin = linearizer(closure)
    made = []
    own = lin.kernels().add_factored
    monkeypatch.setattr(lin.kernels(), "add_factored", lambda *given: made.append(1) or own(*given))
    steps = [pgdfast.solve(lin, mu, solver="dual").step for mu in (0.1, 0.2)]
    once = len(made)
    with torch.no_grad():
        params[0].add_(0.1)
    third = pgdfast.solve(linearizer(closure), 0.1, solver="dual").step
    assert once > 0 and len(made) == 2 * once
    assert relative(steps[0], steps[1]) > 1e-3 and relative(third, steps[0]) > 1e-3


@pytest.mark.parametrize("solver", ["dual", "primal", "cg", "lsmr", "eigh"])
def test_float32(solver):
    params, closure = regression(torch.float32)
    lin, ref = pgdfast.linearize(closure, params, backend="triton"), pgdfast.reference.linearize(closure, params)
    solution = pgdfast.solve(lin, 3e-2, solver=solver)
    assert solution.step.dtype == torch.float32
    assert relative(solution.step, pgdfast.reference.solve(ref, 3e-2).step) < 2e-5


CG_OPTIONS = {
    "plain": pgdfast.CG(tolerance=1e-8),
    "checks": pgdfast.CG(max_iterations=52, tolerance=1e-30),
    "few": pgdfast.CG(max_iterations=4),
    "jacobi": pgdfast.CG(preconditioner="jacobi"),
    "nystrom": pgdfast.CG(preconditioner=pgdfast.Nystrom(rank=6)),
    "progress": pgdfast.CG(progress=2e-2, tolerance=1e-12),
    "truncated": pgdfast.CG(max_iterations=9, truncate=True),
    "absolute": pgdfast.CG(absolute=1e-2),
}


@pytest.mark.parametrize("name", CG_OPTIONS)
def test_cg_takes_the_iterations_of_the_plain_one(name):
    """The state on the device against the loop of solve/krylov.py: status, count, iterate, what it reports and keeps."""
    params, closure = fit()
    options = CG_OPTIONS[name]
    a, b = (pgdfast.solve(pgdfast.linearize(closure, params, backend=k), 0.3, solver="cg", cg=options)
            for k in ("triton", "torch"))
    assert a.status == b.status and abs(a.iterations - b.iterations) <= 1
    bound = 1e-5 if a.status == "solved" else 1e-7
    assert relative(a.step, b.step) < bound and a.residual_norm < 2 * b.residual_norm + 1e-12
    assert abs(a.gain - b.gain) < bound * a.gain and abs(a.slack - b.slack) < 1e-4 * a.gain
    assert [k for k, *_ in a.path] == [k for k, *_ in b.path]
    for (_, x, *numbers), (_, y, *others) in zip(a.path, b.path, strict=True):
        assert relative(x, y) < 1e-7 and torch.allclose(torch.tensor(numbers), torch.tensor(others), rtol=1e-5, atol=1e-6)


def test_cg_from_a_start_and_to_its_limits():
    params, closure = fit()
    lin = pgdfast.linearize(closure, params, backend="triton")
    warm = pgdfast.CG(warm_start=True)
    first = pgdfast.solve(lin, 0.3, solver="cg", cg=warm)
    second = pgdfast.solve(lin, 0.3, solver="cg", cg=warm, keep=first.keep)
    assert first.status == second.status == "solved" and second.iterations < first.iterations / 2
    assert relative(second.step, first.step) < 1e-4
    stopped = pgdfast.solve(lin, 0.3, solver="cg", cg=pgdfast.CG(max_iterations=300, tolerance=1e-17))
    assert stopped.status == "stagnated" and relative(stopped.step, first.step) < 1e-4
    bad = {"start": torch.full_like(first.step, torch.nan)}
    assert relative(pgdfast.solve(lin, 0.3, solver="cg", cg=warm, keep=bad).step, first.step) < 1e-4


def test_looks_at_the_phase_never_wait():
    """What only a GPU takes, with an event of our own: a copy is asked for every 25 slots and read once it has come."""
    from pgdfast.kernels import cg_rules
    from pgdfast.kernels.triton_kernels import krylov

    class Event:
        come, recorded = False, 0

        def query(self):
            return self.come

        def record(self):
            self.recorded += 1

    watch = krylov._Watch(torch.device("cpu"))
    watch._cpu, watch._asked, watch._flag, watch._event = False, False, torch.empty(1, dtype=torch.float64), Event()
    running, solved = (torch.tensor(float(v), dtype=torch.float64) for v in (cg_rules.ITERATE, cg_rules.ENDED))
    assert not any(watch.over(slot, running) for slot in range(25)) and watch._event.recorded == 1
    assert not any(watch.over(slot, solved) for slot in range(25, 50)) and watch._event.recorded == 1   # not come yet
    watch._event.come = True
    assert not any(watch.over(slot, solved) for slot in range(50, 75)) and watch._event.recorded == 2   # it said: running
    assert [slot for slot in range(75, 100) if watch.over(slot, solved)] == [99]


def test_cg_that_breaks_down_and_cg_of_nothing():
    w, root = nn.Parameter(on(rand(4))), nn.Parameter(on(torch.ones(1, dtype=torch.float64)))
    A = on(rand(6, 4, seed=1))
    with torch.no_grad():
        root.zero_()   # the residual is finite, its derivative is not
    broken = pgdfast.solve(pgdfast.linearize(lambda: A @ w - 1 + root.sqrt(), [w, root], backend="triton"), 0.1, solver="cg")
    assert broken.status in ("breakdown", "not_finite") and not broken.usable
    still = pgdfast.solve(pgdfast.linearize(lambda: A @ w - (A @ w).detach(), [w], backend="triton"), 0.1, solver="cg")
    assert still.status == "solved" and not still.step.any() and still.residual_norm == 0


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_what_is_not_finite_is_said(solver):
    A, root = on(rand(8, 5, seed=1)), nn.Parameter(on(torch.zeros(1, dtype=torch.float64)))
    theta = nn.Parameter(on(rand(5, seed=3)))
    lin = pgdfast.linearize(lambda: A @ theta + root.sqrt(), [theta, root], backend="triton")
    bad = pgdfast.solve(lin, 0.1, solver=solver)
    assert not bad.usable and not bad.step.any()


@pytest.mark.parametrize("name", ["regression", "classification"])
def test_lm_takes_the_reference_steps(name):
    curves = []
    for backend in ("triton", "reference"):
        params, closure = PROBLEMS[name]()
        optimizer = pgdfast.LM(params, damping=0.1, damping_rule="constant", solver="dual", backend=backend)
        curves.append([float(optimizer.step(closure)) for _ in range(3)] + [flat(params)])
    for a, b in zip(*curves, strict=True):
        assert relative(torch.as_tensor(a), torch.as_tensor(b)) < 1e-8


def test_the_same_again_bit_for_bit():
    params, closure = transformer()
    steps = [pgdfast.solve(pgdfast.linearize(closure, params, backend="triton"), 0.1, solver="dual").step for _ in range(2)]
    assert torch.equal(*steps)


def test_several_vectors_at_once():
    params, closure = PROBLEMS["blocks"]()
    lin = pgdfast.linearize(closure, params, backend="triton")
    V, U = on(rand(3, lin.num_parameters)), on(rand(3, lin.num_residuals))
    J = lin.dense()
    assert relative(lin.kernels().jvp(V), V @ J.T) < 1e-13 and relative(lin.kernels().vjp(U), U @ J) < 1e-13


def test_scaled_rows():
    params, closure = PROBLEMS["blocks"]()
    lin = pgdfast.linearize(closure, params, backend="triton")
    scale = on(rand(lin.num_residuals, seed=3)).abs() + 0.1
    J = scale[:, None] * lin.dense()
    lin.scale_rows(scale)
    assert relative(lin.dense(), J) < 1e-13 and relative(lin.gram(), J @ J.T) < 1e-13
    assert relative(lin.ggn(V := on(rand(lin.num_parameters))), J.T @ (J @ V)) < 1e-12
    right = torch.linalg.solve(J.T @ J + 0.1 * torch.eye(J.shape[1], device=DEVICE), J.T @ lin.residual)
    for solver in ("dual", "primal", "cg"):
        found = pgdfast.solve(lin, 0.1, solver=solver, cg=pgdfast.CG(max_iterations=500, tolerance=1e-12))
        assert relative(found.step, right) < 1e-8


def test_numbers_that_change_between_steps_are_read_anew():
    w, x = nn.Parameter(on(rand(5))), on(rand(5, seed=1))
    linearizer = Linearizer([w], "triton")
    for factor in (2.0, 3.0):
        lin = linearizer(lambda: factor * w * x)  # noqa: B023
        assert relative(lin.dense(), factor * torch.diag(x)) < 1e-15


def test_other_dtypes_are_refused_by_name():
    w = nn.Parameter(on(rand(3)).to(torch.bfloat16))
    with pytest.raises(RuntimeError, match="'triton' was asked for but runs only on CUDA devices of compute capability"):
        pgdfast.linearize(lambda: 2 * w, [w], backend="triton")
    if INTERPRETED:   # CPU tensors keep the core
        params, closure = regression()
        assert pgdfast.linearize(closure, params).kernels().name == "native"
    assert pgdfast.backends()["triton"] == "available" and kernels.requested("triton") == "triton"
