"""`regression-1d`: how fast each Fourier mode of the error falls (arXiv 2601.03162, fig. 3).

Target u(x) = 1/3 sum_{k=1..3} k sin((2k+1) pi x - k) on [-1, 1), tanh network, full batch, float64.
What to expect stands in `spectral`.
"""

import torch

from pgdfast_experiments import spectral
from pgdfast_experiments.measures import FLOOR, fourier_amplitudes
from pgdfast_experiments.verification import Problem

NAME = "regression-1d"
SUMMARY = """\
Fit u(x) = 1/3 sum_{k=1..3} k sin((2k+1) pi x - k) at 100 points by a tanh network, full batch,
and follow the error in the Fourier modes 1 to 10. Gauss-Newton lets all modes fall alike,
gradient descent stalls on the high ones, Levenberg-Marquardt lies in between.

Writes regression-1d.png, regression-1d.csv and regression-1d.json into the folder of --out,
over those of an earlier run."""
SOURCE = "arXiv 2601.03162, figure 3"
PAPER = (
    "Gauss-Newton lowers the error of all Fourier modes at one rate; gradient descent hardly lowers the high ones "
    "(spectral bias); Levenberg-Marquardt lies in between, nearer to Gauss-Newton for smaller mu."
)

POINTS = 100
MODES = tuple(range(1, 11))
KNOWN, RATES, ENSEMBLES = spectral.KNOWN, spectral.RATES, True
DEFAULTS = {"optimizers": "sgd,lm-0.5,lm-0.1,gn", "steps": 800, "seeds": 5, "threads": 1}
QUICK = {"steps": 800, "seeds": 3}   # shorter runs end within the transients


def data(points=POINTS):
    """Return the points x and targets u(x), both (N, 1) float64.

    The grid is x_j = -1 + 2 j / N, without the right end point: u has period 2, so x = 1 would be
    x = -1 a second time. On this grid the three sines are exactly the modes 3, 5, 7 of the discrete
    Fourier transform, of amplitudes 1/3, 2/3, 1, and nothing leaks into the others.
    """
    x = -1 + 2 * torch.arange(points, dtype=torch.float64)[:, None] / points
    u = sum(k * torch.sin((2 * k + 1) * torch.pi * x - k) for k in (1, 2, 3)) / 3
    return x, u


SPECTRUM = spectral.Spectrum(NAME, data, lambda error: fourier_amplitudes(error, MODES), MODES, (3, 5, 7))
cases, summarize, judge = SPECTRUM.cases, SPECTRUM.summarize, SPECTRUM.judge
table, extra, add_options = SPECTRUM.table, SPECTRUM.extra, spectral.add_options


def pictures(runs, summary, settings):
    """Return the picture by file suffix, with its caption."""
    figure = SPECTRUM.picture(runs, summary, settings, spectral.title("Error by Fourier mode", settings, 1, POINTS))
    return {"": (figure, "Amplitude 2 |FFT| / N of the error in each Fourier mode, and the loss, against the step.")}


def describe(settings):
    """Return what the options leave fixed, for the record."""
    return {
        "target": "1/3 sum_{k=1..3} k sin((2k+1) pi x - k)", "points": POINTS, "modes": MODES, "dtype": "float64",
        "activation": "tanh", "init": "Kaiming uniform, bound sqrt(6 / fan_in); zero biases", "batch": "full",
        "loss": {"LM": "1/2 sum of squared residuals", "SGD, Adam": "1/2 mean of squared residuals"}, "floor": FLOOR,
        "columns": {
            "loss": f"1/2 sum of squared errors over the {POINTS} points",
            "mode_k": "2 |rfft(error)_k| / N: amplitude of Fourier mode k of the error",
            "seconds": "wall time spent in optimizer.step(closure) so far",
        },
    }


def problem(dtype, seed=0):
    """Return the problem that `pgdfast verify` compares the backends on."""
    x, u = (t.to(dtype) for t in data())
    model = spectral.tanh_mlp(1, 80, 2, 1, seed, dtype)
    return Problem(model, lambda: model(x) - u, {"damping": 0.1, "lr": 0.1}, ("dual", "cg", "eigh"),
                   "1-80-80-1, 100 residuals")
