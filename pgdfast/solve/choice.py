"""Which solver runs, by predicted cost, decided anew at every step."""

from __future__ import annotations

import torch

from . import dense
from .cg import cg as run_cg
from .lsmr import lsmr
from .memory import memory_limit, predicted_bytes
from .options import CG, Nystrom
from .problem import DOUBLE_FACTOR, WIDE_FACTOR, Found, Problem
from .solution import Solution
from .spectral import eigh

SOLVERS = ("auto", "dual", "primal", "cg", "eigh", "lsmr")

# Time of a solver's parts over that of a large matrix product of as many operations, measured on x86 machines: the Cholesky
# factor, an eigendecomposition counted in operations of a Cholesky, and CG's narrow products.
_CHOLESKY, _EIGH, _SWEEP = 1.5, 25.0, 1.5
# In float32 a step's relative error is about 1e-8 of the condition number of the damped matrix, which the trace of
# J D^-1 J^T bounds. Beyond these the step is refined with float64 products; up to DOUBLE_FACTOR, where that saves nothing, and
# where the float32 factor is too poor for it, it is summed and factored in float64 (measured: bench/NOTES.md).
NARROW_CONDITION, NARROW_TOLERANCE = 5e3, 1e-6
# CG stops at a tolerance: it must be this much cheaper than a direct solver to be preferred. Where neither matrix is small
# any gain will do: its cost is counted with all the iterations that it may take, and seldom are they needed.
_EXACT, _SMALL = 3.0, 8192


def solve_one(
    linearization, damping: float, *, scale=None, solver: str = "auto", cg: CG | None = None, rcond: float = 1e-8,
    wide: bool = False, keep: dict | None = None, time: int = 0, prior=None,
) -> Solution:
    """`solve` (dampings.py) for one damping."""
    if not isinstance(damping, (int, float)) or not 0 <= damping < float("inf"):
        raise ValueError(f"pgdfast.solve: damping is {damping!r}; it must be one finite number that is not negative.")
    check(linearization, solver, scale, prior)
    lin = linearization
    if lin.num_residuals == 0 and not lin.penalties:
        return nothing(lin)
    problem = Problem.of(lin, float(damping), scale, prior)
    options = cg or CG()
    name, reason = choose(problem, solver, options, wide)
    return solution(name, reason, problem, *run(name, problem, options, rcond, wide, keep, time))


def check(linearization, solver: str, scale, prior) -> None:
    """Raise ValueError for an unknown solver and for a scale or prior of the wrong shape."""
    if solver not in SOLVERS:
        raise ValueError(f"pgdfast.solve: unknown solver {solver!r}; use one of {', '.join(SOLVERS)}.")
    for what, vector in (("scale", scale), ("prior", prior)):
        if vector is not None and vector.shape != (linearization.num_parameters,):
            raise ValueError(
                f"pgdfast.solve: {what} has shape {tuple(vector.shape)}; it must be ({linearization.num_parameters},)."
            )


def nothing(lin) -> Solution:
    """The step of a linearisation without residuals."""
    step = torch.zeros(lin.num_parameters, dtype=lin.dtype, device=lin.device)
    return Solution(step, "solved", 0, "none", "no residuals", 0.0, 0.0, lin, 0.0, 0.0, solve_again=lambda u: step.clone())


def solution(name: str, reason: str, problem: Problem, found: Found, wide: bool, keep: dict) -> Solution:
    """What a solver found, for the problem as it was given and in its precision."""
    lin, prior = problem.linearization, problem.prior
    if prior is not None and found.status != "not_positive_definite":
        found = problem.from_prior(found)
    step, status, iterations, residual_norm, gain, square, _, slack, path, again, _ = found
    damped = problem.damped(step, square)
    if step.dtype is not lin.dtype:
        step = step.to(lin.dtype)
    if not abs(gain) + square < float("inf"):
        step, status, gain, damped, slack, path, prior = torch.zeros_like(step), "not_finite", 0.0, 0.0, 0.0, (), None
    if name not in ("cg", "lsmr"):
        residual_norm = None
    return Solution(
        step, status, iterations, name, reason, gain, damped, lin, problem.damping_diagonal, residual_norm, wide, slack, path,
        keep, prior, again and (lambda u: again(u.to(found.step.dtype)).to(lin.dtype)),
    )


def run(name: str, problem: Problem, options: CG, rcond: float, wide: bool, keep, time) -> tuple[Found, bool, dict]:
    """Run a solver, in float64 where float32 could not give four digits and the problem is small.

    Returns what it found, whether it took float64, and what the next solve may start from.
    """
    lin = problem.linearization
    small = lin.dtype == torch.float32 and min(lin.num_residuals, lin.num_parameters) <= WIDE_FACTOR
    if name in ("cg", "lsmr"):
        problem = problem.widened() if too_narrow(lin, options) else problem
        found, keep = run_cg(problem, options, keep, time) if name == "cg" else (lsmr(problem, options), {})
        return found, False, keep
    if name == "eigh":
        return eigh(problem.widened() if small else problem, [problem.mu], rcond)[0], False, {}
    direct = dense.dual if name == "dual" else dense.primal
    if lin.dtype != torch.float32:
        return direct(problem), False, {}
    order = lin.num_residuals if name == "dual" else lin.num_parameters
    if not (wide and small):
        found = direct(problem)
        enough = found.trace <= NARROW_CONDITION
        if found.status == "solved" and not enough and order > DOUBLE_FACTOR:
            better = dense.refined(name, problem, found)
            found, enough = better or found, better is not None
        if not small or (enough and found.status == "solved"):
            return found, False, {}
    found = direct(problem.widened())
    return found, found.trace > NARROW_CONDITION, {}


