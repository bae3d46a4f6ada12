"""The Jacobian as an operator: products, Gram and dense forms of one linearisation."""

from .linearization import Linearization, Linearizer, linearize

__all__ = ["Linearization", "Linearizer", "linearize"]
