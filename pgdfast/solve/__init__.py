"""(mu D + J^T J) delta = J^T r: the solvers, and the choice between them."""

from .choice import SOLVERS
from .dampings import solve
from .members import MemberSolutions, solve_members
from .options import CG, Nystrom
from .solution import Solution, Solutions

__all__ = ["CG", "SOLVERS", "MemberSolutions", "Nystrom", "Solution", "Solutions", "solve", "solve_members"]