def too_narrow(lin, options: CG) -> bool:
    """Whether an iterative solve to this tolerance takes float64 for a float32 problem."""
    small = lin.dtype == torch.float32 and min(lin.num_residuals, lin.num_parameters) <= WIDE_FACTOR
    return small and options.tolerance < NARROW_TOLERANCE


def choose(problem: Problem, solver: str, options: CG, wide: bool = False, dampings: int = 1) -> tuple[str, str]:
    """(solver, why), for so many dampings of which the problem's is the least.

    Gauss-Newton and a vanishing diagonal need the pseudo-inverse.
    """
    if problem.mu > 0 and solver != "auto" or solver == "cg" or (solver == "lsmr" and problem.penalty is None):
        return solver, "asked for"
    lin = problem.linearization
    M, P = lin.num_residuals, lin.num_parameters
    costs = predicted_costs(problem, options, wide, dampings)
    if problem.mu == 0:
        if solver == "auto" and costs["eigh"][1] > memory_limit():
            return "cg", f"damping 0; the eigendecomposition would take {costs['eigh'][1] / 1e9:.1f} GB"
        return "eigh", "damping 0: pseudo-inverse" if solver in ("auto", "eigh") else (
            f"damping 0: {solver} needs a positive diagonal, so the pseudo-inverse is taken"
        )
    limit = memory_limit()
    fitting = {
        name: cost for name, (cost, memory) in costs.items()
        if name == "cg" or (memory <= limit and (dampings > 1 or name != "eigh"))
    }   # CG stays in: it needs the least
    handicap = _EXACT if min(M, P) <= _SMALL else 1.0
    name = min(fitting, key=lambda key: fitting[key] * (handicap if key == "cg" else 1.0))
    others = ", ".join(f"{k} {v:.2g}" for k, v in fitting.items() if k != name)
    dropped = [k for k in ("dual", "primal") if k not in fitting]
    many = f", {dampings} dampings" if dampings > 1 else ""
    why = f"predicted {fitting[name]:.2g} operations for M = {M}, P = {P}{many} ({others})"
    if dropped:
        sizes = " and ".join(f"{k} ({costs[k][1] / 1e9:.1f} GB)" for k in dropped)
        why += f"; {sizes} left out for memory, of which {limit / 1e9:.1f} GB may be used"
    return name, why


def predicted_costs(problem: Problem, options: CG, wide: bool = False, dampings: int = 1) -> dict[str, tuple[float, float]]:
    """{solver: (operations, bytes)} for the steps of so many dampings, from sizes alone."""
    lin = problem.linearization
    M, P = float(lin.num_residuals), float(lin.num_parameters)
    operator, rows = lin.operator, lin.rows
    sweep = max(operator.flops, 2 * P, 2 * M)
    if rows is not None and operator.fused:
        build, sections = rows.flops, rows.max_sections
        fill = 2 * M * P
    else:
        build, sections = M * M * P, M
        fill = 0.0
    explicit = problem.scale is not None or not operator.fused
    jacobian = sections * sweep + fill
    gram = sections * sweep + (M * M * P if explicit else build)
    factor = _CHOLESKY * M**3 / 3 + sweep
    # The core keeps its matrix for further dampings, unless a penalty weighs it by each.
    dual = gram + dampings * factor if not explicit and problem.penalty is None else dampings * (gram + factor)
    if operator.fused and rows is not None and operator.sums_sections:
        normal = sections * sweep + rows.num_rows * P * P
    else:
        normal = jacobian + M * P * P
    factor = _CHOLESKY * P**3 / 3
    primal = normal + dampings * factor if operator.fused else dampings * (normal + factor)
    iterations = min(options.max_iterations, M, P)
    cg = iterations * 2 * _SWEEP * sweep + 2 * sweep
    if isinstance(options.preconditioner, Nystrom):   # its use in every iteration, and its making in one step of `refresh`
        rank, refresh = min(options.preconditioner.rank, P), options.preconditioner.refresh
        cg += 4 * rank * P * iterations + (rank * 2 * _SWEEP * sweep + 6 * rank**2 * P) / refresh
    if dampings > 1:
        cg = cg + 4 * dampings * P * iterations if options.shifts else dampings * cg
    least = min(M, P)
    eigh = (sections * sweep + build if M <= P else jacobian + M * P * P) + _EIGH * least**3 / 3
    eigh += (dampings - 1) * (sweep + 2 * least**2)
    needed = predicted_bytes(problem, options, wide, dampings)
    operations = {"dual": dual, "primal": primal, "cg": cg, "eigh": eigh}
    return {name: (count, needed[name]) for name, count in operations.items()}

