"""Solving again with the factor of a step: always its own, whatever was solved since."""

import pytest
import torch
from helpers import BACKENDS, TIGHT, forget_rules, linear_problem, mlp, rand, relative, spectrum

import pgdfast
from pgdfast.linear import EnsembleLinearizer
from pgdfast.solve import solve_members


def exact(lin, mu, u, scale=None):
    """(mu D + J^T J + penalty)^-1 J^T u."""
    J = lin.dense().double()
    D = torch.ones(J.shape[1], dtype=torch.float64) if scale is None else scale.double()
    c = 0.0 if lin.penalty is None else lin.penalty.double()
    return torch.linalg.solve(J.T @ J + torch.diag(mu * D + c), J.T @ u.double())


@pytest.mark.parametrize("penalty", [False, True], ids=["", "penalty"])
@pytest.mark.parametrize("scaled", [False, True], ids=["identity", "scaled"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ["dual", "primal", "cg", "lsmr", "eigh"])
def test_a_later_solve_leaves_an_earlier_factor_alone(solver, backend, scaled, penalty):
    model = mlp(2, 4, 1)
    x, params = rand(12, 2, seed=1), list(model.parameters())
    decay = (lambda: 0.1 * sum(p.square().sum() for p in params)) if penalty else (lambda: 0.0)
    lin = pgdfast.linearize(lambda: (model(x) - 1).square().mean() + decay(), params, backend=backend)
    scale = torch.linspace(0.5, 2, lin.num_parameters, dtype=torch.float64) if scaled else None
    u = rand(lin.num_residuals, seed=3)
    first = pgdfast.solve(lin, 1e-2, scale=scale, solver=solver, cg=TIGHT)
    many = pgdfast.solve(lin, [1.0, 30.0], scale=scale, solver=solver, cg=TIGHT)
    others = [pgdfast.solve(lin, mu, scale=scale, solver=name, cg=TIGHT) for mu in (5.0, 100.0) for name in ("dual", "primal")]
    for mu, solution in ((1e-2, first), (1.0, many[0]), (30.0, many[1]), (1.0, many[0]), (5.0, others[0]), (100.0, others[3])):
        assert relative(solution.solve_with_same_factor(u), exact(lin, mu, u, scale)) < 1e-8


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_float32_that_was_refined_or_widened(solver):
    """The factor of a refined step is its float32 one; that of a widened step takes float32 vectors, too."""
    for M, P in ((230, 210), (30, 25)):
        params, closure = linear_problem(spectrum(M, P, 3e-3), rand(M, seed=1), torch.float32)
        lin = pgdfast.linearize(closure, params)
        for mu in (1e-4, 1.0):
            solution, u = pgdfast.solve(lin, mu, solver=solver), rand(M, seed=2, dtype=torch.float32)
            pgdfast.solve(lin, 7.0, solver=solver)
            again = solution.solve_with_same_factor(u)
            assert again.dtype == torch.float32 and relative(again, exact(lin, mu, u)) < 2e-2
            assert relative(solution.step, exact(lin, mu, lin.residual)) < 1e-5


def stacked(separates):
    weights = [rand(3, 5, 2, seed=1).requires_grad_(), rand(3, 1, 5, seed=2).requires_grad_()]
    x = rand(7, 2, seed=3)

    def closure():
        hidden = torch.tanh(torch.einsum("ni,bhi->bnh", x, weights[0]))
        found = torch.einsum("bnh,boh->bno", hidden, weights[1]) - 1.0
        return found if separates else found * torch.special.i0e(found)

    return weights, closure


@pytest.mark.filterwarnings("ignore:pgdfast. no tape rule")
@pytest.mark.parametrize("separates", [True, False])
@pytest.mark.parametrize("solver", ["dual", "primal", "cg", "eigh"])
def test_members_solve_again(solver, separates, monkeypatch):
    forget_rules(monkeypatch, "SpecialI0EBackward0")
    weights, closure = stacked(separates)
    lin = EnsembleLinearizer(weights, 3)(closure)
    assert lin.separates == separates
    found = solve_members(lin, {0: 0.1, 1: 1.0, 2: 0.01}, solver=solver, cg=TIGHT)
    u = rand(7, seed=4)
    for b, mu in ((1, 1.0), (0, 0.1), (2, 0.01), (1, 1.0)):
        assert relative(found[b].solve_with_same_factor(u), exact(lin.member(b), mu, u)) < 1e-8


@pytest.mark.filterwarnings("ignore:pgdfast. no tape rule")
@pytest.mark.parametrize("separates", [True, False])
def test_members_with_a_prior(separates, monkeypatch):
    forget_rules(monkeypatch, "SpecialI0EBackward0")
    weights, closure = stacked(separates)
    lin = EnsembleLinearizer(weights, 3)(closure)
    prior = rand(15, seed=5)
    found = solve_members(lin, {0: 0.1, 1: 1.0, 2: 0.01}, priors={1: prior, 2: None})
    plain = solve_members(lin, {0: 0.1, 2: 0.01})
    alone = pgdfast.solve(lin.member(1), 1.0, prior=prior)
    assert relative(found[1].step, alone.step) < 1e-12 and torch.equal(found[1].prior, prior)
    assert all(relative(found[b].step, plain[b].step) < 1e-10 for b in (0, 2))
    J = lin.member(1).dense()
    A = J.T @ J + torch.eye(15, dtype=torch.float64)
    assert relative(found[1].step, torch.linalg.solve(A, J.T @ lin.residual[1] + prior)) < 1e-9
