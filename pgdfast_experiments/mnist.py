"""`mnist`: digits from few images and large initial weights (arXiv 2601.03162, figs. 1, 7, 10, 13 and appendix C).

Weights of alpha times the usual size make a network memorise first and generalize late (Liu et al. 2023, Omnigrok).
Under AdamW the delay grows with alpha; LM with the paper's damping schedule and weight decay has a shorter one.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

import pgdfast
from pgdfast_experiments import grokking, mnist_data, options, plotting
from pgdfast_experiments.experiment import Table, check
from pgdfast_experiments.models import relu_mlp
from pgdfast_experiments.training import Batches, Case, Member, Session, backward_closure, geometric
from pgdfast_experiments.verification import Problem

NAME = "mnist"
SUMMARY = """\
Classify digits from 1,000 images by a ReLU network 784-250-10 whose initial weights are alpha times
Glorot's, with mean squared error on one-hot targets, batch 200. AdamW generalizes late, later for
larger alpha; LM (2,000 residuals, 198,760 parameters, exact steps) earlier; the hybrid goes from LM
to AdamW. --loss cross-entropy is the paper's appendix C: 784-200-200-10, alpha 100, 200 images.

Needs the MNIST files: a folder (--data, PGDFAST_DATA), or the network to download them once.
Writes mnist.png, mnist.csv and mnist.json (mnist-cross-entropy.* with --loss cross-entropy) into
the folder of --out, over those of an earlier run."""
SOURCE = "arXiv 2601.03162, figures 1, 7, 10, 13"
PAPER = (
    "With AdamW the test accuracy rises long after the training accuracy, later for larger alpha; Levenberg-Marquardt "
    "shortens the delay at every alpha but ends lower; LM followed by AdamW reaches at least AdamW's accuracy. Weight "
    "norms go up, down or stay, and LM's loss falls while the accuracy is flat."
)
PAPER_CE = "With cross-entropy (GGN steps, mu = 1) the test accuracy rests on a plateau near 55 %, then near 75 %."

KNOWN, ENSEMBLES = ("sgd", "adam", "adamw", "lm", "lm-MU", "hybrid", "hybrid-plateau"), True
RATES = {"sgd": 1e-4, "adam": 1e-3, "adamw": 1e-3, "lm": 0.1, "hybrid": 0.1}
RATES_CE = {"sgd": 1e-3, "adam": 1e-3, "adamw": 1e-3, "lm": 1e-2, "hybrid": 1e-2}
DEFAULTS = {
    "optimizers": "adamw,lm,hybrid",
    "steps": {"sgd": 20000, "adam": 20000, "adamw": 20000, "lm": 300, "hybrid": 20200},
    "seeds": 2, "threads": 2, "alphas": (1.0, 2.0, 4.0, 8.0), "train_size": 1000, "switch": 200,
}
QUICK = {
    "optimizers": "adamw,lm", "steps": {"sgd": 2000, "adam": 2000, "adamw": 1500, "lm": 60, "hybrid": 560},
    "seeds": 1, "alphas": (4.0,), "switch": 60,
}
CROSS_ENTROPY = {
    "optimizers": "adam,lm", "steps": {"sgd": 5000, "adam": 5000, "adamw": 5000, "lm": 1500, "hybrid": 6500},
    "alphas": (100.0,), "train_size": 200, "seeds": 1,
}
CROSS_ENTROPY_QUICK = {"steps": {"sgd": 1000, "adam": 1000, "adamw": 1000, "lm": 60, "hybrid": 500}, "seeds": 1,
                       "optimizers": "adam,lm", "alphas": (100.0,)}
COLUMNS = ("loss", "train_accuracy", "test_accuracy", "weight_norm", "first_order")
BATCH, TEST_LEVEL = 200, 0.6


def add_options(parser):
    """Add this task's options to `parser`."""
    add = parser.add_argument
    add("--loss", choices=("mse", "cross-entropy"), default="mse",
        help="mean squared error on one-hot targets, or cross-entropy (default: %(default)s)")
    add("--data", metavar="DIR", help="folder with the MNIST files (default: PGDFAST_DATA, else a download)")
    add("--alphas", type=options.numbers, metavar="LIST",
        help="factors on the initial weights (default: 1,2,4,8; 100 with cross-entropy)")
    add("--train-size", type=options.whole_number(10), metavar="N",
        help="training images (default: 1000; 200 with cross-entropy)")
    add("--switch", type=options.whole_number(1), metavar="N",
        help="LM steps of the hybrid before AdamW (default: 200)")
    add("--weight-decay", type=options.positive_number, metavar="W",
        help="decoupled, of AdamW (default: 0.1) and LM (default: 0.3); 0.01 for all with cross-entropy")
    add("--normalization", choices=("mean", "sum"), default="mean",
        help="LM's squared error: the mean over batch and outputs, or 1/2 of the sum (default: %(default)s)")


