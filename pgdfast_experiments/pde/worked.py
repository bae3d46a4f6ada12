"""What the worked problems share: one race by the clock between optimizers, and what is made of it.

Every optimizer gets the same closure's residuals, full batch, and the same seconds in steps; measuring the error
stops the clock. LM ends early where it has what is asked (half the smallest error asked for), or where it has converged.
Adam's learning rate falls from its start by 1,000, exponentially, over the seconds; L-BFGS is PyTorch's with strong Wolfe
line search and the last 100 pairs, and stops at nothing but the clock.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pgdfast_experiments import options, plotting, processes
from pgdfast_experiments.experiment import Table, check
from pgdfast_experiments.measures import Check
from pgdfast_experiments.pde import pictures
from pgdfast_experiments.training import Case, Session, backward_closure

KNOWN = ("adam", "lbfgs", "lm", "lm-MU")
RATES = {"adam": 1e-2, "lbfgs": 1.0, "lm": 1.0}
DEFAULTS = {"optimizers": "adam,lbfgs,lm", "steps": 1_000_000, "seeds": 5, "threads": 1}
LBFGS = {"max_iter": 20, "history_size": 100, "line_search_fn": "strong_wolfe", "tolerance_grad": 0.0, "tolerance_change": 0.0}
LM = {"damping_rule": "delayed", "acceleration": "chord", "damping": 1e-2}
DTYPES = {"float64": torch.float64, "float32": torch.float32}
_ADAM_FALL = 1e-3


@dataclass(frozen=True)
class Trial:
    """A problem and the network that is to solve it, made from a seed.

    model: holds what is trained. residuals: function of nothing, returning tensors r with the loss 1/2 sum r^2, weights and
    means in them: LM's closure. solution: function of points (N, 2) returning the network's u there, (N, 1). error: function
    of nothing, returning the distance from the reference as a number. coefficient: of an inverse problem, the number that is
    sought, as it stands.
    """

    model: torch.nn.Module
    residuals: Callable
    solution: Callable
    error: Callable
    coefficient: Callable | None = None


@dataclass(frozen=True)
class Goal:
    """An error asked of LM, the seconds that it may take, and where: in which variant, in which column."""

    error: float
    seconds: float
    variant: str = ""
    column: str = "error"
    label: str = "error"


@dataclass(frozen=True)
class Worked:
    """A worked problem; its methods are those that `tasks` asks of a task.

    Attributes:
        name: of the task.
        title: of its pictures.
        make: function of (seed, variant, dtype) returning a `Trial`.
        grid: where solution and error are drawn, a `pictures.Grid`.
        measure: what the error is, in words.
        goals: errors asked of LM.
        variants: function of the settings, returning their names; the first is the one that all optimizers run, unless
            `for_all` says otherwise of a name.
        for_all: function of (variant, settings): whether first-order optimizers run it too.
        lm: options of pgdfast.LM that the problem sets.
        published: rows for the table, (run, {error: seconds}, best error), with the line that says where they are from.
        truth: of an inverse problem, the coefficient.

    """

    name: str
    title: str
    make: Callable
    grid: object
    measure: str
    goals: tuple[Goal, ...]
    variants: Callable = lambda settings: ("",)
    for_all: Callable = lambda variant, settings: True
    lm: dict | None = None
    published: tuple = ()
    published_note: str = ""
    truth: float | None = None

    @property
    def columns(self):
        """Names of the measured quantities."""
        return ("loss", "error") if self.truth is None else ("loss", "error", "coefficient", "coefficient_error")

    @staticmethod
    def add_options(parser):
        """Add the options of every worked problem to `parser`."""
        parser.add_argument("--seconds", type=options.positive_number, metavar="S",
                            help="time in steps that every optimizer gets; LM may end earlier")
        parser.add_argument("--dtype", choices=tuple(DTYPES), default="float64", help="precision (default: %(default)s)")

    def cases(self, settings):
        """Return every run to be made."""
        return [
            Case(method.name, variant, seed, settings.steps_of(method),
                 lambda method=method, variant=variant, seed=seed: self._start(method, variant, seed, settings),
                 budget(settings, variant))
            for seed in range(settings.seeds) for variant in self.variants(settings) for method in settings.optimizers
            if method.kind == "lm" or self.for_all(variant, settings)
        ]

    def _start(self, method, variant, seed, settings):
        trial = self.make(seed, variant, DTYPES[settings.dtype])
        rate = settings.rate(method)
        own = {"lm": {**LM, **(self.lm or {})}, "lbfgs": LBFGS, "adam": {}}[method.kind]
        if processes.group() is not None:   # of LM alone
            own["process_group"] = processes.group()
        optimizer = method.build(trial.model.parameters(), rate, settings.backend, **own)

        def measure():
            with torch.no_grad():
                row = processes.total(0.5 * sum(float(r.square().sum()) for r in trial.residuals())), trial.error()
            if self.truth is None:
                return row
            coefficient = trial.coefficient()
            return *row, coefficient, abs(coefficient / self.truth - 1)

        def slower(share):
            for group in optimizer.param_groups:
                group["lr"] = rate * _ADAM_FALL**share

        if method.second_order:
            closure, done = trial.residuals, lambda row: self._done(variant, row, optimizer)
        else:
            closure = backward_closure(optimizer, lambda: 0.5 * sum(r.square().sum() for r in trial.residuals()))
            done = lambda row: False  # noqa: E731

        def outcome():
            with torch.no_grad():
                return {"solution": trial.solution(self.grid.points(DTYPES[settings.dtype])).reshape(self.grid.shape).double()}

        return Session(trial.model, optimizer, lambda step: closure, measure, self.columns, None, done,
                       slower if method.kind == "adam" else lambda share: None, outcome, processes.of_first)

    def _done(self, variant, row, lm):
        """Whether LM has what is asked of this variant, or nothing more to gain."""
        asked = [(goal.column, goal.error) for goal in self.goals if goal.variant == variant]
        if self.truth is None and asked and all(row[column] <= 0.5 * error for column, error in asked):
            return True
        return lm.report is not None and lm.report.finished

    def summarize(self, runs, settings):
        """Return, by optimizer and variant: errors, seconds, steps, and the seconds to each error that is asked."""
        summary = {}
        for variant in self.variants(settings):
            ends = [run.seconds[-1] for run in runs if run.variant == variant and run.optimizer.startswith("lm")]
            until = float(np.median(ends)) if ends else math.inf
            for method in settings.optimizers:
                mine = [run for run in runs if (run.optimizer, run.variant) == (method.name, variant)]
                if mine:
                    summary[named(method.name, variant)] = self._numbers(mine, math.inf if method.kind == "lm" else until)
        return summary

    def _numbers(self, mine, until):
        levels = sorted({goal.error for goal in self.goals if goal.column == "error"}, reverse=True)
        found = {
            "error": median([run.columns["error"][-1] for run in mine]),
            "error_by_seed": [float(run.columns["error"][-1]) for run in mine],
            "error_at_lm_seconds": median([last_at(run, "error", until) for run in mine]),
            "seconds_to": {f"{level:g}": median([seconds_to(run, "error", level) for run in mine]) for level in levels},
            "seconds_to_by_seed": {f"{level:g}": [seconds_to(run, "error", level) for run in mine] for level in levels},
            "loss": median([run.columns["loss"][-1] for run in mine]),
            "seconds": median([run.seconds[-1] for run in mine]),
            "steps": int(np.median([run.last for run in mine])),
            "step_ms": float(np.median([run.step_ms for run in mine])),
            "stopped_at": {run.seed: run.stopped_at for run in mine if run.stopped_at is not None},
        }
        if self.truth is not None:
            found |= {
                "coefficient": median([run.columns["coefficient"][-1] for run in mine]),
                "coefficient_by_seed": [float(run.columns["coefficient"][-1]) for run in mine],
                "coefficient_error": median([run.columns["coefficient_error"][-1] for run in mine]),
                "coefficient_error_at_lm_seconds": median([last_at(run, "coefficient_error", until) for run in mine]),
            }
        return found

    def judge(self, summary, settings):
        """Return the checks, from the numbers in `summary` (of `summarize`) alone."""
        lm = next((method.name for method in settings.optimizers if method.kind == "lm"), None)
        checks = []
        for goal in self.goals:
            if goal.variant in self.variants(settings):
                checks.append(self._reached(goal, summary, settings, lm))
        for variant in self.variants(settings):
            if self.for_all(variant, settings):
                checks.append(self._ahead(variant, summary, settings, lm))
        return checks

    def _reached(self, goal, summary, settings, lm) -> Check:
        mine = lm and named(lm, goal.variant)

        def verdict():
            row = summary[mine]
            if goal.column == "error":
                took = row["seconds_to"][f"{goal.error:g}"]
                text = f"{took:.3g} s" if math.isfinite(took) else f"not in {row['seconds']:.3g} s: {row['error']:.1e}"
                return took <= goal.seconds, text
            return row[goal.column] <= goal.error, f"{row[goal.column]:.1e} after {row['seconds']:.3g} s"

        where = f" ({goal.variant})" if goal.variant else ""
        claim = f"LM's {goal.label}{where} is below {goal.error:g} within {goal.seconds:g} s"
        enough = budget(settings, goal.variant) >= goal.seconds or (mine in summary and verdict()[0])
        return check(claim, summary, [mine], verdict, enough, f"needs {goal.seconds:g} seconds")

    def _ahead(self, variant, summary, settings, lm) -> Check:
        column = "error" if self.truth is None else "coefficient_error"
        others = [method.name for method in settings.optimizers if method.kind != "lm"]
        where = f" ({variant})" if variant else ""

        def verdict():
            best = summary[named(lm, variant)][column]
            rest = {name: summary[named(name, variant)][f"{column}_at_lm_seconds"] for name in others}
            text = ", ".join(f"{label(name)} {value:.1e}" for name, value in rest.items())
            return best < min(rest.values()), f"LM {best:.1e}; after as many seconds {text}"

        needed = [named(name, variant) for name in others] + [lm and named(lm, variant)]
        return check(f"LM ends{where} more accurate than Adam and L-BFGS after the same seconds", summary,
                     needed if others else [None], verdict)

    def table(self, summary, settings):
        """Return the table: seconds to the errors that are asked, errors at the end; published ones below."""
        levels = sorted({goal.error for goal in self.goals if goal.column == "error"}, reverse=True)
        inverse = self.truth is not None
        rows = []
        for variant in self.variants(settings):
            for method in settings.optimizers:
                row = summary.get(named(method.name, variant))
                if row is None:
                    continue
                rows.append([", ".join(filter(None, (variant, method.label))),
                             *(shown(row["seconds_to"][f"{level:g}"]) for level in levels),
                             *([f"{row['coefficient']:.5g}", f"{row['coefficient_error']:.1e}"] if inverse else []),
                             f"{row['error']:.1e}", f"{row['error_at_lm_seconds']:.1e}", f"{row['seconds']:.3g}",
                             f"{row['steps']:,}"])
        if self.published:
            rows.append(["published:", *[""] * (len(levels) + 4)])
        for name, times, best in self.published:
            rows.append([name, *(shown(times.get(level, math.inf)) for level in levels), f"{best:.1e}", "", "", ""])
        notes = [f"error: {self.measure}", "at LM's end: the error after as many seconds as LM took",
                 "seconds: start to finish of the loop, less the time that measuring took"]
        if levels:
            notes.insert(1, "1e-..: seconds to that error, a dash where it was not reached")
        if self.published_note:
            notes.append(self.published_note)
        return Table(
            f"{self.name}: median of {plotting.seeds(settings.seeds)}, {settings.dtype}, full batch",
            ["run", *(f"{level:.0e}" for level in levels), *(["coefficient", "off by"] if inverse else []), "error",
             "at LM's end", "seconds", "steps"], rows, notes)

    def pictures(self, runs, summary, settings):
        """Return the pictures by file suffix, with their captions."""
        figure = pictures.draw(self, runs, settings)
        what = "the coefficient's relative error" if self.truth is not None else "the error"
        return {"": (figure, f"LM's solution and |LM's - reference| for the seed of median error; {what} against seconds, one "
                             "line per seed, that of the median strong.")}

    def describe(self, settings, **own):
        """Return what the options leave fixed, for the record; `own` is the task's part."""
        return {
            **own, "dtype": settings.dtype, "batch": "full", "error": self.measure,
            "loss": "1/2 sum of squares of the residuals, weights and means in them, for every optimizer",
            "LM": {**LM, **(self.lm or {})}, "L-BFGS": LBFGS,
            "Adam": f"the learning rate falls exponentially by {_ADAM_FALL:g} over the seconds",
            "seconds": {variant or "all": budget(settings, variant) for variant in self.variants(settings)},
            "columns": {"loss": "as above", "error": self.measure,
                        "seconds": "wall time spent in optimizer.step(closure) so far"},
        }


