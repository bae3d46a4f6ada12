"""What `regression-1d` and `regression-2d` share: least squares by plain methods, the error followed by Fourier mode.

What to expect, from the flows of the linearized model, with e the error and lambda_i the eigenvalues of J J^T:

    gradient descent   d e_i/dt = -lambda_i e_i                     where lambda_i is small: stalls
    LM                 d e_i/dt = -lambda_i / (mu + lambda_i) e_i   in between
    Gauss-Newton       d e_i/dt = -e_i                              all modes fall alike

so that under Gauss-Newton every mode falls by (1 - lr)^100 per 100 steps (arXiv 2601.03162, section 2).

Index legend: N points, K modes shown, T steps, S seeds.
"""

from dataclasses import dataclass
from functools import partial
from itertools import cycle

import numpy as np
import torch

from pgdfast_experiments import options, plotting
from pgdfast_experiments.experiment import Table, check
from pgdfast_experiments.measures import FAIL, FLOOR, Check, decay_per_100, median_of_resolved
from pgdfast_experiments.models import tanh_mlp
from pgdfast_experiments.training import Case, Member, Session, adam_step_ms, backward_closure, every

KNOWN = ("sgd", "adam", "gn", "lm-MU")
RATES = {"sgd": 1e-2, "adam": 1e-2, "lm": 1e-2}

_GN_RATE_BAND = (0.937, 1.073)
"""Of the rate -100 ln(1 - lr): at lr 1e-2, factors from 0.34 to 0.39."""

_STALL = 0.9
"""A mode that keeps this much of itself per 100 steps has stalled (some even grow)."""

_MIN_STEPS = 200
"""Shorter runs end within the transient, and are not judged."""


