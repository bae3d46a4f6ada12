"""The solvers against each other, against torch.linalg, and in the corners."""

import pytest
import torch

from pgdfast import reference

SHAPES = [(7, 12), (12, 7), (9, 9), (1, 5), (5, 1)]
DIRECT = ["dual", "primal", "eigh"]


def problem(M, P, seed=0, rank=None):
    """Return a linearization with a random J of the given rank."""
    generator = torch.Generator().manual_seed(seed)
    J = torch.randn(M, P, dtype=torch.float64, generator=generator)
    if rank is not None:
        J = J[:, :rank] @ torch.randn(rank, P, dtype=torch.float64, generator=generator)
    r = torch.randn(M, dtype=torch.float64, generator=generator)
    return reference.Linearization(0.5 * r @ r, r, J)


def scales(P):
    return torch.logspace(-2, 2, P, dtype=torch.float64)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("solver", [*DIRECT, "cg", "auto"])
def test_every_solver_solves_the_damped_equations(shape, scaled, solver):
    lin = problem(*shape)
    D = scales(shape[1]) if scaled else None
    solution = reference.solve(
        lin, 0.1, scale=D, solver=solver, cg_tolerance=1e-13, cg_max_iterations=1000
    )
    A = 0.1 * torch.diag(torch.ones(shape[1]).double() if D is None else D)
    expected = torch.linalg.solve(A + lin.jacobian.T @ lin.jacobian, lin.jacobian.T @ lin.residual)
    assert relative(solution.step, expected) < 1e-10
    assert solution.status == "solved" and solution.residual_norm < 1e-10


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("solver", [*DIRECT, "auto"])
def test_no_damping_means_the_pseudo_inverse(shape, rank, solver):
    lin = problem(*shape, rank=rank)
    solution = reference.solve(lin, 0.0, solver=solver)
    expected = torch.linalg.pinv(lin.jacobian, rtol=1e-4) @ lin.residual  # rcond is for J^T J
    assert relative(solution.step, expected) < 1e-9
    assert solution.solver == "eigh" and solution.status == "solved"


@pytest.mark.parametrize("shape", SHAPES)
def test_no_damping_with_scale_is_the_shortest_scaled_step(shape):
    lin, root = problem(*shape), scales(shape[1]).sqrt()
    solution = reference.solve(lin, 0.0, scale=root.square())
    expected = torch.linalg.lstsq(lin.jacobian / root, lin.residual, driver="gelsd").solution / root
    assert relative(solution.step, expected) < 1e-8


def test_rcond_cuts_the_eigenvalues_of_the_gram_matrix():
    J = torch.diag(torch.tensor([1.0, 1e-3, 1e-5], dtype=torch.float64))
    lin = reference.Linearization(torch.tensor(1.5).double(), torch.ones(3).double(), J)
    assert reference.solve(lin, 0.0, rcond=1e-8).step.tolist() == pytest.approx([1, 1e3, 0])
    assert reference.solve(lin, 0.0, rcond=1e-4).step.tolist() == pytest.approx([1, 0, 0])
    assert reference.solve(lin, 0.0, rcond=0.0).step.tolist() == pytest.approx([1, 1e3, 1e5])


def test_eigh_keeps_every_eigenvalue_when_damped():
    lin = problem(6, 9, rank=2)
    a = reference.solve(lin, 1e-3, solver="eigh", rcond=0.5)
    b = reference.solve(lin, 1e-3, solver="dual")
    assert relative(a.step, b.step) < 1e-9


def test_large_damping_follows_the_gradient():
    lin = problem(6, 9)
    step = reference.solve(lin, 1e12).step
    torch.testing.assert_close(step, lin.vjp(lin.residual) / 1e12, rtol=1e-9, atol=0)


def test_predicted_reduction_is_that_of_the_model():
    lin = problem(6, 9)
    solution = reference.solve(lin, 0.3)
    after = 0.5 * (lin.residual - lin.jvp(solution.step)).square().sum()
    assert solution.predicted_reduction == pytest.approx((lin.loss - after).item(), rel=1e-12)
    # and, at the exact solution, half delta . (mu delta + g)
    g = lin.vjp(lin.residual)
    half = 0.5 * solution.step @ (0.3 * solution.step + g)
    assert solution.predicted_reduction == pytest.approx(half.item(), rel=1e-12)


def test_auto_takes_the_smaller_system():
    assert reference.solve(problem(3, 5), 0.1).solver == "dual"
    assert reference.solve(problem(5, 3), 0.1).solver == "primal"
    assert reference.solve(problem(5, 3), 0.1, solver="cg").solver == "cg"


