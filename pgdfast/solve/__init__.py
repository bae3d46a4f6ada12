"""(mu D + J^T J) delta = J^T r: the solvers, and the choice between them."""

from .choice import SOLVERS, solve
from .members import solve_members
from .options import CG, Nystrom
from .solution import Solution

__all__ = ["CG", "SOLVERS", "Nystrom", "Solution", "solve", "solve_members"]