def adjust(values):
    """Return DEFAULTS and QUICK as they are for these options: cross-entropy has its own."""
    if values["loss"] == "mse":
        return DEFAULTS, QUICK
    return {**DEFAULTS, **CROSS_ENTROPY}, CROSS_ENTROPY_QUICK


def name(settings):
    """Return the name of the result files."""
    return NAME if settings.loss == "mse" else "mnist-cross-entropy"


def paper(settings):
    """Return what the paper reports of this loss."""
    return PAPER if settings.loss == "mse" else PAPER_CE


def damping(step):
    """Return the paper's mu at a step: from 1e-2 to 1e-4 on a logarithmic scale over 500 steps, then 1e-4."""
    return math.exp(math.log(1e-2) + min(step / 500, 1.0) * (math.log(1e-4) - math.log(1e-2)))


def _rate(settings, method):
    if settings.lr is not None or settings.loss == "mse":
        return settings.rate(method)
    return RATES_CE[method.kind]


def _decay(settings, kind):
    if settings.weight_decay is not None:
        return settings.weight_decay
    if settings.loss == "cross-entropy":
        return 0.01
    return {"adamw": 0.1, "lm": 0.3}.get(kind, 0.0)


def _optimizer(method, params, settings, **options):
    def lm():
        fixed = {"damping": damping if settings.loss == "mse" else 1.0} if method.damping is None else {}
        plain = method if method.kind == "lm" else _LM
        return plain.build(params, _rate(settings, method), settings.backend, weight_decay=_decay(settings, "lm"), **fixed,
                           **options)

    if method.kind == "lm":
        return lm()
    if method.kind == "hybrid":
        after = torch.optim.AdamW(params, lr=RATES["adamw"], weight_decay=_decay(settings, "adamw"))
        # Half a pass over the data a step of the window: LM's loss jumps from minibatch to minibatch.
        switch = settings.switch if method.name == "hybrid" else pgdfast.Plateau(window=20, factor=0.9)
        return pgdfast.Hybrid(lm(), after, switch=switch)
    return method.build(params, _rate(settings, method), weight_decay=_decay(settings, method.kind))


def cases(settings):
    """Return every run to be made; reads the data."""
    size = settings.train_size
    sets = {seed: mnist_data.train_and_test(settings.data, size, seed) for seed in range(settings.seeds)}
    return [
        Case(method.name, f"alpha={alpha:g}", seed, settings.steps_of(method),
             lambda method=method, seed=seed, alpha=alpha: _start(method, seed, alpha, settings, sets[seed]),
             together=method.together)
        for seed in range(settings.seeds) for alpha in settings.alphas for method in settings.optimizers
    ]


def network(settings_loss, alpha, seed, dtype=torch.float32):
    """Return the task's ReLU network with weights alpha times Glorot's."""
    sizes = (784, 250, 10) if settings_loss == "mse" else (784, 200, 200, 10)
    return relu_mlp(sizes, alpha, seed, dtype)


