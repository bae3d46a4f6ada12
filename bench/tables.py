"""The figures of a run: collected here, printed at its end as tables, and written as JSON."""

import json
import os
import platform
from dataclasses import dataclass, field
from importlib import metadata
from statistics import median

import torch

import pgdfast

from . import memory
from .bounds import Absent, sentence
from .interleave import OWN, THREADS, Ratio
from .parts import GEMM, GGN, GRADIENT
from .peers import LM

PEERS = ("numpy", "jax", "jaxlib", "optimistix", "lineax", "curvlinops-for-pytorch", "pypose", "torch-levenberg-marquardt")


@dataclass
class Measured:
    """The rows of one section, timed in turn.

    timings: by row. missing: why a row is not there. errors: (relative error, allowed) of the rows that were checked.
    products: rows whose time stands against J^T J v instead of the LM step. facts: size and settings.
    ours: the row in the LM step's place where there is none.
    """

    title: str
    timings: dict
    missing: dict = field(default_factory=dict)
    errors: dict = field(default_factory=dict)
    products: tuple = ()
    facts: dict = field(default_factory=dict)
    ours: str = LM.name

    def timing(self, row):
        if row not in self.timings:
            raise Absent(self.missing.get(row, f"{row} was not timed"))
        return self.timings[row]

    def ratio(self, row, *others):
        """The median over the rounds of a row's time over the sum of others'."""
        return Ratio.of(self.timing(row), *map(self.timing, others)).median

    def over_ours(self, row):
        """Ratio to our J^T J v for products, to the LM step for all else."""
        return Ratio.of(self.timing(row), self.timing(GGN if row in self.products else self.ours))

    def lines(self):
        """The figures as a table."""
        yield self.title
        yield (f"  {'':34}{'ms: min':>10}{'median':>10}{'max':>10}{'threads':>9}{'over ours':>11}{'in gradients':>14}"
               f"{'GFLOP/s':>10}{'of GEMM':>9}{'error':>10}")
        for name, timing in self.timings.items():
            low, middle, high = (1e3 * f(timing.best) for f in (min, median, max))
            yield (f"  {name:34}{_ms(low)}{_ms(middle)}{_ms(high)}{_threads(timing):>9}"
                   f"{_number(self.over_ours(name).median):>11}{self._in_gradients(name):>14}{self._rate(timing)}"
                   f"{self._error(name):>10}")
        for name, reason in self.missing.items():
            yield f"  {name:35}skipped: {reason}"

    def _in_gradients(self, name):
        return _number(self.ratio(name, GRADIENT)) if GRADIENT in self.timings else ""

    def _rate(self, timing):
        if timing.gflops is None:
            return " " * 19
        gemm = self.timings.get(GEMM)
        seconds = gemm and gemm.seconds.get(timing.threads or THREADS[-1])
        share = f"{timing.gflops / (gemm.row.flops / median(seconds.values()) / 1e9):.0%}" if seconds else ""
        return f"{timing.gflops:10.1f}{share:>9}"

    def _error(self, name):
        return f"{self.errors[name][0]:.0e}" if name in self.errors else ""

    def as_plain(self):
        """For JSON: every sample in seconds, and what was made of them."""
        rows = {
            name: {
                "median_ms": 1e3 * timing.median, "threads": _threads(timing), "gflops": timing.gflops,
                "over_ours": self.over_ours(name).median, "error": self.errors.get(name, (None,))[0],
                "seconds": {_name(n): list(found.values()) for n, found in timing.seconds.items()},
            } for name, timing in self.timings.items()
        }
        return {"title": self.title, "rows": rows, "skipped": self.missing, **self.facts}


