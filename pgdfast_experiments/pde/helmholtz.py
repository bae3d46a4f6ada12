"""`helmholtz`: a wave of wave number 4 pi in a square, sixteen half-waves by sixteen quarter turns.

Lap u + k^2 u = q on [0, 1]^2, k = 4 pi, u = 0 on the boundary, q such that u = sin(4 pi x) sin(4 pi y).
"""

import math

import torch

import pgdfast
from pgdfast_experiments.pde import worked
from pgdfast_experiments.pde.networks import Sine, mlp, sobol
from pgdfast_experiments.pde.pictures import Grid
from pgdfast_experiments.verification import Problem

NAME = "helmholtz"
SUMMARY = """\
Solve Lap u + k^2 u = q on the unit square, k = 4 pi, u = 0 on its boundary, with q such that
u = sin(4 pi x) sin(4 pi y), by a network of sines whose first layer starts at frequencies of the
size of k, by Adam, L-BFGS and LM in the same seconds. The reference is the exact solution.

Writes helmholtz.png, helmholtz.csv and helmholtz.json into the folder of --out,
over those of an earlier run."""
SOURCE = "DeepXDE's demonstration problem: Helmholtz on the unit square, k = 2 pi n with n = 2"
PAPER = "There is no published error of this setting to compare with; the reference is the exact solution."

WAVE_NUMBER, FREQUENCY = 4 * math.pi, 6.0
"""FREQUENCY: standard deviation of the first layer's initial weights."""
POINTS, SIZES = 1200, [2, 40, 40, 1]
KNOWN, RATES = worked.KNOWN, worked.RATES
DEFAULTS = {**worked.DEFAULTS, "seconds": 15.0}
QUICK = {"seconds": 3.0, "seeds": 1}


class Membrane(torch.nn.Module):
    """u(x, y) = 16 x (1 - x) y (1 - y) net(x, y): zero on the boundary of the unit square. Input (N, 2)."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, points):
        """Return u, (N, 1)."""
        x, y = points[:, :1], points[:, 1:]
        return 16 * x * (1 - x) * y * (1 - y) * self.net(points)


def exact(points):
    """Return u at points (N, 2), (N, 1)."""
    return torch.sin(WAVE_NUMBER * points[:, :1]) * torch.sin(WAVE_NUMBER * points[:, 1:])


def network(seed, dtype):
    """Return the seed's network of sines; its first layer starts at frequencies of the size of the wave's."""
    net = mlp(SIZES, seed, Sine, dtype)
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        net[0].weight.normal_(0, FREQUENCY, generator=generator)
        net[0].bias.uniform_(-math.pi, math.pi, generator=generator)
    return net


def make(seed, variant="", dtype=torch.float64, count=POINTS):
    """Return the seed's trial."""
    model = Membrane(network(seed, dtype))
    points = sobol(count, seed, dtype)
    source = -WAVE_NUMBER**2 * exact(points)   # Lap u = -2 k^2 u

    def residuals():
        u, _, laplacian = pgdfast.pde.laplacian(model, points)
        return ((laplacian + WAVE_NUMBER**2 * u - source) / (WAVE_NUMBER**2 * math.sqrt(count)),)

    grid = WORKED.grid.points(dtype)
    return worked.Trial(model, residuals, model, worked.relative_l2(model, grid, exact(grid)))


WORKED = worked.Worked(
    NAME, "\u0394u + k\u00b2u = q, k = 4\u03c0", make, Grid("x", "y", (0, 0), (1, 1), exact),
    "relative L2 distance from the exact solution on a 121 x 121 grid", (worked.Goal(1e-5, 15.0),),
)
cases, summarize, judge, table, pictures = WORKED.cases, WORKED.summarize, WORKED.judge, WORKED.table, WORKED.pictures
add_options = WORKED.add_options


def describe(settings):
    """Return what the options leave fixed, for the record."""
    return WORKED.describe(
        settings, equation="Lap u + k^2 u = q on [0, 1]^2, u = 0 on the boundary; u = sin(k x) sin(k y)",
        wave_number=WAVE_NUMBER, network="16 x (1 - x) y (1 - y) net(x, y), sines; first layer N(0, s^2), bias U(-pi, pi)",
        first_layer=FREQUENCY, sizes=SIZES, points=f"{POINTS}, Sobol",
        residuals=f"(Lap u + k^2 u - q) / (k^2 sqrt({POINTS}))",
    )


def problem(dtype, seed=0):
    """Return the problem that `pgdfast verify` compares the backends on."""
    trial = make(seed, dtype=dtype, count=64)
    return Problem(trial.model, trial.residuals, {"damping": 1e-2, "lr": 0.1}, ("dual", "cg"),
                   "sines 2-40-40-1, 64 points, 1,801 parameters")