def _start(method, seed, alpha, settings, data):
    model = network(settings.loss, alpha, seed)
    x, labels = data.train_images, data.train_labels
    targets = F.one_hot(labels, 10).to(x.dtype)
    batches = Batches(len(x), BATCH, seed)

    def loss(network, images, wanted):
        if settings.loss == "cross-entropy":
            return F.cross_entropy(network(images), wanted)
        if method.second_order and settings.normalization == "sum":
            return 0.5 * (network(images) - wanted).square().sum()
        return F.mse_loss(network(images), wanted)

    def batch(step):
        index = batches(step)
        return x[index], (labels if settings.loss == "cross-entropy" else targets)[index]

    member = Member(loss, batch, lambda params, **options: _optimizer(method, list(params), settings, **options))
    if method.second_order:
        optimizer, closure = member.alone(model)
    else:
        optimizer = member.build(model.parameters())
        def closure(step):
            return backward_closure(optimizer, lambda: loss(model, *batch(step)))

    def measure():
        with torch.no_grad():
            train, test = model(x), model(data.test_images)
            value = F.cross_entropy(train, labels) if settings.loss == "cross-entropy" else F.mse_loss(train, targets)
            norm = math.sqrt(sum(float(p.double().square().sum()) for p in model.parameters()))
        return (float(value), float((train.argmax(1) == labels).double().mean()),
                float((test.argmax(1) == data.test_labels).double().mean()), norm,
                float(getattr(optimizer, "phase", "lm" if method.second_order else "first_order") == "first_order"))

    steps = settings.steps_of(method)
    return Session(model, optimizer, closure, measure, COLUMNS, geometric(steps), member=member)


def summarize(runs, settings):
    """Return, by optimizer and alpha: when the accuracies rise, where they end, weight norms, times."""
    summary = {"data": {"source": mnist_data.train_and_test(settings.data, settings.train_size, 0).source}}
    for (optimizer, variant), mine in grokking.by_group(runs).items():
        train = [grokking.crossing(run, "train_accuracy", 0.95) for run in mine]
        test = [grokking.crossing(run, "test_accuracy", TEST_LEVEL) for run in mine]
        ends = [float(run.columns["test_accuracy"][-1]) for run in mine]
        seconds = [float(run.seconds[run.at == step][0]) if step == step else float("nan")
                   for run, step in zip(mine, test, strict=True)]
        summary[f"{optimizer} {variant}"] = {
            "steps_to_train_95": grokking.median(train), "steps_to_test_60": grokking.median(test),
            "steps_to_train_95_by_seed": train, "steps_to_test_60_by_seed": test,
            "seconds_to_test_60": grokking.median(seconds),
            "test_accuracy_end": float(np.median(ends)), "test_accuracy_end_by_seed": ends,
            "test_accuracy_best": float(np.median([np.nanmax(run.columns["test_accuracy"]) for run in mine])),
            "train_accuracy_end": float(np.median([run.columns["train_accuracy"][-1] for run in mine])),
            "loss_end": float(np.median([run.columns["loss"][-1] for run in mine])),
            "first_order_by_step": grokking.median([grokking.crossing(run, "first_order", 1.0) for run in mine]),
            "weight_norm": [float(np.median([run.columns["weight_norm"][k] for run in mine])) for k in (0, -1)],
            "step_ms": float(np.median([run.step_ms for run in mine])),
            "seconds": float(np.median([run.seconds[-1] for run in mine])),
            "stopped_at": {run.seed: run.stopped_at for run in mine if run.stopped_at is not None},
        }
    return summary


def judge(summary, settings):
    """Return the checks, from the numbers in `summary` alone."""
    return _judge_mse(summary, settings) if settings.loss == "mse" else _judge_cross_entropy(summary, settings)


