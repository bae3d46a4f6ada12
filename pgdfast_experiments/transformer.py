"""`transformer`: addition mod 97 by a two-layer transformer (arXiv 2601.03162, figs. 8 and 12).

Power et al. (2022): half of all pairs to train on, cross-entropy on the token after "=". Adam groks; Gauss-Newton
steps on the generalized Gauss-Newton matrix (150 CG iterations, Armijo search) rise earlier and, in the paper, stall.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import pgdfast
from pgdfast_experiments import grokking, options, plotting
from pgdfast_experiments.experiment import Table, check
from pgdfast_experiments.training import Batches, Case, Session, backward_closure, every
from pgdfast_experiments.verification import Problem

NAME = "transformer"
SUMMARY = """\
Learn a + b mod 97 from half of all pairs with a transformer (two layers, d = 128, 4 heads,
cross-entropy, batch 512). Adam, generalized Gauss-Newton steps (CG with at most 150 iterations to
1e-6, Armijo line search), and a hybrid that goes from one to the other.

Writes transformer.png, transformer.csv and transformer.json into the folder of --out, over those of
an earlier run."""
SOURCE = "arXiv 2601.03162, figures 8 and 12"
PAPER = (
    "Gauss-Newton's validation accuracy rises earlier than Adam's and stalls at 45 %; Adam reaches 100 %. The hybrid "
    "(3,000 Gauss-Newton steps, then Adam) reaches full accuracy without a saving, with a spike of the loss at the change."
)

MODULUS, WIDTH, HEADS, LAYERS, BATCH = 97, 128, 4, 2, 512
KNOWN = ("adam", "sgd", "lm", "hybrid", "hybrid-plateau")
RATES = {"adam": 1e-3, "sgd": 1e-2, "lm": 1.0, "hybrid": 1.0}
DEFAULTS = {"optimizers": "adam,lm,hybrid", "steps": {"adam": 6000, "sgd": 6000, "lm": 250, "hybrid": 5060}, "seeds": 1,
            "threads": 2, "switch": 60}
QUICK = {"steps": {"adam": 150, "sgd": 150, "lm": 6, "hybrid": 56}, "switch": 6, "optimizers": "adam,lm"}
COLUMNS = ("train_loss", "validation_loss", "train_accuracy", "validation_accuracy", "first_order")
LABELS = {"lm": "GGN, CG", "hybrid": "GGN, then Adam", "hybrid-plateau": "GGN, then Adam (measured)"}


def add_options(parser):
    """Add this task's options to `parser`."""
    add = parser.add_argument
    add("--damping", type=options.positive_number, default=1.0, metavar="MU",
        help="mu of the GGN steps (default: %(default)s)")
    add("--cg-iterations", type=options.whole_number(1), default=150, metavar="N",
        help="CG iterations of a GGN step at most (default: %(default)s)")
    add("--switch", type=options.whole_number(1), metavar="N",
        help=f"GGN steps of the hybrid before Adam (default: {DEFAULTS['switch']})")


class Transformer(nn.Module):
    """Token indices (N, T) -> logits of the next token after the last, (N, V).

    Post-norm decoder layers with causal self-attention and a ReLU network of 4 d units, no linear biases, sinusoidal
    positions (Vaswani et al. 2017), an output layer of its own (Power et al. 2022).
    """

    def __init__(self, vocabulary, width, heads, layers, length, seed, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def linear(fan_in, fan_out):
            layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out, bias=False, dtype=dtype)
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            return layer

        self.embedding = nn.utils.skip_init(nn.Embedding, vocabulary, width, dtype=dtype)
        nn.init.normal_(self.embedding.weight, std=width**-0.5, generator=generator)
        self.layers = nn.ModuleList([
            nn.ModuleDict({
                "qkv": linear(width, 3 * width), "out": linear(width, width), "norm1": nn.LayerNorm(width, dtype=dtype),
                "up": linear(width, 4 * width), "down": linear(4 * width, width), "norm2": nn.LayerNorm(width, dtype=dtype),
            }) for _ in range(layers)
        ])
        self.head = linear(width, vocabulary)
        self.heads, self.width = heads, width
        position = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
        table = torch.stack([position.sin(), position.cos()], dim=2).flatten(1)
        self.register_buffer("positions", table.to(dtype), persistent=False)

    def forward(self, tokens):
        """(N, T) -> (N, V)."""
        x = self.embedding(tokens) * math.sqrt(self.width) + self.positions
        n, t, _ = x.shape
        for layer in self.layers:
            q, k, v = layer["qkv"](x).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = layer["norm1"](x + layer["out"](mixed.transpose(1, 2).reshape(n, t, -1)))
            x = layer["norm2"](x + layer["down"](torch.relu(layer["up"](x))))
        return self.head(x[:, -1])


