"""The core's dense kernels on awkward sizes and every instruction set: Gram and normal matrices, Cholesky, refinement."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import gradient, mlp, rand, relative

import pgdfast
from pgdfast.linear import Linearizer

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(pgdfast.backends()["native"] != "available", reason="the C++ core is not built")

# Around the widths of panels (2 to 16), tiles (48) and blocks of rows (96, 192), and primes.
ORDERS = (1, 2, 7, 8, 15, 16, 17, 31, 47, 48, 49, 97, 191, 193, 211)


def linear_problem(residuals, parameters, dtype):
    """A closure r = A theta - b, whose J is A; its parameter, and A."""
    A = rand(residuals, parameters, seed=residuals, dtype=dtype) / parameters**0.5
    b = rand(residuals, seed=1, dtype=dtype)
    theta = torch.nn.Parameter(rand(parameters, seed=2, dtype=dtype))
    return (lambda: A @ theta - b), theta, A


def expected(lin, A, mu):
    """The step by a dense float64 solve."""
    A, r = A.double(), lin.residual.double()
    return torch.linalg.solve(A.T @ A + mu * torch.eye(A.shape[1], dtype=torch.float64), A.T @ r)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("order", [*ORDERS, 400, 801])
def test_cholesky_of_every_order(order, dtype):
    closure, theta, A = linear_problem(order, order + 5, dtype)
    lin = pgdfast.linearize(closure, [theta])
    solution = pgdfast.solve(lin, 0.1, solver="dual")
    assert solution.status == "solved"
    assert relative(solution.step, expected(lin, A, 0.1)) < (1e-12 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("order", [400, 1000])
def test_threads_do_not_change_a_step(order):
    closure, theta, _ = linear_problem(order, order, torch.float32)
    before, steps = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            lin = pgdfast.linearize(closure, [theta])
            steps.append(pgdfast.solve(lin, 0.1, solver="dual").step)
    finally:
        torch.set_num_threads(before)
    assert relative(steps[0], steps[1]) < 1e-6   # the products with J may be split; the factor is the same


@pytest.mark.parametrize("order", [5, 60, 400])
@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_what_is_not_finite_is_said_and_leaves_nothing_behind(order, solver):
    A, b = rand(order, 20, seed=1), rand(order, seed=2)
    theta, root = torch.nn.Parameter(rand(20, seed=3)), torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    linearizer = Linearizer([theta, root])

    def step():
        return pgdfast.solve(linearizer(lambda: A @ theta - b + root.sqrt()), 0.1, solver=solver)

    good = step()
    with torch.no_grad():
        root.zero_()   # the residual is finite, its derivative is not
    bad = step()
    assert not bad.usable and not bad.step.any()
    with torch.no_grad():
        root.fill_(1)
    assert torch.equal(step().step, good.step)


@pytest.mark.parametrize("order", [60, 400])
def test_a_damping_below_rounding_fails_or_is_right(order):
    """A float32 Gram matrix of rank one, positive definite by its damping alone."""
    theta = torch.nn.Parameter(torch.ones(order + 1, dtype=torch.float32))
    row = 1e4 * rand(order + 1, dtype=torch.float32)
    lin = pgdfast.linearize(lambda: (row * torch.ones(order, 1)) @ theta - 1.0, [theta])
    solution = pgdfast.solve(lin, 1e-7, solver="dual")
    wide = row.double()
    exact = wide * float(lin.residual[0]) / (wide.square().sum() + 1e-7 / order)
    assert relative(solution.step, exact) < 1e-3 if solution.usable else not solution.step.any()


ROWS = (1, 5, 16, 17, 47, 49, 200)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("outputs", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_gram_and_normal_matrix_of_rows_with_outputs(rows, outputs, dtype):
    model = mlp(3, 17, 5, outputs, dtype=dtype)
    params = list(model.parameters())
    x, y = rand(rows, 3, seed=1, dtype=dtype), rand(rows, outputs, seed=2, dtype=dtype)
    lin = pgdfast.linearize(lambda: model(x) - y, params)
    J = lin.dense().double()
    bound = 1e-13 if dtype == torch.float64 else 2e-6
    assert relative(lin.gram(), J @ J.T) < bound
    mu = 0.3 * float(J.square().sum()) ** 0.5
    exact = torch.linalg.solve(J.T @ J + mu * torch.eye(J.shape[1], dtype=torch.float64), J.T @ lin.residual.double())
    for solver in ("dual", "primal"):
        assert relative(pgdfast.solve(lin, mu, solver=solver).step, exact) < 20 * bound


def tied(p, q, x):
    return torch.tanh(x @ p) @ p.T + q


FORMS = {   # closures of p (4, 4), q (4,) and rows x (N, 4) whose rows have several outputs and whose uses differ in form
    "tied": lambda p, q, x: tied(p, q, x),
    "two blocks": lambda p, q, x: (tied(p, q, x), torch.sin(x[:5] @ p)[:, :2] * q[:2]),
    "rows shared by blocks": lambda p, q, x: (tied(p, q, torch.cat([x, x[:3]])), (x @ p).sum(1)),
    "slices": lambda p, q, x: torch.tanh(x @ p[:, :3]) @ p[:3] + q,
    "a row vector": lambda p, q, x: torch.tanh(x @ p[:, :1]) @ p[:1] + q,
    "elementwise": lambda p, q, x: torch.tanh(x * q) @ p,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [6, 33])
def test_forms_of_use(form, rows):
    p, q = torch.nn.Parameter(rand(4, 4, seed=1)), torch.nn.Parameter(rand(4, seed=2))
    x = rand(rows, 4, seed=3)
    lin = pgdfast.linearize(lambda: FORMS[form](p, q, x), [p, q])
    J = lin.dense()
    assert relative(lin.gram(), J @ J.T) < 1e-13
    exact = torch.linalg.solve(J.T @ J + 0.1 * torch.eye(20, dtype=torch.float64), J.T @ lin.residual)
    for solver in ("dual", "primal"):
        assert relative(pgdfast.solve(lin, 0.1, solver=solver).step, exact) < 1e-11


@pytest.mark.parametrize("widths", [(64, 64), (64, 40)])
@pytest.mark.parametrize("outputs", [1, 2])
def test_a_wide_weight_used_both_ways(widths, outputs):
    """A nested derivative passes a weight forwards and, transposed, backwards: the factors of both stand in one Gram matrix."""
    model = mlp(2, *widths, outputs)
    x, edge = rand(21, 2, seed=1).requires_grad_(), rand(5, 2, seed=2)

    def residuals():
        y = model(x)
        slopes = [gradient(y[:, o].sum(), x) for o in range(outputs)]
        bends = [sum(gradient(s[:, d].sum(), x)[:, d] for d in range(2)) for s in slopes]
        return torch.stack(bends, 1) + 1, model(edge)

    params = list(model.parameters())
    lin = pgdfast.linearize(residuals, params)
    J = lin.dense()
    if outputs == 1:   # with several residuals a row such a weight is explicit
        ways = {use[4] for use in lin.row_layout().uses if use[1] == 2 and use[2] == 1}
        assert ways == {0, 1}, "the wide weight is no longer factored; the test does not see what it is for"
    assert relative(lin.gram(), J @ J.T) < 1e-13
    exact = torch.linalg.solve(J.T @ J + 0.1 * torch.eye(J.shape[1], dtype=torch.float64), J.T @ lin.residual)
    assert relative(pgdfast.solve(lin, 0.1, solver="dual").step, exact) < 1e-10


@pytest.mark.parametrize("order", [200, 500])
@pytest.mark.parametrize("solver", ["dual", "primal"])
@pytest.mark.parametrize("condition", [1e4, 1e5, 1e6])
def test_refinement_gives_what_float64_sums_give(order, solver, condition):
    """Float32 factors beyond a condition of 5e3 are corrected by float64 products."""
    count = (order, order + 40) if solver == "dual" else (order + 40, order)
    closure, theta, A = linear_problem(*count, torch.float32)
    lin = pgdfast.linearize(closure, [theta])
    mu = float(torch.linalg.matrix_norm(A.double(), 2)) ** 2 / condition
    solution = pgdfast.solve(lin, mu, solver=solver)
    assert solution.status == "solved"
    assert relative(solution.step, expected(lin, A, mu)) < 2e-6


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(name, tmp_path):
    """The tests above with the vectors and tiles of another instruction set."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), __file__,
         "-k", "not instruction_set", "--rootdir", str(ROOT)],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env=os.environ | {"PGDFAST_ISA": name},
    )
    if "which this processor does not run" in done.stdout + done.stderr:
        pytest.skip(f"this processor has no {name}")
    assert done.returncode == 0, done.stdout[-2000:]
