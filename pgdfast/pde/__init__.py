"""Values and derivatives of a network with respect to its inputs, for the residuals of differential equations."""

from .jets import Jet, Laplacian, jet, laplacian

__all__ = ["Jet", "Laplacian", "jet", "laplacian"]