def data(seed, modulus=MODULUS):
    """Return token sequences a + b = (n, 4) and answers (n,) to train on, and those to validate on: half each."""
    pairs = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus))
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(7000 + seed))]
    plus, equals = torch.full((len(pairs), 1), modulus), torch.full((len(pairs), 1), modulus + 1)
    tokens = torch.cat([pairs[:, :1], plus, pairs[:, 1:], equals], dim=1)
    answers = pairs.sum(1) % modulus
    half = len(pairs) // 2
    return (tokens[:half], answers[:half]), (tokens[half:], answers[half:])


def cases(settings):
    """Return every run to be made."""
    return [
        Case(method.name, "", seed, settings.steps_of(method),
             lambda method=method, seed=seed: _start(method, seed, settings))
        for seed in range(settings.seeds) for method in settings.optimizers
    ]


def _start(method, seed, settings):
    model = Transformer(MODULUS + 2, WIDTH, HEADS, LAYERS, 4, seed, torch.float32)
    train, validation = data(seed)
    batches = Batches(len(train[0]), BATCH, seed)
    params = list(model.parameters())

    def ggn():
        return pgdfast.LM(
            params, lr=settings.rate(method), damping=settings.damping, damping_rule="constant", solver="cg",
            cg=pgdfast.CG(settings.cg_iterations, 1e-6), line_search="armijo", backend=settings.backend)

    if method.kind == "lm":
        optimizer = ggn()
    elif method.kind == "hybrid":
        switch = settings.switch if method.name == "hybrid" else pgdfast.Plateau(window=10, factor=0.95)
        optimizer = pgdfast.Hybrid(ggn(), torch.optim.Adam(params, lr=RATES["adam"]), switch=switch)
    else:
        optimizer = method.build(params, settings.rate(method))

    def loss(step):
        index = batches(step)
        return F.cross_entropy(model(train[0][index]), train[1][index])

    def closure(step):
        return (lambda: loss(step)) if method.second_order else backward_closure(optimizer, lambda: loss(step))

    def measure():
        with torch.no_grad():
            logits = [model(tokens) for tokens, _ in (train, validation)]
        answers = [train[1], validation[1]]
        return (*(float(F.cross_entropy(z, a)) for z, a in zip(logits, answers, strict=True)),
                *(float((z.argmax(1) == a).double().mean()) for z, a in zip(logits, answers, strict=True)),
                float(getattr(optimizer, "phase", "lm" if method.second_order else "first_order") == "first_order"))

    steps = settings.steps_of(method)
    rows = every(steps, 5 if method.kind == "lm" else 50, dense=0)
    if method.kind == "hybrid":
        rows = np.unique(np.concatenate([np.arange(0, min(settings.switch + 20, steps), 5), rows]))
    return Session(model, optimizer, closure, measure, COLUMNS, rows)