def test_cg_stops_at_its_tolerance():
    lin = problem(30, 40)
    loose = reference.solve(lin, 1e-2, solver="cg", cg_tolerance=1e-2)
    tight = reference.solve(lin, 1e-2, solver="cg", cg_tolerance=1e-8)
    assert loose.residual_norm <= 1.01e-2 and tight.residual_norm <= 1.01e-8
    assert 0 < loose.iterations < tight.iterations


def test_cg_that_runs_out_says_so():
    lin = problem(30, 40)
    solution = reference.solve(lin, 1e-6, solver="cg", cg_max_iterations=3, cg_tolerance=1e-12)
    assert (solution.status, solution.iterations) == ("max_iterations", 3)
    assert solution.residual_norm > 1e-12 and solution.predicted_reduction > 0
    none = reference.solve(lin, 1e-6, solver="cg", cg_max_iterations=0)
    assert (none.status, none.residual_norm) == ("max_iterations", 1.0) and not none.step.any()


def test_cg_ends_after_as_many_iterations_as_distinct_eigenvalues():
    J = torch.diag(torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0], dtype=torch.float64))
    lin = reference.Linearization(torch.tensor(0.0), torch.ones(5).double(), J)
    assert reference.solve(lin, 0.1, solver="cg", cg_tolerance=1e-10).iterations == 3


def test_plain_cg_without_damping():
    lin = problem(7, 12)
    solution = reference.solve(lin, 0.0, solver="cg", cg_tolerance=1e-12)
    assert relative(solution.step, torch.linalg.pinv(lin.jacobian) @ lin.residual) < 1e-9


@pytest.mark.parametrize("solver, shape", [("dual", (4, 6)), ("primal", (6, 4))])
def test_failed_cholesky_is_a_status_with_no_step(solver, shape):
    lin = problem(*shape, rank=1)
    lin = reference.Linearization(lin.loss, lin.residual, 1e8 * lin.jacobian)
    solution = reference.solve(lin, 1e-300, solver=solver)
    assert solution.status == "not_positive_definite" and not solution.step.any()
    assert (solution.residual_norm, solution.predicted_reduction) == (1.0, 0.0)


def test_cg_without_curvature_is_a_breakdown():
    J, r = 1e-200 * torch.eye(3).double(), 1e200 * torch.ones(3).double()  # J^T J underflows to 0
    lin = reference.Linearization(torch.tensor(0.0), r, J)
    solution = reference.solve(lin, 0.0, solver="cg")
    assert (solution.status, solution.iterations) == ("breakdown", 0) and not solution.step.any()


@pytest.mark.parametrize("solver", DIRECT)
def test_overflow_is_a_breakdown_with_no_step(solver):
    J, r = 1e-200 * torch.eye(3).double(), torch.ones(3).double()
    lin = reference.Linearization(torch.tensor(1.5), 1e190 * r, J)
    solution = reference.solve(lin, 1e-320, solver=solver)
    assert solution.status == "breakdown" and not solution.step.any()


@pytest.mark.parametrize("solver", [*DIRECT, "cg", "auto"])
@pytest.mark.parametrize("mu", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(0, 4), (3, 4), (4, 3)])
def test_no_residual_or_no_gradient_gives_no_step(solver, mu, shape):
    lin = problem(*shape)
    lin = reference.Linearization(lin.loss, torch.zeros_like(lin.residual), lin.jacobian)
    solution = reference.solve(lin, mu, solver=solver)
    assert solution.status == "solved" and solution.step.tolist() == [0.0] * shape[1]
    assert (solution.residual_norm, solution.predicted_reduction) == (0.0, 0.0)


@pytest.mark.parametrize("arguments, message", [
    ({"damping": -1.0}, "damping must be finite and >= 0, got -1.0"),
    ({"damping": float("nan")}, "damping must be finite"),
    ({"damping": 1.0, "solver": "qr"}, "solver must be one of auto, .*; got 'qr'"),
    ({"damping": 1.0, "scale": torch.ones(3)}, r"positive, finite and of shape \(4,\)"),
    ({"damping": 1.0, "scale": torch.zeros(4)}, "scale must be positive"),
    ({"damping": 1.0, "rcond": -1.0}, "must be >= 0"),
    ({"damping": 1.0, "cg_max_iterations": -1}, "must be >= 0"),
])  # fmt: skip
def test_misuse_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        reference.solve(problem(3, 4), **arguments)


def test_newton_step_on_a_linear_model_is_exact():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=generator)
    w, y = torch.zeros(3, requires_grad=True), x @ torch.tensor([1.0, -2.0, 3.0])
    solution = reference.solve(reference.linearize(lambda: (x @ w - y).square().mean(), [w]), 0.0)
    assert (-solution.step).tolist() == pytest.approx([1, -2, 3], abs=1e-6)
