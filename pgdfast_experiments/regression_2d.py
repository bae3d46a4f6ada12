"""`regression-2d`: a discontinuous target in two dimensions, by Fourier mode (arXiv 2601.03162, appendix, fig. 9).

The paper gives the size (batch 400) but not the formula; here the target is sign(sin(2 pi x) sin(2 pi y)) on
[-1, 1]^2, sampled on 20 x 20 cell centres. What to expect stands in `spectral`.
"""

import numpy as np
import torch

from pgdfast_experiments import spectral
from pgdfast_experiments.measures import FLOOR
from pgdfast_experiments.verification import Problem

NAME = "regression-2d"
SUMMARY = """\
Fit the checkerboard sign(sin(2 pi x) sin(2 pi y)) on a 20 x 20 grid by a tanh network, full batch,
and follow the error in modes of the 2-D Fourier transform. Gauss-Newton lets all modes fall alike,
gradient descent stalls, Levenberg-Marquardt lies in between.

Writes regression-2d.png, regression-2d.csv and regression-2d.json into the folder of --out,
over those of an earlier run."""
SOURCE = "arXiv 2601.03162, appendix, figure 9 (the target's formula is ours)"
PAPER = (
    "On a discontinuous target in two dimensions the order of figure 3 holds: Gauss-Newton lowers all Fourier modes "
    "alike, gradient descent hardly lowers the high ones, Levenberg-Marquardt lies in between."
)

SIDE = 20
MODES = tuple((k, m) for k in (1, 2, 3, 6) for m in (1, 2, 3, 6) if k <= m)
KNOWN, RATES, ENSEMBLES = spectral.KNOWN, spectral.RATES, True
DEFAULTS = {"optimizers": "sgd,lm-0.5,lm-0.1,gn", "steps": 800, "seeds": 5, "threads": 1}
QUICK = {"steps": 300, "seeds": 1}


def data():
    """Return the points (400, 2) and targets (400, 1), float64.

    Cell centres -1 + (2 j + 1) / 20 in both directions: none lies on a jump. On them the target's
    modes are (2, 2), (2, 6), (6, 2), (6, 6) and their odd multiples.
    """
    line = -1 + (2 * torch.arange(SIDE, dtype=torch.float64) + 1) / SIDE
    x = torch.cartesian_prod(line, line)
    return x, torch.sign(torch.sin(2 * torch.pi * x[:, :1]) * torch.sin(2 * torch.pi * x[:, 1:]))


def amplitudes(error):
    """Return the amplitude of the error in each of `MODES`.

    For the mode (k, m): the root of the summed squares of 2 |FFT| / N over (+-k, +-m) and (+-m, +-k), so that sign
    and direction do not matter. Shape of `error`: (400,).
    """
    spectrum = 2 / error.size * np.abs(np.fft.fft2(error.reshape(SIDE, SIDE)))
    waves = {(k, m): {(a * k, b * m) for a in (1, -1) for b in (1, -1)} | {(b * m, a * k) for a in (1, -1) for b in (1, -1)}
             for k, m in MODES}
    return [float(np.sqrt(sum(spectrum[wave] ** 2 for wave in waves[mode]) / 2)) for mode in MODES]


_NAMES = tuple(f"{k},{m}" for k, m in MODES)
SPECTRUM = spectral.Spectrum(NAME, data, amplitudes, _NAMES, ("2,2", "2,6", "6,6"))
cases, summarize, judge = SPECTRUM.cases, SPECTRUM.summarize, SPECTRUM.judge
table, extra, add_options = SPECTRUM.table, SPECTRUM.extra, spectral.add_options


def pictures(runs, summary, settings):
    """Return the picture by file suffix, with its caption."""
    figure = SPECTRUM.picture(
        runs, summary, settings, spectral.title("Error by 2-D Fourier mode", settings, 2, SIDE**2))
    return {"": (figure, "Amplitude of the error in modes of the 2-D Fourier transform, and the loss, against the step.")}


def describe(settings):
    """Return what the options leave fixed, for the record."""
    return {
        "target": "sign(sin(2 pi x) sin(2 pi y)) at 20 x 20 cell centres of [-1, 1]^2", "points": SIDE**2,
        "modes": _NAMES, "dtype": "float64", "activation": "tanh",
        "init": "Kaiming uniform, bound sqrt(6 / fan_in); zero biases", "batch": "full",
        "loss": {"LM": "1/2 sum of squared residuals", "SGD, Adam": "1/2 mean of squared residuals"}, "floor": FLOOR,
        "columns": {
            "loss": "1/2 sum of squared errors over the 400 points",
            "mode_k,m": "amplitude of the error over the waves (+-k, +-m) and (+-m, +-k)",
            "seconds": "wall time spent in optimizer.step(closure) so far",
        },
    }


def problem(dtype, seed=0):
    """Return the problem that `pgdfast verify` compares the backends on."""
    x, u = (t.to(dtype) for t in data())
    model = spectral.tanh_mlp(2, 80, 2, 1, seed, dtype)
    return Problem(model, lambda: model(x) - u, {"damping": 0.1, "lr": 0.1}, ("dual", "cg", "eigh"),
                   "2-80-80-1, 400 residuals")
