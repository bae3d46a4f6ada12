"""`regression-1d`: how fast each Fourier mode of the error falls (arXiv 2601.03162, fig. 3).

Target u(x) = 1/3 sum_{k=1..3} k sin((2k+1) pi x - k) on [-1, 1), tanh network, full batch, float64.

What to expect, from the flows of the linearised model, with e the error and lambda_i the
eigenvalues of J J^T:

    gradient descent   d e_i/dt = -lambda_i e_i                     where lambda_i is small: stalls
    LM                 d e_i/dt = -lambda_i / (mu + lambda_i) e_i   in between
    Gauss-Newton       d e_i/dt = -e_i                              all modes fall alike

so that under Gauss-Newton every mode falls by (1 - lr)^100 per 100 steps.

Index legend: N points, K modes shown, T steps, S seeds.
"""

import time
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch

from pgdfast.tasks import options, plotting, records, terminal
from pgdfast.tasks.measures import (
    FAIL,
    FLOOR,
    OPEN,
    PASS,
    Check,
    decay_per_100,
    fourier_amplitudes,
    median_of_resolved,
)
from pgdfast.tasks.methods import Method, check_backend
from pgdfast.tasks.models import tanh_mlp
from pgdfast.tasks.training import adam_step_ms, least_squares_closure, torch_threads, train

SUMMARY = """\
Fit u(x) = 1/3 sum_{k=1..3} k sin((2k+1) pi x - k) at 100 points by a tanh network, full batch,
and follow the error in the Fourier modes 1 to 10. Gauss-Newton lets all modes fall alike,
gradient descent stalls on the high ones, Levenberg-Marquardt lies in between.

Writes regression-1d.png, regression-1d.csv and regression-1d.json into the folder of --out,
over those of an earlier run."""

POINTS = 100
MODES = tuple(range(1, 11))
TARGET_MODES = (3, 5, 7)

DEFAULTS = {"optimizers": "sgd,lm-0.5,lm-0.1,gn", "steps": 800, "seeds": 5, "lr": 1e-2}
QUICK = {"steps": 800, "seeds": 3}   # shorter runs end within the transients

_NAME = "regression-1d"
_COLUMNS = ("loss", *(f"mode_{k}" for k in MODES))


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run computes."""

    optimizers: tuple[Method, ...]
    steps: int
    seeds: int
    lr: float
    hidden_layers: int
    width: int
    backend: str
    threads: int


def add_options(parser):
    """Add this task's options to `parser`."""
    options.add_common(parser, _NAME, DEFAULTS, QUICK)
    parser.add_argument("--hidden-layers", type=options.whole_number(1), default=2, metavar="N",
                        help="hidden layers of the network (default: %(default)s)")
    parser.add_argument("--width", type=options.whole_number(1), default=80, metavar="N",
                        help="units in each hidden layer (default: %(default)s)")


def run(arguments):
    """Train, write the three files, print the table and the checks; returns the exit code."""
    values = options.fill(arguments, DEFAULTS, QUICK)
    settings = Settings(**{name: values[name] for name in Settings.__dataclass_fields__})
    terminal.require_extras()
    folder = records.prepare_folder(values["out"])

    started, clock = time.gmtime(), time.perf_counter()
    with torch_threads(settings.threads):
        check_backend(settings.optimizers, settings.backend)
        runs, adam_ms = _train_all(settings)
    summary = summarise(runs)
    checks = judge(summary, settings.steps, settings.lr)

    record = _record(settings, summary, adam_ms, checks)
    record |= {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", started),
               "seconds": round(time.perf_counter() - clock, 3)}
    with records.all_or_nothing(folder) as scratch:
        records.write_csv(scratch / f"{_NAME}.csv", runs)
        records.write_json(scratch / f"{_NAME}.json", record)
        picture(runs, summary, settings).savefig(scratch / f"{_NAME}.png")
    _show(settings, summary, adam_ms, checks, folder)
    return 0


# --- the problem ----------------------------------------------------------------------------------

def data(points=POINTS):
    """Return the points x and targets u(x), both (N, 1) float64.

    The grid is x_j = -1 + 2 j / N, without the right end point: u has period 2, so x = 1 would be
    x = -1 a second time. On this grid the three sines are exactly the modes 3, 5, 7 of the discrete
    Fourier transform, of amplitudes 1/3, 2/3, 1, and nothing leaks into the others.
    """
    x = -1 + 2 * torch.arange(points, dtype=torch.float64)[:, None] / points
    u = sum(k * torch.sin((2 * k + 1) * torch.pi * x - k) for k in (1, 2, 3)) / 3
    return x, u


