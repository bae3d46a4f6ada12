"""Relative error of float32 steps against the float64 reference, by the condition of mu I + J^T J.

    python bench/accuracy.py

A 2-20-20-1 tanh network with 100 residuals (P = 501), far from its targets and near them; medians over three seeds. CG and
LSMR run until they solve to 1e-6 or 1e-9, or stagnate; their iterations stand behind the error.
"""

import statistics

import torch
import torch.nn.functional as F
from torch import nn

import pgdfast
from pgdfast import reference
from pgdfast.solve.cholesky import Cholesky
from pgdfast.solve.krylov import cg
from pgdfast.solve.lsmr import lsmr
from pgdfast.solve.problem import Problem

CONDITIONS = [10.0**k for k in range(2, 9)]
LIMIT = 10_000


def problem(seed, near):
    """Parameters and closure; `near` targets lie within 1e-3 of the outputs."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))
    x = torch.randn(100, 2)
    y = model(x).detach() + 1e-3 * torch.sin(3 * x[:, :1]) if near else torch.randn(100, 1)
    return list(model.parameters()), lambda: F.mse_loss(model(x), y)


def solvers(damped):
    """Label, and what it finds."""
    yield "dual, all float32", Cholesky("dual").factored(damped)[0]
    yield "dual, as chosen", pgdfast.solve(damped.linearization, damped.mu, solver="dual")
    yield "cg 1e-6", cg(damped, pgdfast.CG(LIMIT, 1e-6)).outcome
    yield "cg 1e-9", cg(damped, pgdfast.CG(LIMIT, 1e-9)).outcome
    yield "cg jacobi 1e-6", cg(damped, pgdfast.CG(LIMIT, 1e-6, preconditioner="jacobi")).outcome
    yield "cg nystrom 1e-6", cg(damped, pgdfast.CG(LIMIT, 1e-6, preconditioner=pgdfast.Nystrom(rank=60))).outcome
    yield "lsmr 1e-6", lsmr(damped, pgdfast.CG(LIMIT, 1e-6)).outcome
    yield "lsmr 1e-9", lsmr(damped, pgdfast.CG(LIMIT, 1e-9)).outcome


def main():
    for near in (False, True):
        table = {}
        for condition in CONDITIONS:
            errors, counts = {}, {}
            for seed in range(3):
                params, closure = problem(seed, near)
                truth = reference.linearize(closure, params)
                mu = float(torch.linalg.matrix_norm(truth.dense(), 2)) ** 2 / (condition - 1)
                expected = reference.solve(truth, mu, solver="eigh").step
                for name, found in solvers(Problem.of(pgdfast.linearize(closure, params), mu, None)):
                    error = float((found.step.double() - expected).norm() / expected.norm())
                    errors.setdefault(name, []).append(error)
                    counts.setdefault(name, []).append(found.iterations)
            for name in errors:
                count = statistics.median(counts[name])
                cell = f"{statistics.median(errors[name]):.0e}" + (f" ({count:.0f})" if count else "")
                table.setdefault(name, []).append(cell)
        print(f"\n{'near the targets' if near else 'far from the targets'}\n")
        print("| condition | " + " | ".join(f"{c:.0e}" for c in CONDITIONS) + " |")
        print("|---" * (len(CONDITIONS) + 1) + "|")
        for name, cells in table.items():
            print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
