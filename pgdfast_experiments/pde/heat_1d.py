"""`heat-1d`: the heat equation on an interval, from two sines that fade at different rates.

u_t = D u_xx on [0, 1] x [0, 1], D = 0.05, u = 0 at both ends, u(x, 0) = sin(pi x) + sin(3 pi x) / 2.
"""

import math

import torch

import pgdfast
from pgdfast_experiments.pde import worked
from pgdfast_experiments.pde.networks import mlp, sobol
from pgdfast_experiments.pde.pictures import Grid
from pgdfast_experiments.pde.references import heat_modes
from pgdfast_experiments.verification import Problem

NAME = "heat-1d"
SUMMARY = """\
Solve u_t = 0.05 u_xx on [0, 1] x [0, 1], u = 0 at both ends, u(x, 0) = sin(pi x) + sin(3 pi x) / 2, by a
tanh network that holds initial and boundary values by construction, by Adam, L-BFGS and LM in
the same seconds. The reference is the exact solution.

Writes heat-1d.png, heat-1d.csv and heat-1d.json into the folder of --out,
over those of an earlier run."""
SOURCE = "a standard test of networks for differential equations"
PAPER = "There is no published figure of this setting to compare with; the reference is the exact solution."

DIFFUSIVITY, MODES = 0.05, ((1, 1.0), (3, 0.5))
POINTS, SIZES = 600, [2, 20, 20, 20, 1]
KNOWN, RATES = worked.KNOWN, worked.RATES
DEFAULTS = {**worked.DEFAULTS, "seconds": 20.0}
QUICK = {"seconds": 3.0, "seeds": 1}


class Heat(torch.nn.Module):
    """u(x, t) = u(x, 0) + 4 t x (1 - x) net(x, t): right at t = 0 and at both ends. Input (N, 2), columns x and t."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, points):
        """Return u, (N, 1)."""
        x, t = points[:, :1], points[:, 1:]
        start = sum(c * torch.sin(k * math.pi * x) for k, c in MODES)
        return start + 4 * t * x * (1 - x) * self.net(points)


def exact(points):
    """Return u at points (N, 2), (N, 1)."""
    return heat_modes(points[:, :1], points[:, 1:], DIFFUSIVITY, MODES)


def make(seed, variant="", dtype=torch.float64, count=POINTS):
    """Return the seed's trial."""
    model = Heat(mlp(SIZES, seed, dtype=dtype))
    points = sobol(count, seed, dtype)

    def residuals():
        _, (_, u_t), (u_xx,) = pgdfast.pde.jet(model, points, [0, 1], order=[2, 1])
        return ((u_t - DIFFUSIVITY * u_xx) / math.sqrt(count),)

    grid = WORKED.grid.points(dtype)
    return worked.Trial(model, residuals, model, worked.relative_l2(model, grid, exact(grid)))


WORKED = worked.Worked(
    NAME, "u_t = 0.05 u_xx", make, Grid("x", "t", (0, 0), (1, 1), exact),
    "relative L2 distance from the exact solution on a 121 x 121 grid", (worked.Goal(1e-6, 20.0),),
)
cases, summarize, judge, table, pictures = WORKED.cases, WORKED.summarize, WORKED.judge, WORKED.table, WORKED.pictures
add_options = WORKED.add_options


def describe(settings):
    """Return what the options leave fixed, for the record."""
    return WORKED.describe(
        settings, equation="u_t = D u_xx on [0, 1] x [0, 1], u = 0 at x = 0 and 1, u(x, 0) = sin(pi x) + sin(3 pi x) / 2",
        diffusivity=DIFFUSIVITY, network="u(x, 0) + 4 t x (1 - x) net(x, t), tanh, Glorot normal", sizes=SIZES,
        points=f"{POINTS}, Sobol", residuals=f"(u_t - D u_xx) / sqrt({POINTS})",
    )


def problem(dtype, seed=0):
    """Return the problem that `pgdfast verify` compares the backends on."""
    trial = make(seed, dtype=dtype, count=64)
    return Problem(trial.model, trial.residuals, {"damping": 1e-2, "lr": 0.1}, ("dual", "cg"),
                   "2-20-20-20-1, 64 points, 921 parameters")