def _train_all(settings):
    """Return the runs, seed by seed, and the median time of an Adam step on the same network."""
    x, u = data()
    runs, adam_ms = [], []
    total = settings.seeds * len(settings.optimizers) * settings.steps
    with terminal.progress(total) as (announce, advance):
        for seed in range(settings.seeds):
            for method in settings.optimizers:
                announce(f"{method.label}, seed {seed}")
                model = tanh_mlp(1, settings.width, settings.hidden_layers, 1, seed)
                runs.append(_train_one(model, x, u, method, seed, settings, advance))
            model = tanh_mlp(1, settings.width, settings.hidden_layers, 1, seed)
            adam_ms.append(adam_step_ms(model, lambda twin: twin(x) - u, settings.lr))
    return runs, float(np.median(adam_ms))


def _train_one(model, x, u, method, seed, settings, advance):
    def residual():
        return model(x) - u

    def measure():
        with torch.no_grad():
            error = residual()[:, 0].numpy()
        return 0.5 * error @ error, *fourier_amplitudes(error, MODES)

    optimizer = method.build(model.parameters(), settings.lr, settings.backend)
    closure = least_squares_closure(optimizer, residual, method.second_order)
    return train(method.name, seed, optimizer, closure, measure, _COLUMNS, settings.steps, advance)


# --- what the curves say --------------------------------------------------------------------------

_GN_RATE_BAND = (0.937, 1.073)
"""Of the rate -100 ln(1 - lr): at lr 1e-2, factors from 0.34 to 0.39."""

_STALL = 0.9
"""A mode that keeps this much of itself per 100 steps has stalled (some even grow)."""

_MIN_STEPS = 200
"""Shorter runs end within the transient, and are not judged."""


def summarise(runs):
    """Return, by optimizer: decay and final amplitude of each mode, final loss, time of a step.

    Decay is the factor per 100 steps over the second half of the run (`measures.decay_per_100`). A
    mode is resolved where its amplitude stands above the rounding floor there, whether the target
    has the mode or only the network's first output brought it in; it counts when most seeds resolve
    it, and is NaN otherwise.
    """
    summary = {}
    for name in dict.fromkeys(run.optimizer for run in runs):
        mine = [run for run in runs if run.optimizer == name]
        decay = {k: [decay_per_100(run.columns[f"mode_{k}"]) for run in mine] for k in MODES}
        summary[name] = {
            "decay_per_100_steps": {k: median_of_resolved(decay[k]) for k in MODES},
            "decay_per_100_steps_by_seed": decay,
            "final_amplitude": {
                k: float(np.median([run.columns[f"mode_{k}"][-1] for run in mine])) for k in MODES
            },
            "final_loss": float(np.median([run.columns["loss"][-1] for run in mine])),
            "step_ms": float(np.median([run.step_ms for run in mine])),
            "stopped_at": {run.seed: run.stopped_at for run in mine if run.stopped_at is not None},
        }
    return summary


def judge(summary, steps, lr):
    """Return the checks of this task, from the numbers in `summary` (of `summarise`) alone.

    Under LM a single mode does not fall as an exponential: it dips where its error changes sign and
    bends as the network's features change, so the order of single modes depends on the number of
    steps. That of the loss, which holds all modes together, does not. Both are judged.
    """
    fall = max(1 - lr, 0.0) ** 100  # from lr 1 on there is no rate to speak of
    low, high = (fall**rate for rate in reversed(_GN_RATE_BAND))
    lms = sorted((name for name in summary if name.startswith("lm-")),
                 key=lambda name: -float(name.removeprefix("lm-")))
    return [
        _check(
            f"Gauss-Newton's factor is (1 - {lr:g})^100 = {fall:.3g} in every mode "
            f"({low:.2g}-{high:.2g})" if lr < 1 else "Gauss-Newton has one factor for every mode",
            summary, steps, ["gn"] if lr < 1 else [None],
            lambda: _within(summary["gn"], MODES, low, high)),
        _check(
            "LM's factors lie between Gauss-Newton's and SGD's",
            summary, steps, ["gn", *(lms or [None]), "sgd"],
            lambda: _ordered(summary, [["gn", lm, "sgd"] for lm in lms])),
        _check(
            "LM's factors are nearer to Gauss-Newton's as mu falls",
            summary, steps, lms if len(lms) > 1 else [None],
            lambda: _ordered(summary, [lms[::-1]])),
        _check(
            "the loss at the end falls from SGD over LM, as mu falls, to Gauss-Newton",
            summary, steps, ["gn", *(lms or [None]), "sgd"],
            lambda: _loss_falls(summary, ["sgd", *lms, "gn"])),
        _check(
            f"SGD stalls: its factors of modes 3 to 10 are {_STALL} or more",
            summary, steps, ["sgd"],
            lambda: _within(summary["sgd"], MODES[2:], _STALL, np.inf)),
    ]


