"""What the benchmarks claim, and by which medians it is judged."""

from collections.abc import Callable
from dataclasses import dataclass

from .parts import CHOLESKY, GEMMS, GGN, GRADIENT, GRAM_GEMM, NESTED, NESTED_STEP, SINGLES, TAYLOR, WALK
from .peers import LM, Adam, TorchFunc, TorchLevenbergMarquardt
from .peers_jax import Jax
from .products import CompiledCurvlinops, Curvlinops, TorchFuncProduct


class Absent(Exception):
    """A row that a bound needs was not measured; says why."""


@dataclass(frozen=True)
class Side:
    """One way to meet a bound: a figure of what was measured, and its limit."""

    value: Callable
    limit: float
    what: str = ""           # of the figure
    at_least: bool = False
    form: str = "{:.3g}"

    def met(self, value):
        return value >= self.limit if self.at_least else value <= self.limit

    def shown(self, value):
        """(limit, value) as text."""
        return (f"{'>=' if self.at_least else '<='} {self.form.format(self.limit)} {self.what}".rstrip(),
                self.form.format(value))


@dataclass(frozen=True)
class Bound:
    """A claim about one section of the benchmarks; it holds if any of its sides does."""

    section: str
    claim: str
    sides: tuple[Side, ...]

    def judge(self, measured):
        """{claim, bound, measured, verdict} of a section's measurement; raises Absent where a row is missing."""
        values = [side.value(measured) for side in self.sides]
        shown = [side.shown(value) for side, value in zip(self.sides, values, strict=True)]
        met = any(side.met(value) for side, value in zip(self.sides, values, strict=True))
        return {"section": self.section, "claim": self.claim, "bound": " or ".join(limit for limit, _ in shown),
                "measured": ", ".join(value for _, value in shown), "verdict": "pass" if met else "FAIL"}


def sentence(verdict):
    """Why a bound failed."""
    return f"{verdict['section']}: {verdict['claim']} must be {verdict['bound']}, and is {verdict['measured']}."


def _over(row, *others, limit, at_least=False, what=""):
    return Side(lambda m: m.ratio(row, *others), limit, what, at_least)


def _at_most(section, row, others, limit):
    claim = f"{row} over {' + '.join(others)}"
    return Bound(section, claim, (_over(row, *others, limit=limit),))


def _faster_than(section, peer, limit, ours=LM.name):
    return Bound(section, f"{peer.name} over our {ours}", (_over(peer.name, ours, limit=limit, at_least=True),))


def _seconds(row, limit, unit):
    scale = {"ms": 1e3, "us": 1e6}[unit]
    return Side(lambda m: scale * m.timing(row).median, limit, form="{:.3g} " + unit)


BOUNDS = [
    _at_most("A", LM.name, [Adam.name], 0.40),
    _faster_than("A", TorchLevenbergMarquardt, 14),
    _faster_than("A", Jax, 5),
    Bound("A", GGN, (_seconds(GGN, 0.065, "ms"), _over(GGN, GEMMS, limit=1.7, what=f"of the {GEMMS}"))),
    _faster_than("A", TorchFuncProduct, 6, GGN),
    Bound("A", WALK, (_seconds(WALK, 10, "us"),)),

    _at_most("B", LM.name, [Adam.name], 1.0),
    _faster_than("B", TorchLevenbergMarquardt, 25),
    _faster_than("B", Jax, 20),

    _at_most("C", LM.name, [Adam.name], 1.6),
    _faster_than("C", TorchFunc, 5),
    _faster_than("C", Jax, 5),
    Bound("C", WALK, (_seconds(WALK, 60, "us"),)),

    _at_most("D", LM.name, [CHOLESKY], 1.6),
    _faster_than("D", TorchFunc, 4),

    _at_most("E", LM.name, [Adam.name], 2.0),
    _faster_than("E", TorchFunc, 45),

    _at_most("F", GGN, [GRADIENT], 0.9),
    _faster_than("F", TorchFuncProduct, 1.3, GGN),
    _faster_than("F", Curvlinops, 2.7, GGN),

    Bound("G", LM.name, (_seconds(LM.name, 32, "ms"),
                         _over(LM.name, GRAM_GEMM, CHOLESKY, limit=1.4, what=f"of {GRAM_GEMM} + {CHOLESKY}"))),
    _faster_than("G", TorchFunc, 250),
]

