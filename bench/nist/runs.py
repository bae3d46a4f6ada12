"""Fits of NIST's data sets from both starts, by LM and by MINPACK."""

import importlib.util
import math
from dataclasses import dataclass

import torch

import pgdfast

from . import Problem

STEPS = 10_000   # the most that a fit may take
MINPACK_EVALUATIONS = 20_000
HAS_MINPACK = importlib.util.find_spec("scipy") is not None


@dataclass(frozen=True)
class Fit:
    """Where a fit ended.

    digits: of its worst parameter. steps: of LM, or Jacobians of MINPACK. loss: 1/2 ||r||^2. scaling: LM's.
    """

    name: str
    start: int
    digits: float
    steps: int
    loss: float
    status: str
    scaling: str = ""


def by_lm(problem: Problem, start: int, steps: int = STEPS, **options) -> Fit:
    """LM's fit, with these options, until its report says that it has ended."""
    b = torch.tensor(problem.starts[start], dtype=torch.float64, requires_grad=True)
    optimizer, taken = pgdfast.LM([b], **options), 0
    while taken < steps:
        optimizer.step(lambda: problem.residuals(b))
        taken += 1
        if optimizer.report.status in ("stalled", "converged"):
            break
    return _fit(problem, start, b, taken, optimizer.report.status, optimizer.report.scaling)


def by_minpack(problem: Problem, start: int) -> Fit:
    """MINPACK's lmder: its own scaling and an exact Jacobian, to rounding."""
    from scipy.optimize import least_squares

    def residuals(b):
        with torch.no_grad():
            return problem.residuals(torch.from_numpy(b)).numpy()

    def jacobian(b):
        return torch.func.jacrev(problem.residuals)(torch.from_numpy(b)).numpy()

    tight = dict.fromkeys(("ftol", "xtol", "gtol"), 1e-15)
    try:
        found = least_squares(
            residuals, problem.starts[start], jacobian, method="lm", x_scale="jac", max_nfev=MINPACK_EVALUATIONS, **tight)
    except ValueError as error:   # of residuals or derivatives that are not finite
        return Fit(problem.name, start, 0.0, 0, math.inf, f"failed: {error}")
    return _fit(problem, start, torch.from_numpy(found.x), found.njev or 0, "ended" if found.status > 0 else "evaluations")


def _fit(problem: Problem, start: int, b: torch.Tensor, steps: int, status: str, scaling: str = "") -> Fit:
    with torch.no_grad():
        loss = 0.5 * float(problem.residuals(b).square().sum())
    return Fit(problem.name, start, problem.digits(b.tolist()), steps, loss, status, scaling)
