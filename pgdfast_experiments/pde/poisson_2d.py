"""`poisson-2d`: Poisson's equation on the unit square, the networks and points of arXiv 2405.15603, section 5.

-Lap u = f on (0, 1)^2, u = 0 on the boundary, u = sin(pi x) sin(pi y); tanh 2-64-1 and 2-64-64-48-48-1.
"""

import dataclasses
import functools
import math

import torch

import pgdfast
from pgdfast_experiments import options, processes
from pgdfast_experiments.errors import UsageError
from pgdfast_experiments.pde import worked
from pgdfast_experiments.pde.networks import mlp
from pgdfast_experiments.pde.pictures import Grid
from pgdfast_experiments.pde.worked import Goal
from pgdfast_experiments.verification import Problem

NAME = "poisson-2d"
SUMMARY = """\
Solve -Lap u = f on the unit square, u = 0 on its boundary, u = sin(pi x) sin(pi y), by the tanh
networks 2-64-1 (small) and 2-64-64-48-48-1 (large) from 900 interior and 120 boundary points, by
Adam, L-BFGS and LM in the same seconds. Derivatives by pgdfast.pde, and by nested autograd.

Writes poisson-2d.png, poisson-2d.csv and poisson-2d.json into the folder of --out,
over those of an earlier run."""
SOURCE = "arXiv 2405.15603, Poisson equation in 2-D"
PAPER = (
    "On an RTX 6000 GPU, the best of about 100 tuned runs each. 2-64-1: error 1e-5 after 84 s (Hessian-free), 113 s (KFAC), "
    "87 s (KFAC*), 59 s and more (ENGD); Adam ends at 9.4e-5, L-BFGS at 1.6e-4. 2-64-64-48-48-1: 1e-5 after 261 s "
    "(Hessian-free), 567 s (KFAC), 101 s (KFAC*); Adam ends at 2.1e-4, L-BFGS at 3.4e-4."
)

SIZES = {"small": [2, 64, 1], "large": [2, 64, 64, 48, 48, 1]}
INTERIOR, BOUNDARY, TEST = 900, 120, 9000
KNOWN, RATES = worked.KNOWN, worked.RATES
DEFAULTS = {**worked.DEFAULTS, "seconds": {"small": 10.0, "large": 20.0}, "threads": 2, "net": "both", "derivatives": "both",
            "boundary_weight": 30.0}
QUICK = {"seconds": {"small": 1.0, "large": 2.0}, "seeds": 1, "derivatives": "pde"}
_NESTED = " nested"


def add_options(parser):
    """Add this task's options to `parser`."""
    worked.Worked.add_options(parser)
    parser.add_argument("--net", choices=("small", "large", "both"), help="2-64-1, 2-64-64-48-48-1 (default: both)")
    parser.add_argument("--derivatives", choices=("pde", "nested", "both"),
                        help="pgdfast.pde.laplacian, or nested torch.autograd.grad (LM alone where both run; default: both)")
    parser.add_argument("--boundary-weight", type=options.positive_number, metavar="W",
                        help="of u on the boundary beside Lap u + f inside (default: 30: f is up to 2 pi^2, and errors on the "
                             "boundary spread into the square)")
    parser.add_argument("--nproc", type=options.whole_number(1), default=1, metavar="N",
                        help="processes, each with every N-th point, that take LM's steps together; LM alone then (default: 1)")


