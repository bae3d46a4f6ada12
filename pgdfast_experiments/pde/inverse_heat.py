"""`inverse-heat`: the diffusivity of a rod from noisy temperatures, learned beside the network.

u_t = D u_xx on [0, 1] x [0, 1], u = 0 at both ends, D and u(x, 0) unknown; u is known at random points, with 1 % noise.
"""

import math

import torch

import pgdfast
from pgdfast_experiments.pde import worked
from pgdfast_experiments.pde.networks import mlp, sobol
from pgdfast_experiments.pde.pictures import Grid
from pgdfast_experiments.pde.references import heat_modes
from pgdfast_experiments.verification import Problem

NAME = "inverse-heat"
SUMMARY = """\
Find D in u_t = D u_xx from u at 10,000 random points with 1 % noise; u = 0 at both ends, u(x, 0)
is not given. D is a parameter beside those of a tanh network, trained with them by Adam, L-BFGS and
LM in the same seconds. The data come from D = 0.1 and u(x, 0) = sin(pi x) + sin(3 pi x) / 2.

Writes inverse-heat.png, inverse-heat.csv and inverse-heat.json into the folder of --out,
over those of an earlier run."""
SOURCE = "a standard test of networks for inverse problems"
PAPER = "There is no published figure of this setting to compare with; the reference is the D that made the data."

DIFFUSIVITY, MODES, START = 0.1, ((1, 1.0), (3, 0.5)), 0.4
NOISE, DATA, POINTS, EQUATION_WEIGHT = 0.01, 10_000, 600, 1.0
"""NOISE: standard deviation, over the root mean square of u. EQUATION_WEIGHT: of u_t - D u_xx beside u - data."""
SIZES = [2, 16, 16, 1]
KNOWN, RATES = worked.KNOWN, worked.RATES
DEFAULTS = {**worked.DEFAULTS, "seconds": 15.0}
QUICK = {"seconds": 3.0, "seeds": 1}


class Rod(torch.nn.Module):
    """u(x, t) = 4 x (1 - x) net(x, t), with its diffusivity D. Input (N, 2), columns x and t."""

    def __init__(self, net, dtype):
        super().__init__()
        self.net = net
        self.diffusivity = torch.nn.Parameter(torch.tensor(START, dtype=dtype))

    def forward(self, points):
        """Return u, (N, 1)."""
        x = points[:, :1]
        return 4 * x * (1 - x) * self.net(points)


def exact(points):
    """Return u at points (N, 2), (N, 1)."""
    return heat_modes(points[:, :1], points[:, 1:], DIFFUSIVITY, MODES)


def data(seed, count=DATA, dtype=torch.float64):
    """Return points (count, 2), uniform, and noisy values there, (count, 1)."""
    generator = torch.Generator().manual_seed(2000 + seed)
    where = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    u = exact(where)
    noise = NOISE * u.square().mean().sqrt() * torch.randn(u.shape, generator=generator, dtype=torch.float64)
    return where.to(dtype), (u + noise).to(dtype)


def make(seed, variant="", dtype=torch.float64, count=POINTS, data_count=DATA):
    """Return the seed's trial."""
    model = Rod(mlp(SIZES, seed, dtype=dtype), dtype)
    points = sobol(count, seed, dtype)
    where, values = data(seed, data_count, dtype)

    def residuals():
        _, (_, u_t), (u_xx,) = pgdfast.pde.jet(model, points, [0, 1], order=[2, 1])
        equation = EQUATION_WEIGHT * (u_t - model.diffusivity * u_xx) / math.sqrt(count)
        return (model(where) - values) / math.sqrt(data_count), equation

    grid = WORKED.grid.points(dtype)
    error = worked.relative_l2(model, grid, exact(grid))
    return worked.Trial(model, residuals, model, error, lambda: float(model.diffusivity.detach()))


def least_error():
    """Return the standard error of D over D that the noise alone leaves to any unbiased estimate, were u(x, 0) known.

    The Cramer-Rao bound, sigma / (D sqrt(sum (du/dD)^2)), over the data points of seed 0.
    """
    where, _ = data(0)
    x, t = where[:, :1], where[:, 1:]
    slope = heat_modes(x, t, DIFFUSIVITY, [(k, -c * (k * math.pi) ** 2) for k, c in MODES]) * t
    sigma = NOISE * float(exact(where).square().mean().sqrt())
    return sigma / (DIFFUSIVITY * float(slope.norm()))


WORKED = worked.Worked(
    NAME, "u_t = D u_xx from noisy u: D beside the network", make, Grid("x", "t", (0, 0), (1, 1), exact),
    "relative L2 distance from the exact solution on a 121 x 121 grid",
    (worked.Goal(5e-4, 15.0, column="coefficient_error", label="relative error of the coefficient"),),
    truth=DIFFUSIVITY,
)
cases, summarize, judge, table, pictures = WORKED.cases, WORKED.summarize, WORKED.judge, WORKED.table, WORKED.pictures
add_options = WORKED.add_options


def describe(settings):
    """Return what the options leave fixed, for the record."""
    return WORKED.describe(
        settings, equation="u_t = D u_xx on [0, 1] x [0, 1], u = 0 at x = 0 and 1; D and u(x, 0) unknown",
        diffusivity={"of the data": DIFFUSIVITY, "at the start": START},
        data=f"u at {DATA} uniform random points, noise {NOISE:g} of its root mean square",
        least_relative_error_of_D_by_the_noise=least_error(),
        network="4 x (1 - x) net(x, t), tanh, Glorot normal", sizes=SIZES, points=f"{POINTS}, Sobol",
        residuals=f"(u - data) / sqrt({DATA}), {EQUATION_WEIGHT:g} (u_t - D u_xx) / sqrt({POINTS})",
    )


def problem(dtype, seed=0):
    """Return the problem that `pgdfast verify` compares the backends on."""
    trial = make(seed, dtype=dtype, count=40, data_count=60)
    return Problem(trial.model, trial.residuals, {"damping": 1e-2, "lr": 0.1}, ("dual", "cg"),
                   "2-16-16-1 and D, 40 points, 60 data, 338 parameters")