def summarize(runs, settings):
    """Return, by optimizer: when validation accuracy rises, where it ends, times."""
    summary = {}
    for (optimizer, _), mine in grokking.by_group(runs).items():
        crossings = {level: grokking.median([grokking.crossing(run, "validation_accuracy", level) for run in mine])
                     for level in (0.1, 0.45, 0.95)}
        summary[optimizer] = {
            "steps_to_validation": crossings,
            "validation_accuracy_end": float(np.median([run.columns["validation_accuracy"][-1] for run in mine])),
            "validation_accuracy_best": float(np.median([np.nanmax(run.columns["validation_accuracy"]) for run in mine])),
            "train_accuracy_end": float(np.median([run.columns["train_accuracy"][-1] for run in mine])),
            "gained_in_last_fifth": float(np.median([
                run.columns["validation_accuracy"][-1] - run.columns["validation_accuracy"][run.at >= 0.8 * run.at[-1]][0]
                for run in mine])),
            "first_order_by_step": grokking.median([grokking.crossing(run, "first_order", 1.0) for run in mine]),
            "train_loss_end": float(np.median([run.columns["train_loss"][-1] for run in mine])),
            "loss_jump_at_switch": _jump(mine[0], settings.switch) if optimizer == "hybrid" else None,
            "early": {int(step): [round(float(row), 4) for row in values] for step, *values in zip(
                mine[0].at, mine[0].columns["train_accuracy"], mine[0].columns["validation_accuracy"], strict=True)
                if step <= settings.steps_of(_method(settings, "lm"))},
            "step_ms": float(np.median([run.step_ms for run in mine])),
            "seconds": float(np.median([run.seconds[-1] for run in mine])),
            "stopped_at": {run.seed: run.stopped_at for run in mine if run.stopped_at is not None},
        }
    return summary


def _method(settings, kind):
    return next((method for method in settings.optimizers if method.kind == kind), settings.optimizers[0])


def _jump(run, switch):
    """Return the largest training loss within 20 steps after the change over the last before it."""
    before = run.columns["train_loss"][run.at <= switch][-1]
    after = run.columns["train_loss"][(run.at > switch) & (run.at <= switch + 20)]
    return float(np.max(after) / before) if after.size else float("nan")


def judge(summary, settings):
    """Return the checks, from the numbers in `summary` alone."""

    def leads():
        shared = sorted(set(summary["lm"]["early"]) & set(summary["adam"]["early"]) - {0})
        pairs = [(step, summary["lm"]["early"][step][1], summary["adam"]["early"][step][1]) for step in shared]
        above = [(step, a, b) for step, a, b in pairs if max(a, b) > 2 / MODULUS]  # before that both guess
        text = "; ".join(f"step {step}: GGN {a:.1%}, Adam {b:.1%}" for step, a, b in above)
        return (all(a > b for _, a, b in above) if above else None), text or "neither is above twice chance at a common step"

    def stalls():
        row = summary["lm"]
        end, gained = row["validation_accuracy_end"], row["gained_in_last_fifth"]
        text = f"{end:.1%} after {settings.steps_of(_method(settings, 'lm'))} steps, {gained:+.1%} over the last fifth of them"
        return (False if end >= 0.95 else True if gained < 0.01 else None), text

    def adam_full():
        row = summary["adam"]
        return row["validation_accuracy_best"] >= 0.99, f"best {row['validation_accuracy_best']:.1%}"

    def hybrid_full():
        row = summary["hybrid"]
        return row["validation_accuracy_best"] >= 0.99, f"best {row['validation_accuracy_best']:.1%}"

    def spike():
        jump = summary["hybrid"]["loss_jump_at_switch"]
        return (None if np.isnan(jump) else jump > 1.5), f"the training loss grows by a factor {jump:.2g} within 20 steps"

    return [
        check("GGN's validation accuracy leads Adam's early, step by step", summary, ["lm", "adam"], leads),
        check("GGN's validation accuracy stalls below 95 %", summary, ["lm"], stalls),
        check("Adam reaches full validation accuracy (99 %)", summary, ["adam"], adam_full),
        check("the hybrid reaches full validation accuracy (99 %)", summary, ["hybrid"], hybrid_full),
        check("the loss jumps when the hybrid changes to Adam", summary, ["hybrid"], spike),
    ]


