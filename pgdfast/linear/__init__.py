"""The Jacobian as an operator: products, Gram and dense forms of one linearisation."""

from .ensemble import EnsembleLinearization, EnsembleLinearizer, losses_of
from .linearization import Linearization, Linearizer, linearize

__all__ = ["EnsembleLinearization", "EnsembleLinearizer", "Linearization", "Linearizer", "linearize", "losses_of"]
