"""`modular-mlp`: a + b mod 23 by a quadratic network, at several output scales (arXiv 2601.03162, fig. 5).

f(x) = (M/100) W2 (W1 x)^2 with output multiplier M = alpha^2, one-hot inputs and targets, 90 % of all pairs to train
on. Under gradient descent the delay from fitting to generalizing grows with alpha; under LM the curves nearly coincide.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import pgdfast
from pgdfast_experiments import grokking, options, plotting
from pgdfast_experiments.experiment import Table, check
from pgdfast_experiments.training import Case, Member, Session, backward_closure, every
from pgdfast_experiments.verification import Problem

NAME = "modular-mlp"
SUMMARY = """\
Learn a + b mod 23 from 90 % of all pairs with a quadratic network f = (M/100) W2 (W1 x)^2,
M = alpha^2, for several alpha. Gradient descent groks, later for larger alpha; Levenberg-Marquardt
steps (10,948 residuals, 6,900 parameters) generalize within a few steps at every alpha.

Writes modular-mlp.png, modular-mlp.csv and modular-mlp.json into the folder of --out,
over those of an earlier run."""
SOURCE = "arXiv 2601.03162, figure 5"
PAPER = (
    "With SGD the delay between training and test accuracy grows with alpha; with Levenberg-Marquardt the test curves "
    "of all alpha nearly coincide, and the delay is short."
)

MODULUS, WIDTH, TRAIN_SHARE = 23, 100, 0.9
LEVEL = 0.95
"""Accuracy that counts as learnt."""
KNOWN, ENSEMBLES = ("sgd", "adam", "lm-MU"), True
RATES = {"sgd": 100.0, "adam": 1e-2, "lm": 1.0}
"""For SGD divided by M^2, as in Gromov (2023)."""
DEFAULTS = {"optimizers": "sgd,lm-0.1", "steps": {"sgd": 24000, "adam": 4000, "lm": 60}, "seeds": 5, "threads": 1,
            "alphas": (0.5, 0.71, 1.0, 1.22, 1.5, 2.0)}
QUICK = {"seeds": 1, "alphas": (0.5, 1.0, 1.5)}
COLUMNS = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")


def add_options(parser):
    """Add this task's options to `parser`."""
    parser.add_argument("--alphas", type=options.numbers, metavar="LIST",
                        help="scales of the output, M = alpha^2 (default: 0.5,0.71,1,1.22,1.5,2)")


class QuadraticNetwork(torch.nn.Module):
    """f(x) = (M / width) W2 (W1 x)^2 without biases, entries of W1 (width, 2 p) and W2 (p, width) from N(0, 1)."""

    def __init__(self, modulus, width, multiplier, seed, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = torch.nn.Parameter(torch.randn(width, 2 * modulus, generator=generator, dtype=torch.float64).to(dtype))
        self.second = torch.nn.Parameter(torch.randn(modulus, width, generator=generator, dtype=torch.float64).to(dtype))
        # A buffer, so that networks of one ensemble can have different ones.
        self.register_buffer("scale", torch.tensor(multiplier / width, dtype=dtype), persistent=False)

    def forward(self, x):
        """(N, 2 p) -> (N, p)."""
        return self.scale * (F.linear(x, self.first).square() @ self.second.T)


def data(seed, modulus=MODULUS, dtype=torch.float64):
    """Return the training and the test pairs: inputs (N, 2 p) and targets (N, p), one-hot."""
    pairs = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus))
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(5000 + seed))
    pairs = pairs[order]
    x = torch.cat([F.one_hot(pairs[:, 0], modulus), F.one_hot(pairs[:, 1], modulus)], dim=1).to(dtype)
    y = F.one_hot(pairs.sum(1) % modulus, modulus).to(dtype)
    count = int(TRAIN_SHARE * len(pairs))
    return (x[:count], y[:count]), (x[count:], y[count:])


def cases(settings):
    """Return every run to be made."""
    return [
        Case(method.name, f"alpha={alpha:g}", seed, settings.steps_of(method),
             lambda method=method, seed=seed, alpha=alpha: _start(method, seed, alpha, settings),
             together=method.together)
        for seed in range(settings.seeds) for alpha in settings.alphas for method in settings.optimizers
    ]


