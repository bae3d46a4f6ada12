"""(mu D + J^T J) delta = J^T r: the solvers, and the choice between them."""

from .choice import SOLVERS
from .dampings import solve
from .options import CG, Nystrom
from .solution import Solution, Solutions

__all__ = ["CG", "SOLVERS", "Nystrom", "Solution", "Solutions", "solve"]