WIDE = 256   # the width from which the matrix products rule


def wide_bounds(section, width, compiled):
    """What must hold of J^T J v at a width; compiled: curvlinops was."""
    if width < WIDE:
        return []
    return [_at_most(section, GGN, [GEMMS], 1.3), *([_faster_than(section, CompiledCurvlinops, 1.5, GGN)] if compiled else [])]


def pde_bounds(section):
    """What must hold of pgdfast.pde on one network."""
    return [Bound(section, f"{NESTED} over {TAYLOR}", (_over(NESTED, TAYLOR, limit=3, at_least=True),)),
            _at_most(section, LM.name, [NESTED_STEP], 0.6)]


def dampings_bounds(section):
    """What must hold of many dampings from one linearization."""
    return [_at_most(section, "16 dampings", ["the smallest damping"], 1.5)]


# All steps of an ensemble over those of its members one by one, each side at its best thread count.
ENSEMBLE_BOUNDS = [_at_most("64 of A", LM.name, [SINGLES], 0.35), _at_most("D's sweep", LM.name, [SINGLES], 0.6)]


def _exponent(sweep, what, limit):
    def value(slopes):
        if what not in slopes:
            raise Absent(f"too few sizes for a slope over {what}")
        return slopes[what][0]

    return Bound(sweep, f"exponent of the {LM.name} over {what}", (Side(value, limit, form="{:.2f}"),))


# Windows for the upper half of the sizes, where overhead no longer rules.
SLOPE_BOUNDS = [_exponent("width", "P", 1.15), _exponent("rows", "N, Gram matrix", 2.3), _exponent("rows", "N, Cholesky", 3.1)]


PEAK = 600             # MB of resident memory that G's process may reach, PyTorch included
HEAP_SLACK = 64        # KiB that a later step may leave on the heap: counters and caches of Python's; G's parameters take 776


def memory_bounds(section, residuals, activations, width=4):
    """What must hold of the memory of dual steps, judged on what memory.probe returns.

    Above the closure a step may take K, its factor, room for one more, and the activations four times. Later steps may not
    allocate more than the first: what is in use on the heap stays, and the peak of resident memory, which shows what a step
    allocates and frees again, grows by less than one M x M matrix (pages of the allocator).
    """
    above = Bound(section, "peak memory of a dual step", (
        Side(lambda probed: _above_closure(probed) / 1e6, width * (3 * residuals**2 + 4 * activations) / 1e6,
             form="{:.1f} MB"),))
    if section != "G":
        return [above]
    return [
        above,
        Bound(section, "peak resident memory of one step", (
            Side(lambda probed: probed["peaks"][1] / 1e6, PEAK, form="{:.0f} MB"),)),
        Bound(section, "growth of the peak in later steps", (
            Side(lambda probed: (probed["peaks"][-1] - probed["peaks"][1]) / 1e6, width * residuals**2 / 1e6,
                 form="{:.1f} MB"),)),
        Bound(section, "heap left in use by a later step", (Side(_heap_growth, HEAP_SLACK, form="{:.0f} KiB"),)),
    ]


def _above_closure(probed):
    if probed["baseline"] is None:
        raise Absent("this system does not let a process reset its peak memory")
    return probed["peaks"][1] - probed["baseline"]


def _heap_growth(probed):
    """The most that a step after the first left in use on the heap, in KiB."""
    heaps = probed["heaps"]
    if heaps[0] is None:
        raise Absent("the C library does not tell what is in use on its heap")
    return max(b - a for a, b in zip(heaps[1:], heaps[2:], strict=False)) / 1024