def table(summary, settings):
    """Return the table: when validation accuracy rises and where it ends."""
    rows = []
    for method in settings.optimizers:
        row = summary[method.name]
        rows.append([LABELS.get(method.name, method.label), str(settings.steps_of(method)),
                     *(grokking.shown(row["steps_to_validation"][level]) for level in (0.1, 0.45, 0.95)),
                     f"{row['train_accuracy_end']:.1%}", f"{row['validation_accuracy_end']:.1%}",
                     f"{row['step_ms'] / 1e3:.3f}", f"{row['seconds']:.0f}"])
    return Table(f"{NAME}: steps until the validation accuracy has risen ({plotting.seeds(settings.seeds)})",
                 ["run", "steps", "10 %", "45 %", "95 %", "train end", "validation end", "s/step", "seconds"], rows,
                 ["a dash: not reached"])


def pictures(runs, summary, settings):
    """Return the picture by file suffix, with its caption."""
    figure, axes, _ = plotting.panels(
        f"a + b mod {MODULUS} by a transformer, mu = {settings.damping:g}".replace("mu", "\u03bc")
        + f", {plotting.of_seeds(settings.seeds)}", 4, columns=2, width=5.2, legend_rows=1)
    for panel, column in zip(axes, ("train_accuracy", "validation_accuracy", "train_loss", "validation_accuracy"),
                             strict=True):
        by_time = panel is axes[3]
        handles = []
        for color, method in zip(plotting.SEQUENCE, settings.optimizers, strict=False):
            steps, curves = plotting.of(runs, column, method.name)
            if by_time:
                steps = np.median([run.seconds for run in runs if run.optimizer == method.name], axis=0)
            handles.append(plotting.band(panel, steps, curves, color, LABELS.get(method.name, method.label),
                                         log="loss" in column))
        plotting.name_panel(panel, column.replace("_", " ").capitalize() + (" by time" if by_time else ""))
        panel.set_xlabel("seconds in steps" if by_time else "step", fontsize=9)
        panel.set_xlim(left=1)
        plotting.log_axis(panel, "x")
        if "loss" in column:
            plotting.log_axis(panel, "y")
        else:
            panel.set_ylim(-0.03, 1.05)
    plotting.legend(figure, None, handles, rows_below=1)
    return {"": (figure, "Accuracies and training loss against the step and, last, against wall-clock time "
                         "(logarithmic axes).")}


def describe(settings):
    """Return what the options leave fixed, for the record."""
    model = Transformer(MODULUS + 2, WIDTH, HEADS, LAYERS, 4, 0, torch.float32)
    return {
        "problem": f"a + b mod {MODULUS}, tokens a + b =, half of all pairs to train on", "batch": BATCH, "dtype": "float32",
        "network": "2 decoder layers, d = 128, 4 heads, ReLU network of 512 units, post-norm, causal, no linear biases, "
                   "sinusoidal positions, untied output",
        "parameters": sum(p.numel() for p in model.parameters()), "loss": "cross-entropy, mean; no weight decay",
        "GGN": "CG to a relative residual of 1e-6, Armijo c = 1e-4, factor 0.5, at most 10 trials",
        "columns": {"train_*, validation_*": "over all training or validation pairs",
                    "first_order": "0 while GGN steps are taken, 1 while a first-order optimizer's are"},
        "hybrid-plateau": "changes when the mean loss of 10 GGN steps is not below 0.95 of that of the 10 before",
    }


def problem(dtype, seed=0):
    """Return the problem that `pgdfast verify` compares the backends on."""
    model = Transformer(7, 8, 2, 2, 4, seed, dtype)
    (tokens, answers), _ = data(seed, 5)
    return Problem(model, lambda: F.cross_entropy(model(tokens), answers), {"damping": 0.1, "lr": 0.3},
                   ("dual", "cg"), "a + b mod 5, d = 8, 2 heads, 12 sequences: 84 residuals")
