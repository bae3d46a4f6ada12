"""`polynomial`: a quadratic target by a nearly linear network, from rich to lazy (arXiv 2601.03162, fig. 6).

f(x) = (alpha/N) sum_i phi(w_i . x) with phi(h) = h + (eps/2) h^2 learns y = (beta . x)^2 / 2 from 550 points; alpha
sets how lazy training is (Kumar et al. 2024, sec. 5). Gradient descent generalizes later the larger alpha is, LM does not.
Also followed: the error along the segments {c x, 0 <= c <= 1} for a training point x and for x = (1, ..., 1).
"""

from functools import partial

import numpy as np
import torch

from pgdfast_experiments import grokking, options, plotting
from pgdfast_experiments.experiment import Table, check
from pgdfast_experiments.training import Case, Member, Session, backward_closure, every, geometric
from pgdfast_experiments.verification import Problem

NAME = "polynomial"
SUMMARY = """\
Learn y = (beta . x)^2 / 2 in 100 dimensions from 550 points by f = (alpha/500) sum_i phi(w_i . x),
phi(h) = h + (eps/2) h^2, for alpha from 1/32 to 32. Gradient descent's delay from training to test
loss grows with alpha, Levenberg-Marquardt's does not (550 residuals, 50,000 parameters).

Writes polynomial.png, polynomial-segments.png, polynomial.csv and polynomial.json into the folder of
--out, over those of an earlier run."""
SOURCE = "arXiv 2601.03162, figure 6"
PAPER = (
    "With SGD the test loss falls later than the training loss, more so for larger alpha, and the error along the segment "
    "to (1, ..., 1), away from the data, converges late; with Levenberg-Marquardt the delay does not grow with alpha and "
    "both segments converge together."
)

DIMENSIONS, UNITS, TRAIN, TEST, SAMPLES = 100, 500, 550, 1000, 64
TRAIN_LEVEL, TEST_LEVEL = 0.05, 0.20
"""Shares of the initial training and test loss that count as learnt."""
KNOWN, ENSEMBLES = ("sgd", "adam", "lm-MU", "gn"), True
RATES = {"sgd": 1.0, "adam": 1e-2, "lm": 0.1}
"""For SGD times N / alpha^2, as in Kumar et al. (2024)."""
DEFAULTS = {"optimizers": "sgd,lm-1e-5", "steps": {"sgd": 8000, "adam": 8000, "lm": 80}, "seeds": 2, "threads": 1,
            "alphas": tuple(2.0**k for k in range(-5, 6))}
QUICK = {"steps": {"sgd": 1000, "adam": 1000, "lm": 40}, "seeds": 1, "alphas": (0.25, 1.0, 4.0)}
SEGMENTS = ("train", "ones")
COLUMNS = ("train_loss", "test_loss", "largest_train", "largest_ones", "highest_train", "highest_ones")


def add_options(parser):
    """Add this task's options to `parser`."""
    parser.add_argument("--alphas", type=options.numbers, metavar="LIST",
                        help="scales of the output (default: the powers of 2 from 1/32 to 32)")
    parser.add_argument("--eps", type=options.positive_number, default=0.25, metavar="EPS",
                        help="coefficient of the quadratic part of phi (default: %(default)s)")
    parser.add_argument("--frequency", choices=("largest", "highest"), default="largest",
                        help="which frequency along the segments is drawn: of the largest amplitude in the target, or the "
                             "highest (default: %(default)s)")


class PolynomialNetwork(torch.nn.Module):
    """f(x) = (alpha/N) sum_i phi(w_i . x), phi(h) = h + (eps/2) h^2, w (N, D) from N(0, I), readouts fixed at 1."""

    def __init__(self, alpha, eps, seed, dtype, dimensions=DIMENSIONS, units=UNITS):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(units, dimensions, generator=generator, dtype=torch.float64).to(dtype))
        # A buffer, so that networks of one ensemble can have different ones.
        self.register_buffer("alpha", torch.tensor(alpha, dtype=dtype), persistent=False)
        self.eps = eps

    def forward(self, x):
        """(N, D) -> (N,)."""
        h = torch.nn.functional.linear(x, self.weight)
        return self.alpha * (h + (self.eps / 2) * h.square()).mean(dim=1)


