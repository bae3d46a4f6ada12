"""Sixteen dampings from one linearization, against one: multi-shift CG, and one eigendecomposition."""

import pgdfast

from .interleave import Row, interleaved
from .problems import PROBLEMS
from .tables import Measured

COUNT = 16
CASES = [("A", "cg"), ("A", "eigh"), ("C", "cg"), ("C", "eigh"), ("F", "cg")]
QUICK_CASES = CASES[:2]
ONE, MANY, APART = "the smallest damping", f"{COUNT} dampings", f"{COUNT} dampings one by one"
# Steps against those of a damping alone: CG's agree as far as its tolerance determines them, at the condition of each problem.
ALLOWED = {("A", "cg"): 1e-4, ("C", "cg"): 0.3, ("F", "cg"): 1e-4, ("A", "eigh"): 1e-6, ("C", "eigh"): 1e-5}


def title(case):
    """The section's name."""
    return "dampings {}, {}".format(*case)


def dampings(problem):
    """From the problem's own mu to a thousand times that."""
    return [problem.damping * 1e3 ** (k / (COUNT - 1)) for k in range(COUNT)]


def measure(case, rounds):
    """Both solves of one problem in turn, from one linearization; and, once, the steps of every damping alone."""
    name, solver = case
    problem = PROBLEMS[name]
    model = problem.model()
    lin = pgdfast.linearize(problem.closure(model), list(model.parameters()))
    mus = dampings(problem)
    found = pgdfast.solve(lin, mus, solver=solver)
    alone = [pgdfast.solve(lin, mu, solver=solver) for mu in mus]
    off = max(float((a.step - b.step).norm() / b.step.norm()) for a, b in zip(found, alone, strict=True))
    rows = [Row(ONE, lambda: pgdfast.solve(lin, mus[0], solver=solver)),
            Row(MANY, lambda: pgdfast.solve(lin, mus, solver=solver))]
    if name == "A":
        rows.append(Row(APART, lambda: [pgdfast.solve(lin, mu, solver=solver) for mu in mus]))
    facts = {"residuals": lin.num_residuals, "parameters": lin.num_parameters, "iterations": list(found.iterations),
             "status": list(found.status), "alone": [s.iterations for s in alone]}
    return Measured(f"{title(case)}: {problem.described}", interleaved(rows, rounds), errors={MANY: (off, ALLOWED[case])},
                    facts=facts, ours=ONE)
