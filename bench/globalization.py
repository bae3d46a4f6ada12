"""Which damping rule, which acceleration: steps, solves and seconds over the tasks. `python bench/globalization.py`.

Every variant trains from the same weights, one step each in turn, one thread. The target of a seed is the loss at which plain
"gain-ratio" ends its budget of steps; the others may take half as many more. Seconds are processor seconds in `step`, which on
an idle machine are wall-clock seconds. Writes globalization.json, .md and .png into --output.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pgdfast
from bench import poisson_2d
from pgdfast_experiments import (
    mnist_data,
    modular_mlp,
    plotting,
    poisson_pinn,
    polynomial,
    regression_1d,
    regression_2d,
    transformer,
)
from pgdfast_experiments.models import relu_mlp, tanh_mlp

VARIANTS = {
    f"{rule}{' + ' + acceleration if acceleration else ''}": {"damping_rule": rule, "acceleration": acceleration}
    for rule in ("gain-ratio", "delayed") for acceleration in (None, "geodesic", "chord")
} | {"sweep": {"damping_rule": "sweep", "acceleration": None}}
BASE = "gain-ratio"
LEVELS = (1e-4, 1e-5, 1e-6, 1e-7)


@dataclass(frozen=True)
class Task:
    """make: seed -> (module, closure, error or None). steps: budget of plain gain-ratio. accelerates: no cross-entropy."""

    what: str
    make: object
    steps: int
    seeds: int = 5
    options: tuple = ()
    accelerates: bool = True


def regression(task, inputs):
    def make(seed):
        model, (x, u) = tanh_mlp(inputs, 80, 2, 1, seed), task.data()
        return model, lambda: model(x) - u, None

    return make


def pinn(seed):
    model, (interior, boundary) = tanh_mlp(2, poisson_pinn.WIDTH, 1, 1, seed), poisson_pinn.points(seed)
    return model, lambda: poisson_pinn.residuals(model, interior, boundary, 2.0), None


def modular(seed):
    model, ((x, y), _) = modular_mlp.QuadraticNetwork(13, 50, 1.0, seed, torch.float64), modular_mlp.data(seed, 13)
    return model, lambda: model(x) - y, None


def nearly_linear(seed):
    model, ((x, y), _, _) = polynomial.PolynomialNetwork(1.0, 0.25, seed, torch.float64), polynomial.data(seed)
    return model, lambda: model(x) - y, None


def attention(seed):
    model = transformer.Transformer(25, 32, 4, 2, 4, seed, torch.float32)
    (tokens, answers), _ = transformer.data(seed, 23)
    return model, lambda: F.cross_entropy(model(tokens), answers), None


def digits(seed):
    model = relu_mlp((784, 250, 10), 1.0, seed)
    if os.environ.get("PGDFAST_DATA"):
        data = mnist_data.train_and_test(None, 200, seed)
        x, labels = data.train_images, data.train_labels
    else:
        generator = torch.Generator().manual_seed(seed)
        x, labels = torch.rand(200, 784, generator=generator), torch.randint(10, (200,), generator=generator)
    targets = F.one_hot(labels, 10).to(x.dtype)
    return model, lambda: F.mse_loss(model(x), targets), None


PIXELS = "real digits" if os.environ.get("PGDFAST_DATA") else "random pixels"
TASKS = {
    "A": Task("tanh 1-80-80-1, 100 residuals", regression(regression_1d, 1), 60),
    "B": Task("tanh 2-80-80-1, 400 residuals", regression(regression_2d, 2), 25),
    "C": Task("PINN 2-256-1, 680 residuals", pinn, 30, 2),
    "D": Task("quadratic 26-50-13, a + b mod 13 (full: mod 23, a second a step)", modular, 12, 2),
    "E": Task("polynomial 100-500, 550 residuals", nearly_linear, 15, 2),
    "F": Task("transformer of width 32, a + b mod 23, cross-entropy, CG (full: width 128, mod 97)", attention, 10, 2,
              (("solver", "cg"),), accelerates=False),
    "G": Task(f"ReLU 784-250-10, 200 images, {PIXELS}, mean square, float32", digits, 12, 2),
    "poisson-2d small": Task("PINN 2-64-1, fused Laplacian", lambda seed: poisson_2d.problem(poisson_2d.SMALL, seed), 100),
    "poisson-2d large": Task("PINN 2-64-64-48-48-1, fused Laplacian", lambda seed: poisson_2d.problem(poisson_2d.LARGE, seed),
                             40, 2),
}


class Runner:
    """One variant on one task: the loss, solves, seconds and (where there is one) error after every step."""

    def __init__(self, task, seed, options):
        module, self._closure, self._error = task.make(seed)
        self.optimizer = pgdfast.LM(module.parameters(), **options, **dict(task.options))
        self.losses, self.errors, self.solves, self.seconds = [], [], [], []
        self._solves, self._spent, self.over = 0, 0.0, False

    def step(self):
        """Take a step, unless the last ones changed nothing."""
        start = time.process_time()
        self.optimizer.step(self._closure)
        self._spent += time.process_time() - start
        report = self.optimizer.report
        self._solves += report.attempts
        self.losses.append(report.loss_after)
        self.solves.append(self._solves)
        self.seconds.append(self._spent)
        self.errors.append(self._error() if self._error else None)
        self.over = report.finished or (len(self.losses) > 5 and self.losses[-1] == self.losses[-6])

    def reaching(self, values, level):
        """(steps, solves, seconds) until `values` is at most `level`, or None."""
        for k, value in enumerate(values):
            if value <= level:
                return k + 1, self.solves[k], self.seconds[k]
        return None


def study(name, task, seed):
    """Train all variants in turn; {variant: figures}."""
    variants = {v: o for v, o in VARIANTS.items() if task.accelerates or o["acceleration"] is None}
    runners = {v: Runner(task, seed, o) for v, o in variants.items()}
    for step in range(task.steps * 3 // 2):
        target = runners[BASE].losses[-1] if step >= task.steps or runners[BASE].over else -math.inf
        going = [r for v, r in runners.items()
                 if not r.over and not (v == BASE and step >= task.steps) and not (r.losses and r.losses[-1] <= target)]
        if not going:
            break
        for runner in going:
            runner.step()
    target = min(runners[BASE].losses)
    found = {}
    for variant, r in runners.items():
        levels = {f"{level:.0e}": r.reaching(r.errors, level) for level in LEVELS} if r.errors[-1] is not None else {}
        found[variant] = {"target": target, "reached": r.reaching(r.losses, target), "loss": min(r.losses),
                          "steps": len(r.losses), "seconds": r.seconds[-1], "error_levels": levels,
                          "curve": [r.seconds, r.losses]}
        reached = found[variant]["reached"]
        print(f"  {name}, seed {seed}, {variant:22}: {reached}, loss {min(r.losses):.1e} {levels or ''}", flush=True)
    return found


def middle(values):
    """The median, a missing value counting as larger than all; None where that is the middle."""
    found = statistics.median_high([math.inf if v is None else v for v in values])
    return None if math.isinf(found) else found


def summary(results):
    """{task: {variant: medians of steps, solves and seconds, and ratios of steps and seconds to the base's, by seed}}."""
    table = {}
    for name, seeds in results.items():
        table[name] = {}
        for variant in seeds[0]:
            pairs = [(s[variant]["reached"], s[BASE]["reached"]) for s in seeds]
            row = {key: middle([r and r[k] for r, _ in pairs]) for k, key in enumerate(("steps", "solves", "seconds"))}
            row["over"] = middle([r and r[2] / b[2] for r, b in pairs])
            row["over_steps"] = middle([r and r[0] / b[0] for r, b in pairs])
            row["levels"] = {level: [middle([s[variant]["error_levels"][level] and s[variant]["error_levels"][level][k]
                                             for s in seeds]) for k in (0, 2)]
                             for level in seeds[0][variant]["error_levels"]}
            table[name][variant] = row
    return table


def shown(value, form=".3g"):
    return "-" if value is None else format(value, form)


def markdown(table, counts):
    """The tables as text."""
    lines = ["| task (seeds) | " + " | ".join(VARIANTS) + " |", "|---|" + "---|" * len(VARIANTS)]
    for name, rows in table.items():
        cells = [f"{shown(r['steps'])} / {shown(r['solves'])} / {shown(r['seconds'])} ({shown(r['over'], '.2f')})"
                 if (r := rows.get(variant)) else "" for variant in VARIANTS]
        lines.append(f"| {name} ({counts[name]}) | " + " | ".join(cells) + " |")
    for name, rows in table.items():
        if any(row["levels"] for row in rows.values()):
            lines += ["", f"{name}: steps (seconds) to an error of", "", "| variant | " + " | ".join(f"{v:.0e}" for v in LEVELS)
                      + " |", "|---|" + "---|" * len(LEVELS)]
            for variant, row in rows.items():
                cells = [f"{shown(steps)} ({shown(seconds)})" for steps, seconds in row["levels"].values()]
                lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(path, results):
    """Loss against seconds, a panel a task, the first seed."""
    colors = dict(zip(VARIANTS, ("#111111", "#E69F00", "#0072B2", "#999999", "#CC79A7", "#D55E00", "#009E73"), strict=True))
    figure, axes, place = plotting.panels("Loss against seconds of one thread, seed 0", len(results), columns=3)
    for panel, (name, seeds) in zip(axes, results.items(), strict=True):
        for variant, found in seeds[0].items():
            seconds, losses = found["curve"]
            panel.plot(seconds, losses, color=colors[variant], label=variant, linewidth=1.5,
                       linestyle="--" if variant.startswith("gain") else "-")
        plotting.name_panel(panel, name)
        plotting.log_axis(panel, "y")
        plotting.log_axis(panel, "x")
    handles = [axes[0].plot([], [], color=c, linestyle="--" if v.startswith("gain") else "-", label=v)[0]
               for v, c in colors.items()]
    plotting.legend(figure, place, handles)
    figure.savefig(path)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)} (default: all)")
    parser.add_argument("--output", type=Path, default=Path("bench-results"))
    parser.add_argument("--seeds", type=int, help="at most so many")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.tasks if name not in TASKS]
    if unknown:
        parser.error(f"unknown task {unknown[0]!r}; use {', '.join(TASKS)}")
    torch.set_num_threads(1)
    given.output.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in given.tasks or TASKS:
        task = TASKS[name]
        print(f"{name}: {task.what}, {task.steps} steps", flush=True)
        results[name] = [study(name, task, seed) for seed in range(min(task.seeds, given.seeds or task.seeds))]
        write(given.output, results)   # an interrupted study keeps the tasks that it has done
    print((given.output / "globalization.md").read_text(encoding="utf-8"))


def write(folder, results):
    """The tables, all figures and the picture of the tasks done so far."""
    table = summary(results)
    (folder / "globalization.md").write_text(markdown(table, {n: len(seeds) for n, seeds in results.items()}), encoding="utf-8")
    whole = {"tasks": {n: TASKS[n].what for n in results}, "summary": table, "runs": results}
    (folder / "globalization.json").write_text(json.dumps(whole), encoding="utf-8")
    draw(folder / "globalization.png", results)


if __name__ == "__main__":
    main()
