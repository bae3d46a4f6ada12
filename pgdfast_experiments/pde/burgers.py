"""`burgers`: Burgers' equation at viscosity 0.01 / pi, whose solution steepens into a layer of width 0.003.

u_t + u u_x = nu u_xx on [-1, 1] x [0, 1], u(x, 0) = -sin(pi x), u = 0 at both ends.

The solution is odd in x, so the network covers 0 <= x <= 1. Its first input is s with x = d sinh(A s), A = asinh(1 / d):
equal steps in s resolve the layer at x = 0 and the rest alike. There u is as smooth as anywhere else.
"""

import math

import torch

import pgdfast
from pgdfast_experiments.pde import worked
from pgdfast_experiments.pde.networks import mlp, sobol
from pgdfast_experiments.pde.pictures import Grid
from pgdfast_experiments.pde.references import cole_hopf
from pgdfast_experiments.verification import Problem

NAME = "burgers"
SUMMARY = """\
Solve u_t + u u_x = nu u_xx on [-1, 1] x [0, 1] with nu = 0.01 / pi, u(x, 0) = -sin(pi x), u = 0 at both ends, by
a tanh network of (asinh(x / d), t), by Adam, L-BFGS and LM in the same seconds. The reference is the
Cole-Hopf solution, computed here by Gauss-Hermite quadrature.

Writes burgers.png, burgers.csv and burgers.json into the folder of --out,
over those of an earlier run."""
SOURCE = "Raissi, Perdikaris and Karniadakis, J. Comput. Phys. 378 (2019), section 3.1"
PAPER = (
    "A relative L2 error of 6.7e-4, by a tanh network of 9 layers of 20 units with L-BFGS on 10,000 collocation points, "
    "without the stretched coordinate that is used here."
)

VISCOSITY, STRETCH = 0.01 / math.pi, 0.01
"""STRETCH: the d of x = d sinh(A s)."""
A = math.asinh(1 / STRETCH)
POINTS, SIZES = 2000, [2, 20, 20, 20, 1]
KNOWN, RATES = worked.KNOWN, worked.RATES
DEFAULTS = {**worked.DEFAULTS, "seconds": 60.0}
QUICK = {"seconds": 4.0, "seeds": 1}


class Correction(torch.nn.Module):
    """v(s, t) = 4 t s (1 - s) net(2 s - 1, 2 t - 1), so that u = -sin(pi x) + v is right at t = 0 and at both ends."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, points):
        """Return v at points (N, 2) of columns s and t, (N, 1)."""
        s, t = points[:, :1], points[:, 1:]
        return 4 * t * s * (1 - s) * self.net(2 * points - 1)


def make(seed, variant="", dtype=torch.float64, count=POINTS):
    """Return the seed's trial."""
    model = Correction(mlp(SIZES, seed, dtype=dtype))
    points = sobol(count, seed, dtype)
    s = points[:, :1]
    x = STRETCH * torch.sinh(A * s)
    slope = 1 / (STRETCH * A * torch.cosh(A * s))                      # ds/dx
    curve = -(STRETCH * A**2 * torch.sinh(A * s)) * slope**3           # d2s/dx2
    start, start_x, start_xx = -torch.sin(math.pi * x), -math.pi * torch.cos(math.pi * x), math.pi**2 * torch.sin(math.pi * x)

    def residuals():
        v, (v_s, v_t), (v_ss,) = pgdfast.pde.jet(model, points, [0, 1], order=[2, 1])
        u, u_x = start + v, start_x + v_s * slope
        u_xx = start_xx + v_ss * slope**2 + v_s * curve
        # Divided by ds/dx, the local length: every part of the layer and of the rest counts alike.
        return ((v_t + u * u_x - VISCOSITY * u_xx) / slope / math.sqrt(count),)

    def solution(where):
        x, t = where[:, :1], where[:, 1:]
        s = torch.asinh(x.abs() / STRETCH) / A
        return -torch.sin(math.pi * x) + x.sign() * model(torch.cat([s, t], dim=1))

    grid = WORKED.grid.points(dtype)
    return worked.Trial(model, residuals, solution, worked.relative_l2(solution, grid, exact(grid)))


def exact(points):
    """Return u at points (N, 2) of columns x and t, (N, 1)."""
    return cole_hopf(points[:, :1], points[:, 1:], VISCOSITY)


WORKED = worked.Worked(
    NAME, "u_t + u u_x = (0.01/\u03c0) u_xx", make, Grid("x", "t", (-1, 0), (1, 1), exact, count=201),
    "relative L2 distance from the Cole-Hopf solution on a 201 x 201 grid", (worked.Goal(1e-5, 60.0),),
)
cases, summarize, judge, table, pictures = WORKED.cases, WORKED.summarize, WORKED.judge, WORKED.table, WORKED.pictures
add_options = WORKED.add_options


def describe(settings):
    """Return what the options leave fixed, for the record."""
    return WORKED.describe(
        settings, equation="u_t + u u_x = nu u_xx on [-1, 1] x [0, 1], u(x, 0) = -sin(pi x), u = 0 at x = -1 and 1",
        viscosity=VISCOSITY, network="odd in x; for x >= 0: -sin(pi x) + 4 t s (1 - s) net(2 s - 1, 2 t - 1), tanh",
        coordinate=f"x = {STRETCH:g} sinh(A s), A = asinh(1 / {STRETCH:g})", sizes=SIZES, points=f"{POINTS} in (s, t), Sobol",
        residuals=f"(u_t + u u_x - nu u_xx) (dx/ds) / sqrt({POINTS})",
    )


def problem(dtype, seed=0):
    """Return the problem that `pgdfast verify` compares the backends on."""
    trial = make(seed, dtype=dtype, count=64)
    return Problem(trial.model, trial.residuals, {"damping": 1e-2, "lr": 0.1}, ("dual", "cg"),
                   "2-20-20-20-1, 64 points, 921 parameters")