def _check(claim, summary, steps, needed, verdict):
    """Return the `Check` of `claim`; `verdict()`, asked if all `needed` ran, gives (held, text)."""
    if None in needed or not set(needed) <= set(summary):
        return Check(claim, "the optimizers or settings that it is about were not run", OPEN)
    stopped = [name for name in needed if summary[name]["stopped_at"]]
    if stopped:
        return Check(claim, f"no longer finite: {', '.join(stopped)}", FAIL)
    if steps < _MIN_STEPS:
        return Check(claim, f"needs --steps {_MIN_STEPS} or more: the transient comes first", OPEN)
    held, text = verdict()
    return Check(claim, text, OPEN if held is None else PASS if held else FAIL)


def _within(row, modes, low, high):
    """Whether the factors of all resolved `modes` lie from `low` to `high`, and what they are."""
    factors = {k: row["decay_per_100_steps"][k] for k in modes}
    resolved = {k: factor for k, factor in factors.items() if not np.isnan(factor)}
    if not resolved:
        return None, f"no mode stands above the rounding floor of {FLOOR:g}"
    text = f"{min(resolved.values()):.3f} to {max(resolved.values()):.3f}"
    outside = [f"mode {k} {f:.3f}" for k, f in resolved.items() if not low <= f <= high]
    floored = [k for k in modes if k not in resolved]
    text += f"; outside: {', '.join(outside)}" if outside else ""
    text += f"; at the rounding floor: {_modes(floored)}" if floored else ""
    return not outside, text


def _loss_falls(summary, chain):
    """Whether the final loss falls along the chain of optimizers, and what it is."""
    losses = [summary[name]["final_loss"] for name in chain]
    text = ", ".join(f"{name} {loss:.3g}" for name, loss in zip(chain, losses, strict=True))
    return bool(np.all(np.diff(losses) < 0)), text


def _ordered(summary, chains):
    """Whether the factor rises along every chain of optimizers, by target mode, and where not."""
    wrong, seen = [], set()
    for k in TARGET_MODES:
        for chain in chains:
            values = {name: summary[name]["decay_per_100_steps"][k] for name in chain}
            if any(np.isnan(list(values.values()))):
                continue
            seen.add(k)
            if any(np.diff(list(values.values())) < 0):
                wrong.append(f"mode {k} ({', '.join(f'{n} {v:.3g}' for n, v in values.items())})")
    if not seen:
        return None, f"no mode stands above the rounding floor of {FLOOR:g}"
    text = f"does not hold in {'; '.join(wrong)}" if wrong else f"holds in {_modes(sorted(seen))}"
    return not wrong, text


def _modes(numbers):
    return f"mode{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


# --- what is shown --------------------------------------------------------------------------------

def picture(runs, summary, settings):
    """Return the figure: error by mode against step, a panel per optimizer; the loss last."""
    labels = {method.name: method.label.replace("mu", "\u03bc") for method in settings.optimizers}
    figure, axes, place = plotting.panels(_title(settings), len(labels) + 1)
    for panel, (name, label) in zip(axes, labels.items(), strict=False):
        curves = {k: np.stack([run.columns[f"mode_{k}"] for run in runs if run.optimizer == name])
                  for k in MODES}
        handles = _draw_modes(panel, curves, settings)
        plotting.name_panel(panel, label, f"{summary[name]['step_ms']:.3g} ms a step")
        panel.set_ylabel("error amplitude, 2 |FFT| / N", fontsize=9)
    plotting.share_log_range(axes[:-1])
    plotting.legend(figure, place, handles)

    for color, (name, label) in zip(cycle(plotting.SEQUENCE), labels.items(), strict=False):
        curves = np.stack([run.columns["loss"] for run in runs if run.optimizer == name])
        plotting.band(axes[-1], curves, color, label)
    plotting.name_panel(axes[-1], "Loss")
    axes[-1].set_ylabel("1/2 sum of squared errors", fontsize=9)
    plotting.share_log_range(axes[-1:])
    axes[-1].legend(fontsize=9, edgecolor="none", framealpha=0.85)
    for panel in axes:
        panel.set_xlim(0, settings.steps)
        panel.set_xlabel("step", fontsize=9)
    return figure