@dataclass
class Results:
    """Everything of one run.

    sweeps: {sweep: {size: Measured}}. memory: {problem: what memory.probe returns}. faults: sentences on wrong results and
    failed measurements.
    """

    rounds: int
    quick: bool = False
    problems: dict = field(default_factory=dict)
    sweeps: dict = field(default_factory=dict)
    fits: dict = field(default_factory=dict)
    memory: dict = field(default_factory=dict)
    verdicts: list = field(default_factory=list)
    faults: list = field(default_factory=list)

    @property
    def failed(self):
        """Whether a bound is missed, a result is wrong, or something could not be measured."""
        return bool(self.faults) or any(verdict["verdict"] == "FAIL" for verdict in self.verdicts)

    def lines(self):
        """All tables, then the bounds, then what failed."""
        yield f"{processor()}; Python {platform.python_version()}; PyTorch {torch.__version__}; " + ", ".join(
            f"{key} {value}" for key, value in pgdfast.build_info().items() if "torch" not in key)
        yield (f"{self.rounds} rounds, fewer for slow rows; each row at its best of {_and(THREADS)} threads; "
               "over ours: over the LM step, of products and their floor over our J^T J v")
        for measured in self.problems.values():
            yield ""
            yield from measured.lines()
        for name, points in self.sweeps.items():
            if not points:
                continue
            yield ""
            yield from sweep_lines(name, points)
            yield from (f"  {what}: {text}" for what, text in self.fits.get(name, {}).items())
        for probed in self.memory.values():
            yield ""
            yield from memory.lines(probed)
        if self.verdicts:
            yield ""
            yield "bounds"
            widths = [max(len(row[key]) for row in self.verdicts) + 2 for key in ("section", "claim", "bound", "measured")]
            for row in self.verdicts:
                cells = zip(("section", "claim", "bound", "measured"), widths, strict=True)
                yield "  " + "".join(f"{row[key]:{width}}" for key, width in cells) + row["verdict"]
        failures = [sentence(row) for row in self.verdicts if row["verdict"] == "FAIL"] + self.faults
        if failures:
            yield ""
            yield "failed"
            yield from (f"  {line}" for line in failures)

    def as_plain(self):
        """For JSON."""
        return {
            "machine": {"processor": processor(), "cores": os.cpu_count(), "platform": platform.platform()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "pgdfast": pgdfast.__version__,
                         **_installed(PEERS)},
            "build": pgdfast.build_info(), "threads": list(THREADS), "rounds": self.rounds, "quick": self.quick,
            "problems": {name: measured.as_plain() for name, measured in self.problems.items()},
            "sweeps": {name: {str(size): m.as_plain() for size, m in points.items()} for name, points in self.sweeps.items()},
            "fits": self.fits, "memory": self.memory, "bounds": self.verdicts,
            "faults": self.faults,
        }

    def write(self, path):
        """Write everything as JSON to `path`; a reader, or an interruption, never meets half of a file."""
        scratch = path.with_name(path.name + ".part")
        scratch.write_text(json.dumps(self.as_plain(), indent=1), encoding="utf-8")
        os.replace(scratch, path)


def sweep_lines(name, points):
    """One line per size, one column per row, in ms."""
    columns = list(dict.fromkeys(row for measured in points.values() for row in measured.timings))
    yield f"{name}: {next(iter(points.values())).facts['network']}; ms, medians"
    yield f"  {'':>8}" + "".join(f"{column:>{max(len(column), 8) + 2}}" for column in columns)
    for size, measured in points.items():
        cells = (f"{_ms(1e3 * measured.timings[c].median).strip() if c in measured.timings else '':>{max(len(c), 8) + 2}}"
                 for c in columns)
        yield f"  {size:>8}" + "".join(cells)


def processor():
    """The processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _installed(packages):
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _name(threads):
    return "own" if threads == OWN else str(threads)


def _threads(timing):
    return _name(timing.threads)


def _ms(value):
    return f"{value:10.4f}" if value < 0.1 else f"{value:10.3f}" if value < 100 else f"{value:10.1f}"


def _number(value):
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _and(values):
    return " and ".join(map(str, values))
