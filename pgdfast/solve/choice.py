"""Which solver runs, by predicted cost, decided anew at every step."""

from __future__ import annotations

import os

import torch

from . import dense
from .cg import cg as run_cg
from .options import CG
from .problem import WIDE_FACTOR, Found, Problem
from .solution import Solution

SOLVERS = ("auto", "dual", "primal", "cg", "eigh")

# Operations per second of a solver's parts relative to a large matrix product, measured on two x86 machines: a small
# Cholesky runs at about half that rate, an eigendecomposition takes some 25 times the operations of a Cholesky, and CG's
# products are narrow.
_CHOLESKY, _EIGH, _SWEEP = 2.0, 25.0, 1.5
# In float32 a step's relative error is about 1e-8 of the condition number of the damped matrix, which the trace of
# J D^-1 J^T bounds; beyond these the sums and the factor are done in float64 (measured: bench/NOTES.md).
_NARROW_CONDITION, _NARROW_TOLERANCE = 5e3, 1e-6
_EXACT = 3.0   # CG stops at a tolerance: it must be this much cheaper than a direct solver to be preferred


def solve(
    linearization, damping: float, *, scale=None, solver: str = "auto", cg: CG | None = None, rcond: float = 1e-8,
    wide: bool = False,
) -> Solution:
    """Solve (mu D + J^T J) delta = J^T r at a linearisation.

    damping: mu >= 0; 0 is Gauss-Newton, the pseudo-inverse cut at rcond. scale: (P,) positive diagonal D, or None for the
    identity. solver: one of SOLVERS. cg: options of CG. wide: for a float32 problem, sum in float64 at once instead of when
    float32 turns out too narrow. Returns a Solution; its step is subtracted from the parameters.
    Raises ValueError for a negative or non-finite damping, a scale of the wrong shape and an unknown solver.
    """
    if not isinstance(damping, (int, float)) or not 0 <= damping < float("inf"):
        raise ValueError(f"pgdfast.solve: damping is {damping!r}; it must be one finite number that is not negative.")
    if solver not in SOLVERS:
        raise ValueError(f"pgdfast.solve: unknown solver {solver!r}; use one of {', '.join(SOLVERS)}.")
    if scale is not None and scale.shape != (linearization.num_parameters,):
        raise ValueError(
            f"pgdfast.solve: scale has shape {tuple(scale.shape)}; it must be ({linearization.num_parameters},)."
        )
    lin = linearization
    if lin.num_residuals == 0 and not lin.penalties:
        step = torch.zeros(lin.num_parameters, dtype=lin.dtype, device=lin.device)
        return Solution(step, "solved", 0, "none", "no residuals", 0.0, 0.0, lin, 0.0, 0.0)
    problem = Problem.of(lin, float(damping), scale)
    options = cg or CG()
    name, reason = choose(problem, solver, options)
    found, wide = _run(name, problem, options, rcond, wide)
    step, status, iterations, residual_norm, gain, square, _ = found
    damped = problem.damped(step, square)
    if step.dtype is not lin.dtype:
        step = step.to(lin.dtype)
    if not abs(gain) + square < float("inf"):
        step, status, gain, damped = torch.zeros_like(step), "not_finite", 0.0, 0.0
    if name != "cg":
        residual_norm = None
    return Solution(
        step, status, iterations, name, reason, gain, damped, lin, problem.damping_diagonal, residual_norm, wide
    )


def _run(name: str, problem: Problem, options: CG, rcond: float, wide: bool) -> tuple[Found, bool]:
    """Run a solver, in float64 where float32 could not give four digits and the problem is small; and whether it was so."""
    lin = problem.linearization
    small = lin.dtype == torch.float32 and min(lin.num_residuals, lin.num_parameters) <= WIDE_FACTOR
    if name == "cg":
        return run_cg(problem.widened() if small and options.tolerance < _NARROW_TOLERANCE else problem, options), False
    if name == "eigh":
        return dense.eigh(problem.widened() if small else problem, rcond), False
    run = dense.dual if name == "dual" else dense.primal
    if not (small and wide):
        found = run(problem)
        if not small or (found.trace <= _NARROW_CONDITION and found.status == "solved"):
            return found, False
    found = run(problem.widened())
    return found, found.trace > _NARROW_CONDITION


def choose(problem: Problem, solver: str, options: CG) -> tuple[str, str]:
    """(solver, why). Gauss-Newton and a vanishing diagonal need the pseudo-inverse."""
    if problem.mu > 0 and solver != "auto" or solver == "cg":
        return solver, "asked for"
    lin = problem.linearization
    M, P = lin.num_residuals, lin.num_parameters
    costs = predicted_costs(problem, options)
    if problem.mu == 0:
        if solver == "auto" and costs["eigh"][1] > memory_limit():
            return "cg", f"damping 0; the eigendecomposition would take {costs['eigh'][1] / 1e9:.1f} GB"
        return "eigh", "damping 0: pseudo-inverse" if solver in ("auto", "eigh") else (
            f"damping 0: {solver} has no Cholesky factor, so its pseudo-inverse is taken"
        )
    limit = memory_limit()
    fitting = {name: cost for name, (cost, memory) in costs.items() if memory <= limit and name != "eigh"}
    name = min(fitting, key=lambda key: fitting[key] * (_EXACT if key == "cg" else 1.0))
    others = ", ".join(f"{k} {v:.2g}" for k, v in fitting.items() if k != name)
    dropped = [k for k in ("dual", "primal") if k not in fitting]
    why = f"predicted {fitting[name]:.2g} operations for M = {M}, P = {P} ({others})"
    if dropped:
        why += f"; {' and '.join(dropped)} would need more than {limit / 1e9:.1f} GB"
    return name, why


def predicted_costs(problem: Problem, options: CG) -> dict[str, tuple[float, float]]:
    """{solver: (operations, bytes)} for one step, from sizes alone."""
    lin = problem.linearization
    M, P = float(lin.num_residuals), float(lin.num_parameters)
    operator, rows = lin.operator, lin.rows
    width = lin.residual.element_size()
    sweep = max(operator.flops, 2 * P, 2 * M)
    if rows is not None and operator.fused:
        build, sections, columns = rows.flops, rows.max_sections, rows.explicit_columns
        fill = 2 * M * P
    else:
        build, sections, columns = M * M * P, M, P
        fill = 0.0
    explicit = problem.scale is not None or not operator.fused
    jacobian = sections * sweep + fill
    dual = sections * sweep + (M * M * P if explicit else build) + _CHOLESKY * M**3 / 3 + sweep
    primal = jacobian + M * P * P + _CHOLESKY * P**3 / 3
    iterations = min(options.max_iterations, M, P)
    cg = iterations * 2 * _SWEEP * sweep + 2 * sweep
    eigh = (sections * sweep + build if M <= P else jacobian + M * P * P) + _EIGH * min(M, P) ** 3 / 3
    narrow = width * M * (P if explicit else columns)
    return {
        "dual": (dual, 16 * M * M + narrow),
        "primal": (primal, 16 * P * P + width * M * P),
        "cg": (cg, 8 * width * P),
        "eigh": (eigh, 40 * min(M, P) ** 2 + (narrow if M <= P else width * M * P)),
    }


def memory_limit() -> float:
    """Half of the memory that is free now, in bytes."""
    try:
        return 0.5 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 4e9
