"""What the runs say: seconds to each target, the best fixed combination, and the bounds on the default beside it.

runs: {problem: [record]}, as `runner.run` makes them.
"""

import math
import statistics
from dataclasses import dataclass

from .variants import DEFAULT, FIXED, TODAY, VARIANTS

TARGETS = ("early", "deep")
WORST, MEAN, AGAINST_TODAY = 1.3, 1.15, 1.15


@dataclass(frozen=True)
class Cell:
    """A variant on a problem to a target: medians over the seeds; infinite where most seeds did not get there."""

    seconds: float
    steps: float
    reached: int
    seeds: int

    @property
    def solved(self):
        return math.isfinite(self.seconds)


def common(records) -> dict:
    """{variant: {seed: record}} of the seeds that every variant here has."""
    by_variant = {v: {r["seed"]: r for r in records if r["variant"] == v} for v in VARIANTS}
    by_variant = {v: found for v, found in by_variant.items() if found}
    seeds = set.intersection(*map(set, by_variant.values())) if by_variant else set()
    return {v: {seed: found[seed] for seed in sorted(seeds)} for v, found in by_variant.items()} if seeds else {}


def cells(records, target) -> dict[str, Cell]:
    """{variant: Cell} of one problem."""
    def middle(found, key):
        return statistics.median_high(math.inf if r[target] is None else r[target][key] for r in found)

    return {
        v: Cell(middle(found.values(), "seconds"), middle(found.values(), "steps"),
                sum(r[target] is not None for r in found.values()), len(found))
        for v, found in common(records).items()
    }


def best_fixed(row) -> str | None:
    """The fixed combination of the least seconds that solved it."""
    solved = [v for v in row if v in FIXED and row[v].solved]
    return min(solved, key=lambda v: row[v].seconds) if solved else None


@dataclass(frozen=True)
class Comparison:
    """The default on one problem and target beside the best fixed combination (None: none got there) and today's default."""

    problem: str
    target: str
    best: str | None
    best_seconds: float
    default_seconds: float
    today_seconds: float

    @property
    def ratio(self):
        """Default / best, None where either did not get there."""
        return _ratio(self.default_seconds, self.best_seconds)

    @property
    def over_today(self):
        return _ratio(self.default_seconds, self.today_seconds)

    @property
    def unsolved(self):
        """Did a fixed combination get there and the default not?"""
        return self.best is not None and not math.isfinite(self.default_seconds)

    @property
    def lost(self):
        """Did today's default get there and the default not?"""
        return math.isfinite(self.today_seconds) and not math.isfinite(self.default_seconds)


def _ratio(a, b):
    return a / b if math.isfinite(a) and math.isfinite(b) else None


def comparisons(runs) -> list[Comparison]:
    found = []
    for problem, records in runs.items():
        for target in TARGETS:
            row = cells(records, target)
            if DEFAULT in row:
                best = best_fixed(row)
                found.append(Comparison(problem, target, best, row[best].seconds if best else math.inf, row[DEFAULT].seconds,
                                        row[TODAY].seconds if TODAY in row else math.inf))
    return found


def judged(found: list[Comparison]) -> list[tuple[str, bool]]:
    """(sentence, is the bound met?) for each of the bounds."""
    lines = []
    compared = [c for c in found if c.ratio is not None]
    if compared:
        worst = max(compared, key=lambda c: c.ratio)
        lines.append((f"default / best fixed combination, worst: {worst.ratio:.2f} on {worst.problem}, {worst.target} "
                      f"(best: {worst.best}); bound {WORST:g}", worst.ratio <= WORST))
        mean = statistics.geometric_mean(c.ratio for c in compared)
        lines.append((f"default / best fixed combination, geometric mean of {len(compared)} targets: {mean:.2f}; "
                      f"bound {MEAN:g}", mean <= MEAN))
    unsolved = [f"{c.problem} ({c.target})" for c in found if c.unsolved]
    if found:
        lines.append((f"solved by a fixed combination and not by the default: {', '.join(unsolved) or 'none'}", not unsolved))
    against = [c for c in found if c.over_today is not None]
    lost = [f"{c.problem} ({c.target})" for c in found if c.lost]
    if against:
        worst = max(against, key=lambda c: c.over_today)
        lines.append((f"default / today's default, worst: {worst.over_today:.2f} on {worst.problem}, {worst.target}; bound "
                      f"{AGAINST_TODAY:g}" + (f"; solved by today's alone: {', '.join(lost)}" if lost else ""),
                      worst.over_today <= AGAINST_TODAY and not lost))
    return lines


def profile(runs, target) -> dict[str, list[float]]:
    """{variant: seconds / least seconds of any variant}, one for each problem and seed that any solved, infinite if not solved.

    Dolan and More, Benchmarking optimization software with performance profiles, Math. Program. 91 (2002), section 2.
    A variant that cannot run on a problem (acceleration on a cross-entropy) has no entry for it.
    """
    found = {v: [] for v in VARIANTS}
    for records in runs.values():
        by_variant = common(records)
        for seed in next(iter(by_variant.values()), ()):
            times = {v: math.inf if r[seed][target] is None else r[seed][target]["seconds"] for v, r in by_variant.items()}
            least = min(times.values())
            if math.isfinite(least):
                for v, seconds in times.items():
                    found[v].append(seconds / least)
    return {v: ratios for v, ratios in found.items() if ratios}


def share(ratios, tau) -> float:
    """The share that was solved within tau times the least seconds."""
    return sum(r <= tau for r in ratios) / len(ratios)
