"""Levenberg-Marquardt and Gauss-Newton steps for PyTorch models, exact and fast.

opt = pgdfast.LM(model.parameters())
loss = opt.step(lambda: F.mse_loss(model(x), y))
"""

from . import reference
from .build import build_info, check_build
from .kernels import backends
from .linear import Linearization, linearize
from .lm import LM
from .report import Report
from .solve import CG, Solution, solve

check_build()

__version__ = "0.1.0"
__all__ = [
    "CG", "LM", "Linearization", "Report", "Solution", "backends", "build_info", "linearize", "reference", "solve",
]