def budget(settings, variant):
    """Return the seconds that a variant's runs get; a dict gives them by the variant's first word."""
    seconds = settings.seconds
    return seconds[variant.split()[0]] if isinstance(seconds, dict) else seconds


def named(optimizer, variant):
    """Return the name of a run in summaries."""
    return " ".join(filter(None, (optimizer, variant)))


def label(name):
    """Return a first-order optimizer's name in words."""
    return {"adam": "Adam", "lbfgs": "L-BFGS"}.get(name, name)


def shown(seconds):
    """Return a time as text, a dash where there is none."""
    return f"{seconds:.3g}" if math.isfinite(seconds) else "-"


def median(values):
    """Return the median, counting what is no number as infinite."""
    values = np.asarray(values, dtype=float)
    return float(np.median(np.where(np.isnan(values), np.inf, values)))


def seconds_to(run, column, level):
    """Return the time in steps until a column was first at most `level`; infinite if it never was."""
    hits = np.flatnonzero(run.columns[column] <= level)
    return float(run.seconds[hits[0]]) if hits.size else math.inf


def last_at(run, column, seconds):
    """Return the last value of a column that was measured within `seconds`."""
    return float(run.columns[column][np.flatnonzero(run.seconds <= seconds)[-1]])


def relative_l2(solution, points, truth):
    """Return the function of nothing that gives ||u - truth|| / ||truth|| over points (N, 2); truth (N, 1)."""
    norm = float(truth.norm())

    def error():
        with torch.no_grad():
            return float((solution(points) - truth).norm()) / norm

    return error