def _start(method, seed, alpha, settings):
    model = QuadraticNetwork(MODULUS, WIDTH, alpha**2, seed, torch.float64)
    train, test = data(seed)

    def measure():
        with torch.no_grad():
            outputs = [model(x) for x, _ in (train, test)]
        losses = [float(F.mse_loss(f, y)) for f, (_, y) in zip(outputs, (train, test), strict=True)]
        return *losses, *(float((f.argmax(1) == y.argmax(1)).double().mean())
                          for f, (_, y) in zip(outputs, (train, test), strict=True))

    rate = settings.rate(method)
    member = None
    if method.second_order:
        build = partial(method.build, lr=rate, backend=settings.backend, cg=pgdfast.CG(2000, 1e-8))
        member = Member(lambda network, x, y: network(x) - y, lambda step: train, build)
        optimizer, closure = member.alone(model)
    else:
        rate = rate / alpha**4 if method.kind == "sgd" else rate
        optimizer = method.build(model.parameters(), rate)
        backward = backward_closure(optimizer, lambda: F.mse_loss(model(train[0]), train[1]))
        def closure(step):
            return backward
    steps = settings.steps_of(method)
    rows = every(steps, 1 if method.second_order else 20)
    return Session(model, optimizer, closure, measure, COLUMNS, rows, lambda row: row["test_accuracy"] == 1.0,
                   member=member)


def summarize(runs, settings):
    """Return, by optimizer and alpha: steps and seconds to 95 % accuracy on training and test pairs."""
    summary = {}
    for (optimizer, variant), mine in grokking.by_group(runs).items():
        steps = {kind: [grokking.crossing(run, f"{kind}_accuracy", LEVEL) for run in mine] for kind in ("train", "test")}
        summary[f"{optimizer} {variant}"] = {
            "steps_to_train": grokking.median(steps["train"]), "steps_to_train_by_seed": steps["train"],
            "steps_to_test": grokking.median(steps["test"]), "steps_to_test_by_seed": steps["test"],
            "gap": grokking.median([b - a for a, b in zip(steps["train"], steps["test"], strict=True)]),
            "best_test_accuracy": float(np.median([np.nanmax(run.columns["test_accuracy"]) for run in mine])),
            "step_ms": float(np.median([run.step_ms for run in mine])),
            "seconds": float(np.median([run.seconds[-1] for run in mine])),
            "stopped_at": {run.seed: run.stopped_at for run in mine if run.stopped_at is not None},
        }
    return summary


def judge(summary, settings):
    """Return the checks, from the numbers in `summary` alone."""
    variants = [f"alpha={alpha:g}" for alpha in sorted(settings.alphas)]
    lms = [method.name for method in settings.optimizers if method.second_order]
    lm = [f"{lms[0]} {variant}" for variant in variants] if lms else [None]
    sgd = [f"sgd {variant}" for variant in variants]

    def varies(names, held):
        steps = [summary[name]["steps_to_test"] for name in names]
        factor = grokking.spread(steps)
        text = ", ".join(f"{grokking.shown(s)} at {v}" for s, v in zip(steps, variants, strict=True))
        return (False if np.isnan(factor) else held(factor)), f"factor {grokking.shown(factor, '.2f')}: {text}"

    def gap_grows():
        gaps = [summary[name]["gap"] for name in sgd]
        text = ", ".join(f"{grokking.shown(g)} at {v}" for g, v in zip(gaps, variants, strict=True))
        return bool(np.all(np.diff(gaps) > 0)), f"steps from {LEVEL:.0%} train to {LEVEL:.0%} test: {text}"

    enough = len(variants) > 1
    why = "needs several values of alpha"
    return [
        check("LM's steps to 95 % test accuracy vary by less than a factor 2 over alpha", summary, lm,
              lambda: varies(lm, lambda factor: factor < 2), enough, why),
        check("SGD's steps to 95 % test accuracy vary by more than a factor 5 over alpha", summary, sgd,
              lambda: varies(sgd, lambda factor: factor > 5), enough, why),
        check("SGD's gap from training to test accuracy grows with alpha", summary, sgd, gap_grows, enough, why),
    ]


