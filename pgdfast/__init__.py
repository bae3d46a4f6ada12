"""Levenberg-Marquardt and Gauss-Newton steps for PyTorch models, exact and fast.

opt = pgdfast.LM(model.parameters())
loss = opt.step(lambda: F.mse_loss(model(x), y))
"""

from . import pde, reference
from .build import build_info, check_build
from .captured import CapturedStep
from .ensembles import Ensemble, functional_ensemble
from .hybrid import Hybrid
from .kernels import backends
from .linear import Linearization
from .lm import LM
from .parts import Parts, Ranks, linearize
from .report import EnsembleReport, Report
from .solve import CG, Nystrom, Solution, Solutions, solve
from .spectra import Spectrum, SpectrumHistory, kernel_alignment, kernel_drift, ntk_spectrum
from .step import (
    Acceleration,
    Armijo,
    Auto,
    Balance,
    Chord,
    Constant,
    DampingRule,
    Delayed,
    GainRatio,
    Geodesic,
    LineSearch,
    Longest,
    Sweep,
)
from .switches import Alignment, KernelDrift, Plateau

check_build()

__version__ = "0.1.0"
__all__ = [
    "CG", "LM", "Acceleration", "Alignment", "Armijo", "Auto", "Balance", "CapturedStep", "Chord", "Constant",
    "DampingRule", "Delayed", "Ensemble", "EnsembleReport", "GainRatio", "Geodesic", "Hybrid", "KernelDrift",
    "LineSearch", "Linearization", "Longest", "Nystrom", "Parts", "Plateau", "Ranks", "Report", "Solution", "Solutions",
    "Spectrum", "SpectrumHistory", "Sweep", "backends", "build_info", "functional_ensemble", "kernel_alignment",
    "kernel_drift", "linearize", "ntk_spectrum", "pde", "reference", "solve",
]