def data(seed, dtype=torch.float64, dimensions=DIMENSIONS, train=TRAIN, test=TEST):
    """Return inputs (n, D) and targets (n,) to train and to test on, and the target function."""
    generator = torch.Generator().manual_seed(9000 + seed)
    beta = torch.randn(dimensions, generator=generator, dtype=torch.float64).to(dtype)
    x = (torch.randn(train + test, dimensions, generator=generator, dtype=torch.float64) / dimensions**0.5).to(dtype)

    def target(x):
        return (x @ beta).square() / 2

    return (x[:train], target(x[:train])), (x[train:], target(x[train:])), target


def cases(settings):
    """Return every run to be made."""
    return [
        Case(method.name, f"alpha={alpha:g}", seed, settings.steps_of(method),
             lambda method=method, seed=seed, alpha=alpha: _start(method, seed, alpha, settings),
             together=method.together)
        for seed in range(settings.seeds) for alpha in settings.alphas for method in settings.optimizers
    ]


def _start(method, seed, alpha, settings):
    dtype = torch.float64 if method.second_order else torch.float32
    model = PolynomialNetwork(alpha, settings.eps, seed, dtype)
    (x, y), (x_test, y_test), target = data(seed, dtype)
    c = torch.linspace(0, 1, SAMPLES, dtype=dtype)[:, None]
    lines = torch.cat([c * x[:1], c * torch.ones(1, DIMENSIONS, dtype=dtype)])
    truth = target(lines).reshape(2, SAMPLES)
    # The largest of the target's amplitudes, its mean apart.
    largest = [1 + int(np.argmax(np.abs(np.fft.rfft(row))[1:])) for row in truth.numpy()]

    def measure():
        with torch.no_grad():
            losses = [float((model(a) - b).square().mean()) for a, b in ((x, y), (x_test, y_test))]
            error = (model(lines).reshape(2, SAMPLES) - truth).numpy()
        spectrum = 2 / SAMPLES * np.abs(np.fft.rfft(error))
        return *losses, *(float(spectrum[k, largest[k]]) for k in range(2)), *(float(spectrum[k, -1]) for k in range(2))

    rate = settings.rate(method)
    member = None
    if method.second_order:
        build = partial(method.build, lr=rate, backend=settings.backend)
        member = Member(lambda network, x, y: network(x) - y, lambda step: (x, y), build)
        optimizer, closure = member.alone(model)
    else:
        rate = rate * UNITS / alpha**2 if method.kind == "sgd" else rate
        optimizer = method.build(model.parameters(), rate)
        backward = backward_closure(optimizer, lambda: (model(x) - y).square().mean())
        def closure(step):
            return backward
    steps = settings.steps_of(method)
    rows = every(steps, 1) if method.second_order else geometric(steps)
    return Session(model, optimizer, closure, measure, COLUMNS, rows, member=member)


def _relative(run, column):
    return run.columns[column] / run.columns[column][0]


def _step_below(run, column, level):
    hits = np.flatnonzero(_relative(run, column) <= level)
    return float(run.at[hits[0]]) if hits.size else float("nan")