def table(summary, settings):
    """Return the table: steps to 95 % by optimizer and alpha."""
    rows = []
    for method in settings.optimizers:
        for alpha in settings.alphas:
            row = summary[f"{method.name} alpha={alpha:g}"]
            rows.append([f"{method.label}, alpha {alpha:g}", grokking.shown(row["steps_to_train"]),
                         grokking.shown(row["steps_to_test"]), f"{row['best_test_accuracy']:.1%}",
                         f"{row['step_ms']:.2f}", f"{row['seconds']:.2f}"])
    return Table(f"{NAME}: steps to 95 % accuracy (median of {plotting.seeds(settings.seeds)})",
                 ["run", "train", "test", "best test", "ms/step", "seconds"], rows,
                 ["a dash: not reached within the steps of most seeds"])


def pictures(runs, summary, settings):
    """Return the picture by file suffix, with its caption."""
    figure, axes, _ = plotting.panels(
        f"a + b mod {MODULUS} by a quadratic network, M = \u03b1\u00b2, {plotting.of_seeds(settings.seeds)}",
        2 * len(settings.optimizers), columns=2, width=5.2, legend_rows=1)
    colors = grokking.shades(len(settings.alphas))
    for row, method in enumerate(settings.optimizers):
        groups = [(method.name, f"alpha={alpha:g}", color, f"\u03b1 = {alpha:g}")
                  for alpha, color in zip(settings.alphas, colors, strict=True)]
        for panel, kind in zip(axes[2 * row:2 * row + 2], ("train", "test"), strict=True):
            handles = grokking.draw(panel, runs, f"{kind}_accuracy", groups, log=False)
            plotting.name_panel(panel, f"{plotting.math(method.label)}: {kind}",
                                f"{np.median([run.step_ms for run in runs if run.optimizer == method.name]):.3g} ms a step")
            panel.set_ylim(-0.03, 1.05)
            panel.set_ylabel("accuracy", fontsize=9)
            panel.set_xlabel("step", fontsize=9)
            if method.second_order:
                panel.set_xlim(0, 1.15 * max(run.last for run in runs if run.optimizer == method.name))
            else:
                panel.set_xlim(left=20)
                plotting.log_axis(panel, "x")
    plotting.legend(figure, None, handles, rows_below=1)
    return {"": (figure, "Accuracy on the training and the test pairs against the step, one curve per alpha. "
                         "The step axis of first-order methods is logarithmic. Runs end at full test accuracy.")}


def describe(settings):
    """Return what the options leave fixed, for the record."""
    return {
        "problem": f"a + b mod {MODULUS}, one-hot inputs and targets, {TRAIN_SHARE:.0%} of the pairs to train on",
        "network": f"(M/{WIDTH}) W2 (W1 x)^2, M = alpha^2, no biases, entries N(0, 1)", "dtype": "float64",
        "residuals": int(TRAIN_SHARE * MODULUS**2) * MODULUS, "parameters": 3 * MODULUS * WIDTH, "batch": "full",
        "loss": {"LM": "1/2 sum of squared residuals; CG to 1e-8 or exact, whichever is predicted cheaper",
                 "SGD, Adam": "mean over samples and outputs; SGD's lr is divided by M^2"},
        "columns": {"train_loss, test_loss": "mean squared error over samples and outputs",
                    "train_accuracy, test_accuracy": "share of pairs whose largest output is right"},
    }


def problem(dtype, seed=0):
    """Return the problem that `pgdfast verify` compares the backends on."""
    model = QuadraticNetwork(5, 8, 1.0, seed, dtype)
    (x, y), _ = data(seed, 5, dtype)
    return Problem(model, lambda: model(x) - y, {"damping": 0.1, "lr": 1.0}, ("dual", "primal", "cg", "eigh"),
                   "a + b mod 5, width 8: 110 residuals, 120 parameters")
