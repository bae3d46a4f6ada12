"""`python -m bench nist`: NIST's nonlinear regressions by LM without options, beside MINPACK; a table and a verdict.

The bound: four digits from both starts of all 27 data sets. Where MINPACK has fewer, LM is to end at the same sum of squares
or a smaller one; without SciPy there are no exceptions. Exit code 1 where it is missed.
"""

import argparse
import math

import torch

import pgdfast

from . import PROBLEMS
from .runs import HAS_MINPACK, STEPS, by_lm, by_minpack

DIGITS, SAME = 4.0, 1e-6   # the bound; relative difference of sums of squares that are the same
HEADER = "| data set | level | start | digits | steps | status | scaling | loss | MINPACK digits | Jacobians | loss |"


def main(argv=None) -> int:
    """Run the command line; the exit code is 1 where the bound is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench nist", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PROBLEMS)} (default: all)")
    parser.add_argument("--rule", help="damping_rule (default: LM's own)")
    parser.add_argument("--acceleration", help="acceleration (default: LM's own)")
    parser.add_argument("--scaling", help="scaling (default: LM's own)")
    parser.add_argument("--steps", type=int, default=STEPS, help="the most that a fit may take (default: %(default)s)")
    given = parser.parse_args(argv)
    unknown = [name for name in given.names if name not in PROBLEMS]
    if unknown:
        parser.error(f"unknown data set {unknown[0]!r}; use {', '.join(PROBLEMS)}")
    options = {"damping_rule": given.rule, "acceleration": given.acceleration, "scaling": given.scaling}
    options = {name: value for name, value in options.items() if value is not None}
    try:
        pgdfast.LM([torch.zeros(1, requires_grad=True)], **options)
    except ValueError as refused:
        parser.error(str(refused))
    torch.set_num_threads(1)
    fits, missed = [], []
    print(HEADER)
    print("|---" * HEADER.count(" | ") + "|---|")
    for name in given.names or PROBLEMS:
        for start in (0, 1):
            ours = by_lm(PROBLEMS[name], start, given.steps, **options)
            theirs = by_minpack(PROBLEMS[name], start) if HAS_MINPACK else None
            fits.append(ours)
            if not holds(ours, theirs):
                missed.append(f"{name} from start {start + 1}")
            print(row(PROBLEMS[name].level, ours, theirs), flush=True)
    print(summary(fits, missed))
    return int(bool(missed))


def holds(ours, theirs) -> bool:
    """Whether a fit of LM obeys the bound. theirs: MINPACK's, or None."""
    if ours.digits >= DIGITS:
        return True
    return theirs is not None and theirs.digits < DIGITS and ours.loss <= theirs.loss * (1 + SAME)


def row(level: str, ours, theirs) -> str:
    """A line of the table."""
    cells = [ours.name, level, ours.start + 1, f"{ours.digits:.1f}", ours.steps, ours.status, ours.scaling, f"{ours.loss:.6g}"]
    cells += ["-"] * 3 if theirs is None else [f"{theirs.digits:.1f}", theirs.steps, f"{theirs.loss:.6g}"]
    return f"| {' | '.join(map(str, cells))} |"


def summary(fits: list, missed: list[str]) -> str:
    """How many fits reached the bound's digits, in how many steps, and what missed it."""
    good = [fit.steps for fit in fits if fit.digits >= DIGITS]
    middle = math.exp(sum(map(math.log, good)) / len(good)) if good else math.nan
    reached = f"{len(good)} of {len(fits)} fits to {DIGITS:g} digits, {sum(good)} steps, geometric mean {middle:.1f}"
    peer = "" if HAS_MINPACK else " (SciPy is not installed: no fit of MINPACK to compare with)"
    return f"\n{reached}{peer}\n" + (f"MISSED: {', '.join(missed)}" if missed else "the bound holds")
