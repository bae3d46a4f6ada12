"""The problems: what they are, their budgets, and the two targets of each, as numbers.

The targets were written down after a look at the fixed combinations, before any look at LM with no options: `early` is what
most of them reach in about a third of the budget, `deep` what the best reach near its end.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from . import makers_fits as fits
from . import makers_networks as networks
from . import makers_pinns as pinns


@dataclass(frozen=True)
class Problem:
    """One problem of the study.

    make: seed -> (module or parameters, closure, error or None). early, deep: targets, of the error where `by_error`, else of
    the loss. steps, seconds: a run's budget; seconds are of the processor, in `step` alone. seeds: how many by default.
    options: what LM needs here under every variant. corrects: is the loss a sum of squares, which acceleration corrects?
    quick: part of the quick study?
    """

    what: str
    make: Callable
    early: float
    deep: float
    steps: int
    seconds: float
    seeds: int = 1
    by_error: bool = False
    options: dict = field(default_factory=dict)
    corrects: bool = True
    quick: bool = False


PROBLEMS = {
    "A": Problem("tanh 1-80-80-1, 100 residuals", networks.waves_1d, 1e-3, 1e-8, 1000, 2.0, 3, quick=True),
    "B": Problem("tanh 2-80-80-1, 400 residuals", networks.waves_2d, 1.0, 1e-8, 400, 4.0, 2),
    "C": Problem("PINN 2-256-1, 680 residuals", networks.pinn, 10.0, 1e-4, 400, 8.0),
    "D": Problem("quadratic 26-50-13, a + b mod 13 (full size: mod 23)", networks.modular, 2e-2, 1e-4, 200, 3.0, 2),
    "E": Problem("polynomial 100-500, 550 residuals", networks.nearly_linear, 1e-2, 1e-12, 100, 4.0, 2),
    "F": Problem("transformer of width 16, a + b mod 11, cross-entropy, CG, float32 (full size: width 128, mod 97)",
                 networks.attention, 0.5, 1e-3, 100, 6.0, options={"solver": "cg"}, corrects=False),
    "G": Problem("ReLU 784-250-10, 200 random images, mean square, float32", networks.pixels, 1e-2, 1e-8, 60, 6.0),
    "spirals": Problem("tanh 2-20-20-2, 300 points, cross-entropy", networks.spirals, 0.1, 1e-4, 400, 3.0, 2, corrects=False,
                       quick=True),
    "poisson-small": Problem("-Lap u = f, 2-64-1", pinns.poisson_small, 1e-5, 1e-7, 1000, 5.0, 2, by_error=True,
                             quick=True),
    "poisson-nested": Problem("the same, derivatives by nested autograd", pinns.poisson_nested, 1e-5, 1e-7, 1000, 7.0,
                              by_error=True),
    "poisson-large": Problem("-Lap u = f, 2-64-64-48-48-1", pinns.poisson_large, 1e-5, 1e-6, 1000, 13.0, by_error=True),
    "burgers": Problem("u_t + u u_x = nu u_xx, 2-20-20-20-1", pinns.burgers, 1e-3, 1e-6, 1000, 10.0, by_error=True),
    "helmholtz": Problem("Lap u + k^2 u = q, sines 2-40-40-1", pinns.helmholtz, 1e-4, 1e-7, 1000, 6.0, by_error=True),
    "heat-1d": Problem("u_t = 0.05 u_xx, 2-20-20-20-1", pinns.heat_1d, 3e-5, 1e-7, 1000, 6.0, by_error=True),
    "inverse-heat": Problem("u_t = D u_xx, D unknown, 10,000 data", pinns.inverse_heat, 1e-2, 2.5e-4, 1000, 7.0,
                            by_error=True),
    "convection": Problem("u_t + 30 u_x = 0, 2-30-30-30-1", pinns.convection, 0.1, 1e-3, 1000, 10.0, by_error=True),
    "allen-cahn": Problem("u_t = 1e-4 u_xx + 5 u - 5 u^3, 2-24-24-24-1", pinns.allen_cahn, 1e-3, 1e-7, 1000, 9.0),
    "enzyme": Problem("MGH09: 4 parameters, 11 points", fits.enzyme, 1e-3, 1.5376e-4, 1000, 1.0, 3, quick=True),
    "expansion": Problem("like Hahn1: 7 parameters, 236 points", fits.expansion, 2.0, 0.8295, 1000, 1.0, 3, quick=True),
    "exponentials": Problem("like Lanczos: 6 parameters, 24 points", fits.exponentials, 1e-6, 1.4e-9, 1000, 1.0, 3, quick=True),
    "peaks": Problem("like Gauss1: 8 parameters, 250 points", fits.peaks, 1000.0, 831.0, 200, 1.0, 3, quick=True),
    "robertson": Problem("stiff kinetics at 3 temperatures: 6 parameters, 117 data", fits.robertson, 1e-2, 6.6e-5, 100, 4.0),
}