def adjust(values):
    """Return the defaults and those of --quick; of several processes LM alone runs, and they share the cores."""
    count = values["nproc"]
    if count == 1:
        return DEFAULTS, QUICK
    other = [method.name for method in values["optimizers"] or () if method.kind != "lm"]
    if other:
        raise UsageError(f"--nproc {count} is for LM, got {other[0]!r}; needed: --optimizers lm")
    if values["backend"] == "reference":
        raise UsageError(f"--nproc {count} and --backend reference do not work together: the reference runs in one process")
    return {**DEFAULTS, "optimizers": "lm", "threads": max(1, options.cores() // count)}, QUICK


def variants(settings):
    """Return the networks and derivatives that the settings name."""
    nets = ("small", "large") if settings.net == "both" else (settings.net,)
    ways = {"pde": ("",), "nested": (_NESTED,), "both": ("", _NESTED)}[settings.derivatives]
    return tuple(net + way for net in nets for way in ways)


def exact(x):
    """Return u(x), (N, 1)."""
    return torch.sin(math.pi * x[:, :1]) * torch.sin(math.pi * x[:, 1:])


def points(seed, dtype=torch.float64):
    """Return random points: interior (900, 2), boundary (120, 2), 30 a side, and those of the error (9000, 2)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    interior = torch.rand(INTERIOR, 2, generator=generator, dtype=torch.float64)
    test = torch.rand(TEST, 2, generator=generator, dtype=torch.float64)
    side = torch.rand(BOUNDARY, generator=generator, dtype=torch.float64)
    fixed = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat(BOUNDARY // 2)
    first = torch.arange(BOUNDARY) % 4 < 2
    boundary = torch.stack([torch.where(first, fixed, side), torch.where(first, side, fixed)], dim=1)
    return interior.to(dtype), boundary.to(dtype), test.to(dtype)


def nested_laplacian(model, x):
    """Return the Laplacian of the model, (N, 1), by nested reverse-mode autograd."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        slope = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
        parts = [torch.autograd.grad(slope[:, d].sum(), x, create_graph=True)[0][:, d:d + 1] for d in range(2)]
    return sum(parts)


def make(seed, variant, dtype=torch.float64, boundary_weight=DEFAULTS["boundary_weight"]):
    """Return the seed's trial of a variant; its residuals are those of this process's points."""
    model = mlp(SIZES[variant.removesuffix(_NESTED)], seed, dtype=dtype)
    interior, boundary, test = points(seed, dtype)
    interior, boundary = interior[processes.share()], boundary[processes.share()]
    source, truth = 2 * math.pi**2 * exact(interior), exact(test)
    nested = variant.endswith(_NESTED)

    def residuals():
        laplacian = nested_laplacian(model, interior) if nested else pgdfast.pde.laplacian(model, interior).laplacian
        inside = (laplacian + source) / math.sqrt(INTERIOR)
        return inside, boundary_weight * model(boundary) / math.sqrt(BOUNDARY)

    def error():
        with torch.no_grad():
            return float((model(test) - truth).square().mean().sqrt())

    return worked.Trial(model, residuals, model, error)


WORKED = worked.Worked(
    NAME, "-\u0394u = f, u = sin(\u03c0x) sin(\u03c0y)", make, Grid("x", "y", (0, 0), (1, 1), exact),
    "root mean square of net - u at 9,000 random points",
    (Goal(1e-5, 0.6, "small"), Goal(1e-7, 6.0, "small"), Goal(1e-5, 6.0, "large"), Goal(1e-6, 15.0, "large"),
     Goal(1e-5, 1.2, "small" + _NESTED), Goal(1e-7, 12.0, "small" + _NESTED),
     Goal(1e-5, 12.0, "large" + _NESTED), Goal(1e-6, 30.0, "large" + _NESTED)),
    variants=variants, for_all=lambda variant, settings: settings.derivatives == "nested" or not variant.endswith(_NESTED),
    published=(
        ("small, Hessian-free", {1e-5: 84}, 3.2e-7), ("small, KFAC", {1e-5: 113}, 3.4e-7),
        ("small, KFAC*", {1e-5: 87}, 2.0e-7), ("small, ENGD", {1e-5: 59}, 6e-8),
        ("small, Adam", {}, 9.4e-5), ("small, L-BFGS", {}, 1.6e-4),
        ("large, Hessian-free", {1e-5: 261}, 1.3e-6),
        ("large, KFAC", {1e-5: 567}, 7.0e-6), ("large, KFAC*", {1e-5: 101}, 7.9e-7),
        ("large, Adam", {}, 2.1e-4), ("large, L-BFGS", {}, 3.4e-4),
    ),
    published_note="published: arXiv 2405.15603, one RTX 6000 GPU, the best of about 100 tuned runs (ENGD: of 59 to 851 s)",
)
summarize, judge, table, pictures = WORKED.summarize, WORKED.judge, WORKED.table, WORKED.pictures


def cases(settings):
    """Return every run to be made."""
    make_weighted = functools.partial(make, boundary_weight=settings.boundary_weight)
    return dataclasses.replace(WORKED, make=make_weighted).cases(settings)


def describe(settings):
    """Return what the options leave fixed, for the record."""
    return WORKED.describe(
        settings, equation="-Lap u = f on (0, 1)^2, u = 0 on the boundary; u = sin(pi x) sin(pi y)",
        processes=settings.nproc, network="tanh, Glorot normal weights, biases uniform as nn.Linear has them", sizes=SIZES,
        points={"interior": INTERIOR, "boundary": BOUNDARY, "error": TEST, "drawn": "uniform"},
        residuals=f"(Lap u + f) / sqrt({INTERIOR}), {settings.boundary_weight:g} u / sqrt({BOUNDARY})",
    )


def problem(dtype, seed=0):
    """Return the problem that `pgdfast verify` compares the backends on."""
    trial = make(seed, "small", dtype)
    interior, boundary, _ = points(seed, dtype)
    interior, boundary = interior[:80], boundary[:16]

    def residuals():
        laplacian = pgdfast.pde.laplacian(trial.model, interior).laplacian
        return laplacian + 2 * math.pi**2 * exact(interior), trial.model(boundary)

    return Problem(trial.model, residuals, {"damping": 0.1, "lr": 0.1}, ("dual", "primal", "cg"),
                   "2-64-1, 80 interior and 16 boundary points, 257 parameters")
