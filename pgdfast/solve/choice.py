"""Which solver runs, by predicted cost: decided at every step, worked out anew where what it reads has changed."""

from __future__ import annotations

from ..kernels.memory import memory_limit
from .cholesky import Cholesky
from .krylov import ConjugateGradients
from .lsmr import LSMR
from .options import CG
from .problem import Problem, Solver
from .sizes import SWEEP, Sizes
from .spectral import Eigh

BY_NAME: dict[str, Solver] = {
    solver.name: solver for solver in (Cholesky("dual"), Cholesky("primal"), ConjugateGradients(), Eigh(), LSMR())
}
SOLVERS = ("auto", *BY_NAME)

# CG stops at a tolerance: it must be this much cheaper than a direct solver to be preferred. Where neither matrix is small
# any gain will do: its cost is counted with all the iterations that it may take, and seldom are they needed.
_EXACT, _SMALL = 3.0, 8192
# Bytes: where the cheapest solver needs less than the first, and any other less than the second, the memory that is available
# is not asked for.
FITS, OTHERS_FIT = 256e6, 1e9
_REMEMBERED = 64      # choices of one structure


def choose(problem: Problem, solver: str, options: CG, wide: bool = False, dampings: int = 1) -> tuple[str, str]:
    """(solver, why), for so many dampings of which the problem's is the least.

    Gauss-Newton and a vanishing diagonal need the pseudo-inverse. A choice that memory has no part in is remembered with the
    linearization's structure.
    """
    damped = problem.mu > 0
    if damped and solver != "auto" or solver == "cg" or (solver == "lsmr" and problem.penalty is None):
        return solver, "asked for"
    lin = problem.linearization
    key = (solver, id(options), wide, dampings, damped, problem.scale is None, problem.penalty is None, lin.num_residuals)
    known = lin.choices.get(key)
    if known is not None and known[0] is options:
        return known[1]
    costs = predicted_costs(problem, options, wide, dampings)
    choice = _choice(problem, solver, costs, dampings, None)
    relevant = costs.values() if damped else [costs["eigh"]]
    if costs[choice[0]][1] > FITS or max(memory for _, memory in relevant) > OTHERS_FIT:
        return _choice(problem, solver, costs, dampings, lin.agreed(memory_limit(lin.device)))
    if len(lin.choices) >= _REMEMBERED:
        lin.choices.clear()
    lin.choices[key] = options, choice   # held, so that no others can have their id
    return choice


def _choice(problem: Problem, solver: str, costs, dampings: int, limit: float | None) -> tuple[str, str]:
    """`choose` by these costs and this much memory, None for enough."""
    lin = problem.linearization
    M, P = lin.num_residuals, lin.num_parameters
    if problem.mu == 0:
        if solver == "auto" and limit is not None and costs["eigh"][1] > limit:
            return "cg", f"damping 0; the eigendecomposition would take {costs['eigh'][1] / 1e9:.1f} GB"
        return "eigh", "damping 0: pseudo-inverse" if solver in ("auto", "eigh") else (
            f"damping 0: {solver} needs a positive diagonal, so the pseudo-inverse is taken"
        )
    fitting = {
        name: cost for name, (cost, memory) in costs.items()
        if name == "cg" or ((limit is None or memory <= limit) and dampings >= BY_NAME[name].automatic)
    }   # CG stays in: it needs the least
    handicap = _EXACT if min(M, P) <= _SMALL else 1.0
    name = min(fitting, key=lambda key: fitting[key] * (handicap if key == "cg" else 1.0))
    others = ", ".join(f"{k} {v:.2g}" for k, v in fitting.items() if k != name)
    dropped = [k for k in ("dual", "primal") if k not in fitting]
    many = f", {dampings} dampings" if dampings > 1 else ""
    why = f"predicted {fitting[name]:.2g} operations for M = {M}, P = {P}{many} ({others})"
    if lin.coupling:
        why += f"; {lin.coupling}"
    if dropped:
        sizes = " and ".join(f"{k} ({costs[k][1] / 1e9:.1f} GB)" for k in dropped)
        why += f"; {sizes} left out for memory, of which {limit / 1e9:.1f} GB may be used"
    return name, why


def predicted_costs(problem: Problem, options: CG, wide: bool = False, dampings: int = 1) -> dict[str, tuple[float, float]]:
    """{solver: (operations, bytes)} of the solvers that "auto" considers, from sizes alone."""
    sizes = Sizes(problem, options, wide, dampings)
    return {
        name: (solver.operations(sizes), solver.bytes(sizes)) for name, solver in BY_NAME.items() if solver.automatic
    }


def operations(lin, solver: str, iterations: int, options: CG) -> tuple[float, float]:
    """Predicted (of what all dampings share, of each damping), by a solver that took so many iterations, 0 if it is direct."""
    problem = Problem.of(lin, 1.0)
    sizes = Sizes(problem, options)
    if iterations:
        return 0.0, iterations * 2 * SWEEP * sizes.sweep
    by = BY_NAME.get(solver, BY_NAME["dual"])
    one, two = by.operations(sizes), by.operations(Sizes(problem, options, dampings=2))
    return max(2 * one - two, 0.0), two - one
