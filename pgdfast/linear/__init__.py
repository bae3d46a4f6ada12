"""The Jacobian as an operator: products, Gram and dense forms of one linearization."""

from .adjoint import checked as checked_check
from .compiled import as_operations
from .ensemble import EnsembleLinearization, EnsembleLinearizer, check_stacked, losses_of, split_result
from .entry import linearize
from .linearization import Linearization, Linearizer

__all__ = [
    "EnsembleLinearization", "EnsembleLinearizer", "Linearization", "Linearizer", "as_operations", "check_stacked",
    "checked_check", "linearize", "losses_of", "split_result",
]
