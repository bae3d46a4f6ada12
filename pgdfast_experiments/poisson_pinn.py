"""`poisson-pinn`: a physics-informed network on three Poisson problems of growing frequency (arXiv 2601.03162, fig. 4).

-Lap u = f on [0, 1]^2, u = 0 on the boundary, with u = sin(pi n x) sin(pi n y) for n = 1, 2, 3; tanh 2-256-1.
LM's loss falls at one rate for all three; a first-order method slows down as the frequency grows.
"""

import math

import numpy as np
import torch

from pgdfast_experiments import options, plotting
from pgdfast_experiments.experiment import Table, check
from pgdfast_experiments.models import tanh_mlp
from pgdfast_experiments.training import Batches, Case, Session, backward_closure, every
from pgdfast_experiments.verification import Problem

NAME = "poisson-pinn"
SUMMARY = """\
Solve -Lap u = f on the unit square with u = 0 on its boundary by a tanh 2-256-1 network, for
u = sin(pi n x) sin(pi n y) with n = 1, 2, 3. Residuals by nested autograd: 640 interior and
40 boundary points. LM's loss falls alike for the three frequencies; Adam's and SGD's do not.

Writes poisson-pinn.png, poisson-pinn.csv and poisson-pinn.json into the folder of --out,
over those of an earlier run."""
SOURCE = "arXiv 2601.03162, figure 4"
PAPER = (
    "Levenberg-Marquardt's loss falls at the same rate for the three frequencies, while Adam and SGD slow down as the "
    "frequency grows. The paper shows the loss by iteration; the error against the exact solution is added here."
)

INTERIOR, BOUNDARY, WIDTH = 640, 40, 256
BATCH = (188, 12)
"""Interior and boundary points of a minibatch of the paper's size, 200."""
KNOWN = ("sgd", "adam", "gn", "lm-MU")
RATES = {"sgd": 1e-3, "adam": 1e-2, "lm": 1e-1}
DEFAULTS = {"optimizers": "sgd,adam,lm-0.1", "steps": {"sgd": 1000, "adam": 1000, "lm": 200}, "seeds": 5, "threads": 1,
            "frequencies": (1.0, 2.0, 3.0)}
QUICK = {"steps": {"sgd": 300, "adam": 300, "lm": 120}, "seeds": 1}
COLUMNS = ("loss", "relative_l2")
_SLOPE_STEPS = 100


def add_options(parser):
    """Add this task's options to `parser`."""
    parser.add_argument("--frequencies", type=options.numbers, metavar="LIST",
                        help="values of n in u = sin(pi n x) sin(pi n y) (default: 1,2,3)")
    parser.add_argument("--batch", choices=("full", "200"), default="full",
                        help="all 680 points at every step, or the paper's 200 (default: %(default)s)")