@dataclass(frozen=True)
class Spectrum:
    """A regression and its Fourier modes.

    name: of the task. data: function returning inputs (N, D) and targets (N, 1), float64. amplitudes: function of the
    error (N,) returning the amplitude of each mode. modes: their names, in order. targets: those that the target has.
    """

    name: str
    data: object
    amplitudes: object
    modes: tuple
    targets: tuple

    @property
    def columns(self):
        """Names of the measured quantities."""
        return ("loss", *(f"mode_{k}" for k in self.modes))

    def network(self, settings, seed, dtype=torch.float64):
        """Return the seed's tanh network."""
        inputs = self.data()[0].shape[1]
        return tanh_mlp(inputs, settings.width, settings.hidden_layers, 1, seed, dtype)

    def cases(self, settings):
        """Return every run to be made, seed by seed."""
        return [
            Case(method.name, "", seed, settings.steps, lambda method=method, seed=seed: self._start(method, seed, settings),
                 together=method.together)
            for seed in range(settings.seeds) for method in settings.optimizers
        ]

    def _start(self, method, seed, settings):
        x, u = self.data()
        model = self.network(settings, seed)

        def residual():
            return model(x) - u

        def measure():
            with torch.no_grad():
                error = residual()[:, 0].numpy()
            return 0.5 * error @ error, *self.amplitudes(error)

        rows = every(settings.steps, 1)
        build = partial(method.build, lr=settings.rate(method), backend=settings.backend)
        if method.second_order:
            member = Member(lambda network, x, u: network(x) - u, lambda step: (x, u), build)
            return Session(model, *member.alone(model), measure, self.columns, rows, member=member)
        optimizer = build(model.parameters())
        closure = backward_closure(optimizer, lambda: residual().square().mean() / 2)
        return Session(model, optimizer, lambda step: closure, measure, self.columns, rows)

    def extra(self, settings):
        """Return the time of an Adam step on the same network, for the table."""
        x, u = self.data()
        times = [
            adam_step_ms(self.network(settings, seed), lambda twin: twin(x) - u, 1e-2) for seed in range(settings.seeds)
        ]
        return {"adam_step_ms": float(np.median(times))}

    def summarize(self, runs, settings):
        """Return, by optimizer: decay and final amplitude of each mode, final loss, time of a step.

        Decay is the factor per 100 steps over the second half of the run (`measures.decay_per_100`). A
        mode is resolved where its amplitude stands above the rounding floor there, whether the target
        has the mode or only the network's first output brought it in; it counts when most seeds resolve
        it, and is NaN otherwise.
        """
        summary = {}
        for name in dict.fromkeys(run.optimizer for run in runs):
            mine = [run for run in runs if run.optimizer == name]
            decay = {k: [decay_per_100(run.columns[f"mode_{k}"]) for run in mine] for k in self.modes}
            summary[name] = {
                "decay_per_100_steps": {k: median_of_resolved(decay[k]) for k in self.modes},
                "decay_per_100_steps_by_seed": decay,
                "final_amplitude": {
                    k: float(np.median([run.columns[f"mode_{k}"][-1] for run in mine])) for k in self.modes
                },
                "final_loss": float(np.median([run.columns["loss"][-1] for run in mine])),
                "step_ms": float(np.median([run.step_ms for run in mine])),
                "stopped_at": {run.seed: run.stopped_at for run in mine if run.stopped_at is not None},
            }
        return summary

    def judge(self, summary, settings):
        """Return the checks, from the numbers in `summary` (of `summarize`) alone.

        Under LM a single mode does not fall as an exponential: it dips where its error changes sign and
        bends as the network's features change, so the order of single modes depends on the number of
        steps. That of the loss, which holds all modes together, does not. Both are judged.
        """
        lr = settings.lr or RATES["lm"]
        fall = max(1 - lr, 0.0) ** 100  # from lr 1 on there is no rate to speak of
        low, high = (fall**rate for rate in reversed(_GN_RATE_BAND))
        lms = sorted((name for name in summary if name.startswith("lm-")),
                     key=lambda name: -float(name.removeprefix("lm-")))
        slow = [k for k in self.modes if k not in self.modes[:2]]

        def verdict(claim, needed, held):
            stopped = [name for name in needed if name in summary and summary[name]["stopped_at"]]
            if stopped:
                return Check(claim, f"no longer finite: {', '.join(stopped)}", FAIL)
            return check(claim, summary, needed, held, settings.steps >= _MIN_STEPS,
                         f"needs --steps {_MIN_STEPS} or more: the transient comes first")

        return [
            verdict(
                f"Gauss-Newton's factor is (1 - {lr:g})^100 = {fall:.3g} in every mode "
                f"({low:.2g}-{high:.2g})" if lr < 1 else "Gauss-Newton has one factor for every mode",
                ["gn"] if lr < 1 else [None], lambda: _within(summary["gn"], self.modes, low, high)),
            verdict("LM's factors lie between Gauss-Newton's and SGD's", ["gn", *(lms or [None]), "sgd"],
                    lambda: self._ordered(summary, [["gn", lm, "sgd"] for lm in lms])),
            verdict("LM's factors are nearer to Gauss-Newton's as mu falls", lms if len(lms) > 1 else [None],
                    lambda: self._ordered(summary, [lms[::-1]])),
            verdict("the loss at the end falls from SGD over LM, as mu falls, to Gauss-Newton",
                    ["gn", *(lms or [None]), "sgd"], lambda: _loss_falls(summary, ["sgd", *lms, "gn"])),
            verdict(f"SGD stalls: its factors of modes {slow[0]} to {slow[-1]} are {_STALL} or more", ["sgd"],
                    lambda: _within(summary["sgd"], slow, _STALL, np.inf)),
        ]

    def _ordered(self, summary, chains):
        """Whether the factor rises along every chain of optimizers, by target mode, and where not."""
        wrong, seen = [], []
        for k in self.targets:
            for chain in chains:
                values = {name: summary[name]["decay_per_100_steps"][k] for name in chain}
                if any(np.isnan(list(values.values()))):
                    continue
                seen.append(k)
                if any(np.diff(list(values.values())) < 0):
                    wrong.append(f"mode {k} ({', '.join(f'{n} {v:.3g}' for n, v in values.items())})")
        if not seen:
            return None, f"no mode stands above the rounding floor of {FLOOR:g}"
        text = f"does not hold in {'; '.join(wrong)}" if wrong else f"holds in {_modes(list(dict.fromkeys(seen)))}"
        return not wrong, text

    # --- what is shown

    def table(self, summary, settings):
        """Return the table of factors by mode."""
        adam_ms = summary["adam_step_ms"]
        rows, notes = [], [f"ms per Adam step on the same network: {adam_ms:.3f}"]
        for method in settings.optimizers:
            row = summary[method.name]
            rows.append([
                method.label, *(_factor(row, k) for k in self.targets),
                f"{row['final_loss']:.2e}", f"{row['step_ms']:.3f}", f"{row['step_ms'] / adam_ms:.1f}",
            ])
            stopped = row["stopped_at"]
            if stopped:
                notes.append(f"{method.label}: {len(stopped)} of {plotting.seeds(settings.seeds)} ended early, "
                             f"no longer finite at step {min(stopped.values())} or later")
        return Table(
            f"{self.name}: factor by which each mode of the error falls per 100 steps\n"
            f"(second half of {settings.steps} steps; median of {plotting.seeds(settings.seeds)})",
            ["optimizer", *(f"mode {k}" for k in self.targets), "final loss", "ms/step", "x Adam"], rows, notes,
        )

    def picture(self, runs, summary, settings, title):
        """Return the figure: error by mode against step, a panel per optimizer; the loss last."""
        labels = {method.name: plotting.math(method.label) for method in settings.optimizers}
        figure, axes, place = plotting.panels(title, len(labels) + 1)
        for panel, (name, label) in zip(axes, labels.items(), strict=False):
            handles = self._draw_modes(panel, runs, name, settings)
            plotting.name_panel(panel, label, f"{summary[name]['step_ms']:.3g} ms a step")
            panel.set_ylabel("error amplitude", fontsize=9)
        plotting.share_log_range(axes[:-1])
        plotting.legend(figure, place, handles)
        for color, (name, label) in zip(cycle(plotting.SEQUENCE), labels.items(), strict=False):
            plotting.band(axes[-1], *plotting.of(runs, "loss", name), color, label)
        plotting.name_panel(axes[-1], "Loss")
        axes[-1].set_ylabel("1/2 sum of squared errors", fontsize=9)
        plotting.share_log_range(axes[-1:])
        axes[-1].legend(fontsize=9, edgecolor="none", framealpha=0.85)
        for panel in axes:
            panel.set_xlim(0, settings.steps)
            panel.set_xlabel("step", fontsize=9)
        return figure

    def _draw_modes(self, panel, runs, name, settings):
        """Draw one panel; returns the lines of the legend."""
        others = [k for k in self.modes if k not in self.targets]
        for grey, k in zip(np.linspace(0.80, 0.35, len(others)), others, strict=True):
            grey_line = plotting.band(panel, *plotting.of(runs, f"mode_{k}", name), str(grey), width=0.9, fill=0)
        grey_line.set_label(f"modes {', '.join(map(str, others))}\n(not in the target; light to dark)")
        handles = [
            plotting.band(panel, *plotting.of(runs, f"mode_{k}", name), color, f"mode {k}", order=3)
            for color, k in zip(plotting.EMPHASIS, self.targets, strict=False)
        ]
        handles.append(grey_line)
        lr = settings.lr or RATES["lm"]
        if lr < 1:
            step = np.arange(settings.steps + 1)
            handles += panel.plot(step, (1 - lr) ** step, color=plotting.INK, linewidth=1.1, linestyle=(0, (4, 3)), zorder=4,
                                  label=f"$(1 - {lr:g})^{{\\mathrm{{step}}}}$  (Gauss-Newton's rate)")
        return handles


def add_options(parser):
    """Add the options of both tasks to `parser`."""
    parser.add_argument("--hidden-layers", type=options.whole_number(1), default=2, metavar="N",
                        help="hidden layers of the network (default: %(default)s)")
    parser.add_argument("--width", type=options.whole_number(1), default=80, metavar="N",
                        help="units in each hidden layer (default: %(default)s)")


def title(kind, settings, inputs, points):
    """Return the picture's title."""
    net = "-".join([str(inputs), *[str(settings.width)] * settings.hidden_layers, "1"])
    rate = settings.lr or RATES["lm"]
    return f"{kind}: tanh {net}, {points} points, lr {rate:g}, {plotting.of_seeds(settings.seeds)}"


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


def _modes(numbers):
    return f"mode{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _factor(row, k):
    value = row["decay_per_100_steps"][k]
    if np.isnan(value):
        return "ended" if row["stopped_at"] else "floor"
    return f"{value:.3f}"
