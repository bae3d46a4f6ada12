"""Run by test_solve_memory.py in a process of its own: the memory of one solve, predicted and measured, as JSON."""

import json
import sys

import torch
import torch.nn.functional as F
from torch import nn

import pgdfast
from pgdfast.solve.memory import predicted_bytes
from pgdfast.solve.problem import Problem

CASES = {"dual": (2500, 20, 200, 200, 1), "cg": (200, 784, 1000, 600, 10)}


def resident(field):
    """Bytes of a field of /proc/self/status."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def problem(samples, *widths):
    """A tanh network with a mean squared error, linearised."""
    torch.manual_seed(0)
    pairs = zip(widths[:-1], widths[1:], strict=True)
    model = nn.Sequential(*[layer for a, b in pairs for layer in (nn.Linear(a, b), nn.Tanh())][:-1])
    x, y = torch.randn(samples, widths[0]), torch.randn(samples, widths[-1])
    return pgdfast.linearize(lambda: F.mse_loss(model(x), y), model.parameters())


def main(solver):
    cg = pgdfast.CG(60, 1e-6, truncate=True, preconditioner=pgdfast.Nystrom(rank=5))
    pgdfast.solve(problem(50, 10, 20, 1), 0.1, solver=solver, cg=cg)   # loads what BLAS and PyTorch load at first
    lin = problem(*CASES[solver])
    predicted = predicted_bytes(Problem.of(lin, 1.0, None), cg)[solver]
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")   # resets the peak
    before = resident("VmRSS")
    solution = pgdfast.solve(lin, 1.0, solver=solver, cg=cg)
    measured = resident("VmHWM") - before
    print(json.dumps({"predicted": predicted, "measured": measured, "status": solution.status}))


if __name__ == "__main__":
    main(sys.argv[1])