def summarize(runs, settings):
    """Return, by optimizer and alpha: steps until losses and segment errors have fallen to their levels."""
    summary = {}
    for (optimizer, variant), mine in grokking.by_group(runs).items():
        train = [_step_below(run, "train_loss", TRAIN_LEVEL) for run in mine]
        test = [_step_below(run, "test_loss", TEST_LEVEL) for run in mine]
        segment = {kind: grokking.median([_step_below(run, f"{settings.frequency}_{kind}", TEST_LEVEL) for run in mine])
                   for kind in SEGMENTS}
        summary[f"{optimizer} {variant}"] = {
            "steps_to_train": grokking.median(train), "steps_to_test": grokking.median(test),
            "steps_to_train_by_seed": train, "steps_to_test_by_seed": test,
            "delay": grokking.median([b / a for a, b in zip(train, test, strict=True)]),
            "segment_train": segment["train"], "segment_ones": segment["ones"],
            "train_loss_end": float(np.median([_relative(run, "train_loss")[-1] for run in mine])),
            "test_loss_end": float(np.median([_relative(run, "test_loss")[-1] for run in mine])),
            "test_loss_least": float(np.median([np.nanmin(_relative(run, "test_loss")) for run in mine])),
            "step_ms": float(np.median([run.step_ms for run in mine])),
            "stopped_at": {run.seed: run.stopped_at for run in mine if run.stopped_at is not None},
        }
    return summary


def judge(summary, settings):
    """Return the checks, from the numbers in `summary` alone."""
    lms = [method.name for method in settings.optimizers if method.second_order]
    middle = [alpha for alpha in sorted(settings.alphas) if 0.25 <= alpha <= 4]

    def named(optimizer, alphas):
        return [f"{optimizer} alpha={alpha:g}" for alpha in alphas]

    lm = named(lms[0], middle) if lms else [None]
    sgd = named("sgd", middle)

    def delays(names):
        return [summary[name]["delay"] for name in names], ", ".join(
            f"{grokking.shown(summary[n]['steps_to_train'])}/{grokking.shown(summary[n]['steps_to_test'])} at alpha "
            f"{alpha:g}" for n, alpha in zip(names, middle, strict=True))

    def lm_steady():
        values, text = delays(lm)
        factor = grokking.spread(values)
        return (False if np.isnan(factor) else factor < 2), f"factor {grokking.shown(factor, '.2f')}; steps {text}"

    def sgd_grows():
        values, text = delays(sgd)
        reached = [name for name in sgd if not np.isnan(summary[name]["steps_to_train"])]
        known = [np.inf if np.isnan(summary[name]["delay"]) else summary[name]["delay"] for name in reached]
        if len(known) < 2:
            return None, f"too few alpha fit the training points within the steps: {text}"
        return known[-1] > known[0] and np.isfinite(known[0]), f"steps {text}"

    def segments(names, held):
        pairs = [(summary[n]["segment_train"], summary[n]["segment_ones"]) for n in names]
        text = ", ".join(f"{grokking.shown(a)}/{grokking.shown(b)} at alpha {alpha:g}"
                         for (a, b), alpha in zip(pairs, middle, strict=True))
        # Where not even the training segment has converged within the steps there is nothing to compare.
        later = [np.inf if np.isnan(b) else b / a for a, b in pairs if not np.isnan(a)]
        return (held(later) if len(later) > 1 else None), f"steps to {TEST_LEVEL:.0%}, train/ones: {text}"

    enough, why = len(middle) > 1, "needs several values of alpha from 1/4 to 4"
    return [
        check("LM's train-to-test delay varies by less than a factor 2 over alpha in 1/4 .. 4 "
              "(steps to 20 % of the test loss over steps to 5 % of the training loss)", summary, lm, lm_steady, enough, why),
        check("SGD's delay is longer at the largest alpha whose training points it fits than at the smallest", summary, sgd,
              sgd_grows, enough, why),
        check("under SGD the (1, ..., 1) segment converges later than the training one", summary, sgd,
              lambda: segments(sgd, lambda later: min(later) > 1.2), enough, why),
        check("under LM both segments converge together (within a factor 2)", summary, lm,
              lambda: segments(lm, lambda later: max(later) < 2 and min(later) > 0.5), enough, why),
    ]


def table(summary, settings):
    """Return the table: steps by optimizer and alpha."""
    rows = []
    for method in settings.optimizers:
        for alpha in settings.alphas:
            row = summary[f"{method.name} alpha={alpha:g}"]
            rows.append([f"{method.label}, alpha {alpha:g}", grokking.shown(row["steps_to_train"]),
                         grokking.shown(row["steps_to_test"]), f"{row['test_loss_least']:.1%}",
                         f"{grokking.shown(row['segment_train'])} / {grokking.shown(row['segment_ones'])}",
                         f"{row['step_ms']:.2f}"])
    return Table(f"{NAME}: steps until the loss has fallen (median of {plotting.seeds(settings.seeds)}, eps {settings.eps:g})",
                 ["run", "train to 5 %", "test to 20 %", "least test loss", "segments train / ones", "ms/step"], rows,
                 ["a dash: not reached within the steps of most seeds"])