def _judge_mse(summary, settings):
    variants = [f"alpha={alpha:g}" for alpha in sorted(settings.alphas)]
    adamw, lm, hybrid = ([f"{kind} {variant}" for variant in variants] for kind in ("adamw", "lm", "hybrid"))

    def values(names, key):
        return [summary[name][key] for name in names]

    def told(form, *columns):
        return ", ".join("/".join(grokking.shown(v, form) for v in row) + f" at {variant}"
                         for variant, row in zip(variants, zip(*columns, strict=True), strict=True))

    def earlier():
        a, b = values(lm, "steps_to_test_60"), values(adamw, "steps_to_test_60")
        known = not np.isnan(a).any()
        return known and all(x < y or np.isnan(y) for x, y in zip(a, b, strict=True)), f"LM/AdamW: {told('g', a, b)}"

    def grows():
        # Where 60 % of the test images come before 95 % of the training images there is no delay.
        gaps = [np.inf if np.isnan(b) else max(b - a, 0.0) for a, b in
                zip(values(adamw, "steps_to_train_95"), values(adamw, "steps_to_test_60"), strict=True)]
        text = ", ".join(f"{gap:g} at {variant}" for gap, variant in zip(gaps, variants, strict=True))
        return bool(gaps[-1] > gaps[0] and np.all(np.array(gaps[1:]) >= np.array(gaps[:-1]))), f"steps: {text}"

    def lower():
        a, b = values(lm, "test_accuracy_end"), values(adamw, "test_accuracy_end")
        return all(x < y for x, y in zip(a, b, strict=True)), f"LM/AdamW: {told('.1%', a, b)}"

    def no_lower():
        a, b = values(hybrid, "test_accuracy_end"), values(adamw, "test_accuracy_end")
        return all(x >= y for x, y in zip(a, b, strict=True)), f"hybrid/AdamW: {told('.1%', a, b)}"

    def norms():
        rows = [f"{kind} {values([k], 'weight_norm')[0][0]:.0f} to {values([k], 'weight_norm')[0][1]:.0f} at {variant}"
                for kind, names in (("AdamW", adamw), ("LM", lm)) for k, variant in zip(names, variants, strict=True)]
        directions = {np.sign(round(math.log(b / a), 1)) for k in (*adamw, *lm) for a, b in [summary[k]["weight_norm"]]}
        return len(directions) > 1, ", ".join(rows)

    many, why = len(variants) > 1, "needs several values of alpha"
    return [
        check("at each alpha LM's first step above 60 % test accuracy comes before AdamW's", summary, [*lm, *adamw], earlier),
        check("the hybrid ends no lower than AdamW at each alpha", summary, [*hybrid, *adamw], no_lower),
        check("AdamW's delay from 95 % train to 60 % test accuracy grows with alpha", summary, adamw, grows, many, why),
        check("LM ends lower than AdamW at each alpha", summary, [*lm, *adamw], lower),
        check("weight norms do not all move in one direction", summary, [*lm, *adamw], norms, many, why),
    ]


def _judge_cross_entropy(summary, settings):
    lm = [f"lm alpha={alpha:g}" for alpha in settings.alphas]

    def plateau():
        best = [summary[name]["test_accuracy_best"] for name in lm]
        return all(value >= 0.5 for value in best), ", ".join(f"{value:.1%}" for value in best)

    def late():
        best = [summary[name]["test_accuracy_best"] for name in lm]
        return all(value >= 0.7 for value in best), ", ".join(f"{value:.1%}" for value in best)

    return [check("GGN steps reach the plateau near 55 % test accuracy", summary, lm, plateau),
            check("and the later one near 75 %", summary, lm, late)]


def table(summary, settings):
    """Return the table: when the accuracies rise and where they end."""
    rows = []
    for method in settings.optimizers:
        for alpha in settings.alphas:
            row = summary[f"{method.name} alpha={alpha:g}"]
            rows.append([f"{method.label}, alpha {alpha:g}", grokking.shown(row["steps_to_train_95"]),
                         grokking.shown(row["steps_to_test_60"]), grokking.shown(row["seconds_to_test_60"], ".1f"),
                         f"{row['test_accuracy_end']:.1%}", f"{row['step_ms']:.1f}"])
    return Table(f"{name(settings)}: steps until the accuracy has risen (median of {plotting.seeds(settings.seeds)})",
                 ["run", "train 95 %", "test 60 %", "seconds to it", "test at the end", "ms/step"], rows,
                 ["a dash: not reached within the steps of most seeds", summary["data"]["source"]])


