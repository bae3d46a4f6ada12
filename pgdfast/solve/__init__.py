"""(mu D + J^T J) delta = J^T r: the solvers, and the choice between them."""

from .choice import SOLVERS
from .dampings import solve
from .members import MemberSolutions, solve_members
from .on_device import Direct, direct, solve_direct
from .options import CG, Nystrom
from .solution import ADVICE, Solution, Solutions

__all__ = [
    "ADVICE", "CG", "SOLVERS", "Direct", "MemberSolutions", "Nystrom", "Solution", "Solutions", "direct", "solve",
    "solve_direct", "solve_members",
]