def _groups(settings, method):
    colors = grokking.shades(len(settings.alphas))
    return [(method.name, f"alpha={alpha:g}", color, f"\u03b1 = {alpha:g}")
            for alpha, color in zip(settings.alphas, colors, strict=True)]


def _grid(settings, runs, title, columns, names):
    figure, axes, _ = plotting.panels(title, 2 * len(settings.optimizers), columns=2, width=5.2)
    for row, method in enumerate(settings.optimizers):
        for panel, column, name in zip(axes[2 * row:2 * row + 2], columns, names, strict=True):
            handles = grokking.draw(panel, runs, column, _groups(settings, method))
            plotting.name_panel(panel, f"{plotting.math(method.label)}: {name}")
            panel.set_xlabel("step", fontsize=9)
            panel.set_xlim(1, settings.steps_of(method))
            plotting.log_axis(panel, "x")
    for column in range(2):
        plotting.share_log_range(axes[column::2], lowest=1e-10)
    plotting.legend(figure, None, handles, rows_below=2)
    return figure, axes


def pictures(runs, summary, settings):
    """Return the pictures by file suffix, with their captions."""
    what = f"y = (\u03b2\u00b7x)\u00b2/2, eps {settings.eps:g}, {plotting.of_seeds(settings.seeds)}"
    losses, axes = _grid(settings, runs, what, ("train_loss", "test_loss"), ("train", "test"))
    for panel in axes:
        panel.set_ylabel("mean squared error", fontsize=9)
    lines, axes = _grid(settings, runs, f"Error along segments: {what}",
                        (f"{settings.frequency}_train", f"{settings.frequency}_ones"),
                        ("0 to a training point", "0 to (1, ..., 1)"))
    for panel in axes:
        panel.set_ylabel("error amplitude", fontsize=9)
    return {
        "": (losses, "Training and test loss against the step, one curve per alpha."),
        "-segments": (lines, f"The error's Fourier amplitude at the target's {settings.frequency} frequency along "
                             "{c x, 0 <= c <= 1}, for x a training point and for x = (1, ..., 1)."),
    }


def describe(settings):
    """Return what the options leave fixed, for the record."""
    return {
        "problem": "y = (beta . x)^2 / 2, x ~ N(0, I/100), beta ~ N(0, I), 550 training and 1,000 test points",
        "network": "(alpha/500) sum_i phi(w_i . x), phi(h) = h + (eps/2) h^2, w ~ N(0, I), readouts 1",
        "dtype": {"LM": "float64", "SGD, Adam": "float32"},
        "residuals": TRAIN, "parameters": DIMENSIONS * UNITS, "batch": "full",
        "loss": {"LM": "1/2 sum of squared residuals", "SGD, Adam": "mean squared error; SGD's lr is times 500 / alpha^2"},
        "levels": {"train": TRAIN_LEVEL, "test and segments": TEST_LEVEL},
        "columns": {"train_loss, test_loss": "mean squared error",
                    "largest_*, highest_*": "2 |rfft(error)_k| / 64 along the segment to a training point, or to (1, ..., 1)"},
    }


def problem(dtype, seed=0):
    """Return the problem that `pgdfast verify` compares the backends on."""
    model = PolynomialNetwork(1.0, 0.25, seed, dtype, 20, 60)
    (x, y), *_ = data(seed, dtype, 20, 110, 1)
    return Problem(model, lambda: model(x) - y, {"damping": 1e-3, "lr": 0.1}, ("dual", "cg", "eigh"),
                   "20 dimensions, 60 units: 110 residuals, 1,200 parameters")
