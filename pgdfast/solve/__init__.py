"""(mu D + J^T J) delta = J^T r: the solvers, and the choice between them."""

from .captured import Direct, direct, solve_direct
from .choice import SOLVERS, operations
from .entry import solve
from .members import solve_members
from .options import CG, Nystrom
from .solution import ADVICE, Solution, Solutions

__all__ = [
    "ADVICE", "CG", "SOLVERS", "Direct", "Nystrom", "Solution", "Solutions", "direct", "operations", "solve",
    "solve_direct", "solve_members",
]
