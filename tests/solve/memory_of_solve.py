"""Run by test_solve_memory.py in a process of its own: the memory of one solve, predicted and measured, as JSON."""

import json
import sys

import torch
import torch.nn.functional as F
from torch import nn

import pgdfast
from pgdfast.solve.choice import predicted_costs
from pgdfast.solve.problem import Problem

CASES = {   # solver, samples, tokens each, widths
    "dual": ("dual", 2500, 0, 20, 200, 200, 1),
    "dual in passes": ("dual", 1500, 4, 10, 150, 150, 1),   # explicit rows: J alone takes 144 MB
    "cg": ("cg", 200, 0, 784, 1000, 600, 10),
}


def resident(field):
    """Bytes of a field of /proc/self/status."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def problem(samples, tokens, *widths):
    """A tanh network with a mean squared error, linearized; averaged over the tokens of a sample, if it has any."""
    torch.manual_seed(0)
    pairs = zip(widths[:-1], widths[1:], strict=True)
    model = nn.Sequential(*[layer for a, b in pairs for layer in (nn.Linear(a, b), nn.Tanh())][:-1])
    y = torch.randn(samples, widths[-1])
    if tokens:
        x = torch.randn(samples, tokens, widths[0])
        return pgdfast.linearize(lambda: F.mse_loss(model(x).mean(1), y), model.parameters())
    x = torch.randn(samples, widths[0])
    return pgdfast.linearize(lambda: F.mse_loss(model(x), y), model.parameters())


def main(name):
    solver, *sizes = CASES[name]
    cg = pgdfast.CG(60, 1e-6, truncate=True, preconditioner=pgdfast.Nystrom(rank=5))
    pgdfast.solve(problem(50, 0, 10, 20, 1), 0.1, solver=solver, cg=cg)   # loads what BLAS and PyTorch load at first
    lin = problem(*sizes)
    predicted = predicted_costs(Problem.of(lin, 1.0), cg)[solver][1]
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")   # resets the peak
    before = resident("VmRSS")
    solution = pgdfast.solve(lin, 1.0, solver=solver, cg=cg)
    measured = resident("VmHWM") - before
    print(json.dumps({"predicted": predicted, "measured": measured, "status": solution.status}))


if __name__ == "__main__":
    main(sys.argv[1])
