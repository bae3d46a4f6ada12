"""The sections of a run: each measures its rows, checks their results and judges its bounds."""

import traceback
import warnings
from functools import partial

from . import dampings, ensembles, memory, pde, sweeps
from .bounds import BOUNDS, ENSEMBLE_BOUNDS, SLOPE_BOUNDS, Absent, dampings_bounds, memory_bounds, pde_bounds, wide_bounds
from .measure import measure
from .peers import LM
from .problems import PROBLEMS


class Run:
    """A run under way. results: a `tables.Results`, which gives rounds and quick, too."""

    def __init__(self, results):
        self.results = results

    def measured(self, store, key, make, bounds, name=None):
        """Put make() into store[key], check the errors of its rows and judge `bounds` on it.

        Where it raises, the fault is noted under `name` (default: key) and the run goes on.
        """
        name = name or key
        try:
            # Peers warn of what is theirs; what pgdfast warns of, such as a fallback, spoils a measurement.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.filterwarnings("error", message="pgdfast")
                found = store[key] = make()
        except Exception as error:
            traceback.print_exc()
            self.results.faults.append(f"{name} could not be measured: {error!r}.")
            return
        for row, (error, allowed) in getattr(found, "errors", {}).items():
            if not error <= allowed:
                self.results.faults.append(f"{row} is off by {error:.1e} relative, more than {allowed:.1e}, in {found.title}.")
        for bound in bounds:
            self.judge(bound, found)

    def judge(self, bound, measured):
        """Note the verdict on a bound, or why there is none."""
        try:
            verdict = bound.judge(measured)
        except Absent as reason:
            verdict = {"section": bound.section, "claim": bound.claim, "bound": "", "measured": "",
                       "verdict": f"skipped: {reason}"}
        self.results.verdicts.append(verdict)

    def rounds(self, share):
        """A share of the rounds, three at least."""
        return max(3, self.results.rounds // share)


def _problem(name):
    def section(run):
        results, bounds = run.results, [bound for bound in BOUNDS if bound.section == name]
        run.measured(results.problems, name, partial(measure, PROBLEMS[name], results.rounds, results.quick), bounds)

    return section


def _pde(run):
    for hidden in pde.QUICK_NETWORKS if run.results.quick else pde.NETWORKS:
        title = pde.title(hidden)
        run.measured(run.results.problems, title, partial(pde.measure, hidden, run.rounds(2)), pde_bounds(title))


def _dampings(run):
    for case in dampings.QUICK_CASES if run.results.quick else dampings.CASES:
        title = dampings.title(case)
        run.measured(run.results.problems, title, partial(dampings.measure, case, run.rounds(2)), dampings_bounds(title))


def _ensembles(run):
    for name, measured in ensembles.SECTIONS.items():
        bounds = [bound for bound in ENSEMBLE_BOUNDS if bound.section == name]
        run.measured(run.results.problems, name, partial(measured, run.rounds(4), run.results.quick), bounds)


def _sweeps(run):
    quick = run.results.quick
    for sweep, (_, sizes) in sweeps.sweeps(quick).items():
        points = run.results.sweeps.setdefault(sweep, {})
        for size in sizes:
            name = f"{sweep} {size}"
            bounds = wide_bounds(name, size, size in sweeps.COMPILED) if sweep == "width" else []
            run.measured(points, size, partial(sweeps.measure, sweep, size, run.rounds(4), quick), bounds, name)
        found = sweeps.slopes(sweep, points, LM.name) if len(points) == len(sizes) else {}
        run.results.fits[sweep] = {
            what: f"{LM.name} grows with exponent {k:.2f} over sizes {', '.join(map(str, fitted))}"
            for what, (k, fitted) in found.items()}
        for bound in SLOPE_BOUNDS:
            if bound.section == sweep:
                run.judge(bound, found)


def _memory(run):
    for name in memory.PROBED:
        problem = PROBLEMS[name]
        bounds = memory_bounds(name, problem.residuals, problem.activations)
        run.measured(run.results.memory, name, partial(memory.probe, name), bounds, f"the memory of {name}")


SECTIONS = {**{name: _problem(name) for name in PROBLEMS}, "pde": _pde, "dampings": _dampings, "ensembles": _ensembles,
            "sweeps": _sweeps, "memory": _memory}