def _draw_modes(panel, curves, settings):
    """Draw one panel from `curves` (mode -> (S, T + 1)); returns the lines of the legend."""
    others = [k for k in MODES if k not in TARGET_MODES]
    greys = np.linspace(0.80, 0.35, len(others))
    for grey, k in zip(greys, others, strict=True):
        grey_line = plotting.band(panel, curves[k], str(grey), width=0.9, fill=0, order=2)
    grey_line.set_label(f"modes {', '.join(map(str, others))}\n(not in the target; light to dark)")
    handles = [
        plotting.band(panel, curves[k], color, f"mode {k}", order=3)
        for color, k in zip(plotting.EMPHASIS, TARGET_MODES, strict=False)
    ]
    handles.append(grey_line)
    if settings.lr < 1:
        step = np.arange(settings.steps + 1)
        handles += panel.plot(
            step, (1 - settings.lr) ** step, color=plotting.INK, linewidth=1.1,
            linestyle=(0, (4, 3)), zorder=4,
            label=f"$(1 - {settings.lr:g})^{{\\mathrm{{step}}}}$  (Gauss-Newton's rate)")
    return handles


def _title(settings):
    net = "-".join(["1", *[str(settings.width)] * settings.hidden_layers, "1"])
    seeds = f"median and range of {_seeds(settings)}" if settings.seeds > 1 else "1 seed"
    return f"Error by Fourier mode: tanh {net}, {POINTS} points, lr {settings.lr:g}, {seeds}"


def _record(settings, summary, adam_ms, checks):
    return {
        "task": _NAME,
        "source": "arXiv 2601.03162, figure 3",
        "settings": {
            "points": POINTS,
            "modes": MODES,
            "dtype": "float64",
            "activation": "tanh",
            "hidden_layers": settings.hidden_layers,
            "width": settings.width,
            "init": "Kaiming uniform, bound sqrt(6 / fan_in); zero biases",
            "batch": "full",
            "steps": settings.steps,
            "lr": settings.lr,
            "backend": settings.backend,
            "threads": settings.threads,
            "floor": FLOOR,
        },
        "seeds": list(range(settings.seeds)),
        "optimizers": {m.name: m.settings(settings.lr, settings.backend)
                       for m in settings.optimizers},
        "columns": {
            "loss": f"1/2 sum of squared errors over the {POINTS} points",
            "mode_k": "2 |rfft(error)_k| / N: amplitude of Fourier mode k of the error",
            "step_seconds": "wall time of optimizer.step(closure) alone; empty at step 0",
        },
        "summary": summary,
        "adam_step_ms": adam_ms,
        "checks": [vars(check) for check in checks],
        "versions": records.versions(),
        "machine": records.machine(),
    }


def _show(settings, summary, adam_ms, checks, folder):
    rows, notes = [], []
    for method in settings.optimizers:
        row = summary[method.name]
        rows.append([
            method.label,
            *(_factor(row, k) for k in TARGET_MODES),
            f"{row['final_loss']:.2e}",
            f"{row['step_ms']:.3f}",
            f"{row['step_ms'] / adam_ms:.1f}",
        ])
        stopped = row["stopped_at"]
        if stopped:
            notes.append(f"{method.label}: {len(stopped)} of {_seeds(settings)} ended early, "
                         f"no longer finite at step {min(stopped.values())} or later")
    terminal.show_table(
        f"{_NAME}: factor by which each mode of the error falls per 100 steps\n"
        f"(second half of {settings.steps} steps; median of {_seeds(settings)})",
        ["optimizer", *(f"mode {k}" for k in TARGET_MODES), "final loss", "ms/step", "x Adam"],
        rows,
        [f"ms per Adam step on the same network: {adam_ms:.3f}", *notes],
    )
    terminal.show_checks(checks)
    terminal.show_files(folder / f"{_NAME}.{kind}" for kind in ("png", "csv", "json"))


def _factor(row, k):
    value = row["decay_per_100_steps"][k]
    if np.isnan(value):
        return "ended" if row["stopped_at"] else "floor"
    return f"{value:.3f}"


def _seeds(settings):
    return "1 seed" if settings.seeds == 1 else f"{settings.seeds} seeds"