def points(seed, dtype=torch.float64):
    """Return interior points (640, 2), uniform in the square, and boundary points (40, 2), 10 a side."""
    generator = torch.Generator().manual_seed(1000 + seed)
    interior = torch.rand(INTERIOR, 2, generator=generator, dtype=torch.float64)
    side = torch.rand(BOUNDARY, generator=generator, dtype=torch.float64)
    fixed = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat(BOUNDARY // 2)
    first = torch.arange(BOUNDARY) % 4 < 2
    boundary = torch.stack([torch.where(first, fixed, side), torch.where(first, side, fixed)], dim=1)
    return interior.to(dtype), boundary.to(dtype)


def exact(x, n):
    """Return u(x), (N, 1)."""
    return torch.sin(math.pi * n * x[:, :1]) * torch.sin(math.pi * n * x[:, 1:])


def residuals(model, interior, boundary, n):
    """Return Lap u + f at the interior points and u at the boundary points, (N, 1) each."""
    x = interior.detach().requires_grad_()
    u = model(x)
    slope = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
    laplacian = sum(
        torch.autograd.grad(slope[:, d].sum(), x, create_graph=True)[0][:, d:d + 1] for d in range(2))
    return laplacian + 2 * (math.pi * n) ** 2 * exact(interior, n), model(boundary)


def cases(settings):
    """Return every run to be made."""
    return [
        Case(method.name, f"n={n:g}", seed, settings.steps_of(method),
             lambda method=method, seed=seed, n=n: _start(method, seed, n, settings))
        for seed in range(settings.seeds) for n in settings.frequencies for method in settings.optimizers
    ]


def _start(method, seed, n, settings):
    model = tanh_mlp(2, WIDTH, 1, 1, seed)
    interior, boundary = points(seed)
    grid = torch.linspace(0, 1, 41, dtype=torch.float64)
    grid = torch.cartesian_prod(grid, grid)
    truth = exact(grid, n)
    inner, outer = Batches(INTERIOR, BATCH[0], seed), Batches(BOUNDARY, BATCH[1], seed)

    def at(step):
        if settings.batch == "full":
            return residuals(model, interior, boundary, n)
        return residuals(model, interior[inner(step)], boundary[outer(step)], n)

    def measure():
        loss = sum(0.5 * float(r.detach().square().sum()) for r in residuals(model, interior, boundary, n))
        with torch.no_grad():
            return loss, float((model(grid) - truth).norm() / truth.norm())

    optimizer = method.build(model.parameters(), settings.rate(method), settings.backend)
    if method.second_order:
        def closure(step):
            return lambda: at(step)
    else:
        def closure(step):
            return backward_closure(optimizer, lambda: torch.cat(at(step)).square().mean() / 2)
    return Session(model, optimizer, closure, measure, COLUMNS, every(settings.steps_of(method), 5))


def _slope(run):
    """Return the fall of ln(loss) per step, over the first 100 steps (NaN for a shorter run)."""
    if run.last < _SLOPE_STEPS:
        return float("nan")
    start, end = run.columns["loss"][[0, int(np.flatnonzero(run.at == _SLOPE_STEPS)[0])]]
    return float(np.log(start / end)) / _SLOPE_STEPS


def summarize(runs, settings):
    """Return, by optimizer and frequency: the fall of ln(loss) per step, errors, seconds."""
    summary = {}
    for method in settings.optimizers:
        lm = [run for run in runs if run.optimizer.startswith(("lm", "gn"))]
        until = lm[0].at[-1] if lm else runs[0].at[-1]
        for n in settings.frequencies:
            mine = [run for run in runs if run.optimizer == method.name and run.variant == f"n={n:g}"]
            row = int(np.flatnonzero(mine[0].at <= until)[-1])
            finals = [float(run.columns["relative_l2"][-1]) for run in mine]
            summary[f"{method.name} n={n:g}"] = {
                "fall_of_ln_loss": float(np.median([_slope(run) for run in mine])),
                "relative_l2_at_lm_steps": float(np.median([run.columns["relative_l2"][row] for run in mine])),
                "steps": int(mine[0].at[-1]),
                "relative_l2": float(np.median(finals)), "relative_l2_by_seed": finals,
                "loss": float(np.median([run.columns["loss"][-1] for run in mine])),
                "loss_at_lm_steps": float(np.median([run.columns["loss"][row] for run in mine])),
                "seconds": float(np.median([run.seconds[-1] for run in mine])),
                "step_ms": float(np.median([run.step_ms for run in mine])),
                "stopped_at": {run.seed: run.stopped_at for run in mine if run.stopped_at is not None},
            }
    return summary


def judge(summary, settings):
    """Return the checks, from the numbers in `summary` alone."""
    names = [f"n={n:g}" for n in settings.frequencies]
    lms = [method.name for method in settings.optimizers if method.name.startswith("lm")]
    lm = [f"{lms[0]} {name}" for name in names] if lms else [None]
    adam = [f"adam {name}" for name in names]

    def slopes():
        falls = [summary[name]["fall_of_ln_loss"] for name in lm]
        if np.isnan(falls).any():
            return None, f"needs {_SLOPE_STEPS} steps or more"
        text = ", ".join(f"{fall:.4f} at {name}" for fall, name in zip(falls, names, strict=True))
        return bool(max(falls) <= 1.15 * min(falls)) and min(falls) > 0, text

    def errors():
        values = [summary[name]["relative_l2"] for name in lm]
        steps = summary[lm[0]]["steps"]
        text = ", ".join(f"{value:.2e} at {name}" for value, name in zip(values, names, strict=True))
        return (None if steps < 200 else max(values) < 4e-2), f"after {steps} steps {text}"

    def margin():
        ratios = [summary[a]["loss_at_lm_steps"] / summary[b]["loss_at_lm_steps"] for a, b in zip(adam, lm, strict=True)]
        text = ", ".join(f"{ratio:.3g} at {name}" for ratio, name in zip(ratios, names, strict=True))
        return bool(np.all(np.diff(ratios) > 0)), f"Adam's loss over LM's after as many steps: {text}"

    def faster():
        pairs = [(summary[a]["fall_of_ln_loss"], summary[b]["fall_of_ln_loss"]) for a, b in zip(adam, lm, strict=True)]
        text = "; ".join(f"{name}: Adam {a:.4f}, LM {b:.4f}" for name, (a, b) in zip(names, pairs, strict=True))
        return all(b > a for a, b in pairs), text

    return [
        check("under LM ln(loss) falls per step alike for all frequencies over 100 steps (within 15 %)", summary, lm, slopes),
        check("LM's relative L2 error is below 4e-2 at every frequency after 200 steps", summary, lm, errors),
        check("LM's loss falls faster than Adam's over the first 100 steps at every frequency", summary, [*lm, *adam], faster),
        check("LM's margin over Adam grows with the frequency", summary, [*lm, *adam], margin),
    ]


def table(summary, settings):
    """Return the table: rates, errors and times by frequency."""
    rows = []
    for n in settings.frequencies:
        for method in settings.optimizers:
            row = summary[f"{method.name} n={n:g}"]
            rows.append([f"n = {n:g}, {method.label}", f"{row['fall_of_ln_loss']:.4f}",
                         f"{row['relative_l2_at_lm_steps']:.2e}", str(row["steps"]), f"{row['relative_l2']:.2e}",
                         f"{row['step_ms']:.2f}", f"{row['seconds']:.1f}"])
    return Table(
        f"{NAME}: median of {plotting.seeds(settings.seeds)}, batch {settings.batch}",
        ["run", "fall of ln(loss) a step", "error at LM's last step", "steps", "error at the end", "ms/step", "seconds"],
        rows, ["error: relative L2 distance from the exact solution on a 41 x 41 grid"],
    )


def pictures(runs, summary, settings):
    """Return the picture by file suffix, with its caption."""
    count = len(settings.frequencies)
    figure, axes, _ = plotting.panels(
        f"Poisson by a tanh 2-{WIDTH}-1 network, u = sin(\u03c0nx) sin(\u03c0ny), "
        f"{plotting.of_seeds(settings.seeds)}", 2 * count, columns=count, legend_rows=1)
    handles = []
    lms = [settings.steps_of(m) for m in settings.optimizers if m.second_order]
    for index, n in enumerate(settings.frequencies):
        upper, lower = axes[index], axes[count + index]
        handles = []
        for color, method in zip(plotting.SEQUENCE, settings.optimizers, strict=False):
            at, loss = plotting.of(runs, "loss", method.name, f"n={n:g}")
            handles.append(plotting.band(upper, at, loss, color, plotting.math(method.label)))
            mine = [run for run in runs if run.optimizer == method.name and run.variant == f"n={n:g}"]
            seconds = np.median([run.seconds for run in mine], axis=0)
            plotting.band(lower, seconds, np.stack([run.columns["relative_l2"] for run in mine]), color)
        plotting.name_panel(upper, f"n = {n:g}")
        upper.set_xlim(0, 2 * max(lms) if lms else None)
        upper.set_xlabel("step", fontsize=9)
        lower.set_xlim(left=1e-2)
        plotting.log_axis(lower, "x")
        lower.set_xlabel("seconds in steps", fontsize=9)
    axes[0].set_ylabel("1/2 sum of squared residuals", fontsize=9)
    axes[count].set_ylabel("relative L2 error", fontsize=9)
    plotting.share_log_range(axes[:count], highest=1e8)
    plotting.share_log_range(axes[count:])
    plotting.legend(figure, None, handles, rows_below=1)
    return {"": (figure, "Above: the loss over all 680 points by step. Below: the relative L2 error by wall-clock time.")}


def describe(settings):
    """Return what the options leave fixed, for the record."""
    return {
        "equation": "-Lap u = f on [0, 1]^2, u = 0 on the boundary; u = sin(pi n x) sin(pi n y)",
        "network": f"tanh 2-{WIDTH}-1, Kaiming uniform, zero biases", "dtype": "float64",
        "points": {"interior": INTERIOR, "boundary": BOUNDARY}, "batch": settings.batch,
        "loss": {"LM": "1/2 sum of squared residuals", "SGD, Adam": "1/2 mean of squared residuals"},
        "columns": {"loss": "1/2 sum of squared residuals over all points",
                    "relative_l2": "||net - u|| / ||u|| on a 41 x 41 grid",
                    "seconds": "wall time spent in optimizer.step(closure) so far"},
    }


def problem(dtype, seed=0):
    """Return the problem that `pgdfast verify` compares the backends on."""
    model = tanh_mlp(2, WIDTH, 1, 1, seed, dtype)
    interior, boundary = points(seed, dtype)
    interior, boundary = interior[:200], boundary[:20]
    return Problem(model, lambda: residuals(model, interior, boundary, 2), {"damping": 0.1, "lr": 0.1},
                   ("dual", "primal", "cg"), f"2-{WIDTH}-1, n = 2, 200 interior and 20 boundary points, 1,025 parameters")
