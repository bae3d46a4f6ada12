"""The Jacobian as an operator: products, Gram and dense forms of one linearization."""

from .adjoint import checked as checked_check
from .compiled import as_operations
from .ensemble import EnsembleLinearization, EnsembleLinearizer, check_stacked, losses_of, split_result
from .linearization import CHANGED_PARAMETERS, RELEASED, Linearization, Linearizer, Products
from .values import code_of, functions_in, half_square, loss_at, values_of

__all__ = [
    "CHANGED_PARAMETERS", "RELEASED", "EnsembleLinearization", "EnsembleLinearizer", "Linearization", "Linearizer", "Products",
    "as_operations", "check_stacked", "checked_check", "code_of", "functions_in", "half_square", "loss_at", "losses_of",
    "split_result", "values_of",
]