def pictures(runs, summary, settings):
    """Return the picture by file suffix, with its caption."""
    count = len(settings.optimizers)
    net = "784-250-10" if settings.loss == "mse" else "784-200-200-10"
    kind = "mean squared error" if settings.loss == "mse" else "cross-entropy"
    figure, axes, _ = plotting.panels(
        f"MNIST, {settings.train_size:,} images, ReLU {net}, {kind}, {plotting.of_seeds(settings.seeds)}",
        4 * count, columns=4, width=3.6, height=2.7, legend_rows=1)
    names = ("test_accuracy", "train_accuracy", "loss", "weight_norm")
    for row, method in enumerate(settings.optimizers):
        groups = [(method.name, f"alpha={alpha:g}", color, f"\u03b1 = {alpha:g}")
                  for alpha, color in zip(settings.alphas, grokking.shades(len(settings.alphas)), strict=True)]
        for panel, column in zip(axes[4 * row:4 * row + 4], names, strict=True):
            log = column in ("loss", "weight_norm")
            handles = grokking.draw(panel, runs, column, groups, log=log)
            plotting.name_panel(panel, f"{plotting.math(method.label)}: {column.replace('_', ' ')}")
            panel.set_xlim(10 if method.second_order else 100, settings.steps_of(method))
            plotting.log_axis(panel, "x")
            panel.set_xlabel("step", fontsize=9)
            if log:
                plotting.log_axis(panel, "y")
            else:
                panel.set_ylim(-0.03, 1.05)
            if method.name == "hybrid":
                panel.axvline(settings.switch, color="#888888", linewidth=0.9, linestyle=":")
    plotting.legend(figure, None, handles, rows_below=1)
    return {"": (figure, "Accuracies, loss and weight norm against the step (logarithmic), one curve per alpha. "
                         "A dotted line marks the hybrid's change to AdamW.")}


def describe(settings):
    """Return what the options leave fixed, for the record."""
    ce = settings.loss == "cross-entropy"
    return {
        "network": "ReLU 784-200-200-10" if ce else "ReLU 784-250-10", "init": "alpha times Glorot uniform, zero biases",
        "dtype": "float32", "batch": BATCH, "loss": "cross-entropy" if ce else "mean squared error over batch and outputs",
        "damping": "1" if ce else "exp(ln 1e-2 + min(step/500, 1) (ln 1e-4 - ln 1e-2))",
        "weight_decay": {kind: _decay(settings, kind) for kind in ("sgd", "adam", "adamw", "lm")},
        "residuals": 10 * BATCH, "parameters": 199_210 + 1_000 if ce else 198_760,
        "columns": {"loss": "over all training images", "weight_norm": "Euclidean norm of all parameters",
                    "first_order": "0 while LM steps, 1 while a first-order optimizer does"},
        "hybrid-plateau": "changes when the mean loss of 20 LM steps is not below 0.9 of that of the 20 before",
    }


def problem(dtype, seed=0):
    """Return the problem that `pgdfast verify` compares the backends on: random images, no files needed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(6, 784, generator=generator, dtype=torch.float64).to(dtype)
    y = F.one_hot(torch.arange(6), 10).to(dtype)
    model = relu_mlp((784, 30, 10), 1.0, seed, dtype)
    return Problem(model, lambda: F.mse_loss(model(x), y), {"damping": 1e-3, "lr": 0.1}, ("dual", "cg", "eigh"),
                   "784-30-10, 6 images of noise: 60 residuals, 23,860 parameters")


def problem_cross_entropy(dtype, seed=0):
    """Return the same for the cross-entropy variant."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(6, 784, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.arange(6)
    model = relu_mlp((784, 20, 20, 10), 1.0, seed, dtype)
    return Problem(model, lambda: F.cross_entropy(model(x), y), {"damping": 1.0, "lr": 0.1}, ("dual", "cg"),
                   "784-20-20-10, cross-entropy, 6 images of noise: 60 residuals, 16,330 parameters")


_LM = options.methods(("lm",))("lm")[0]
