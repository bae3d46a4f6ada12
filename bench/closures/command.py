"""`python -m bench closures`: runs the corpus, prints a table and a summary, and writes both as JSON."""

import argparse
import json
import platform
import re
import time
from pathlib import Path
from statistics import median

import torch

from . import CASES, runner

RESULTS = Path(__file__).parent.parent / "results" / "closures.json"
ADAM_SEPARATED, ADAM_DEEP, BY_HAND = 6.0, 10.0, 1.2   # the most that a step may cost, in Adam steps and steps by hand
PAIRS = (   # (slow, fast, the most that their ratio may be): one problem written in two ways
    ("pinn/navier-stokes-tuple", "pinn/navier-stokes-joined", 1.2),
    ("pinn/navier-stokes-three-means", "pinn/navier-stokes-joined", 1.2),
    ("recurrent/lstm-48x12", "recurrent/lstm-48x12-by-hand", 1.5),
)
DEEP = re.compile("^recurrent/|^convolutions/|batch-norm")   # which may take ADAM_DEEP


def main(argv=None) -> int:
    """Run the command line; the exit code is 1 where a case is not as expected."""
    parser = argparse.ArgumentParser(
        prog="python -m bench closures", description="Run closures as users write them; print a table and a summary.")
    parser.add_argument("--only", action="append", metavar="KIND[/NAME]", help="run these kinds or cases only; may be repeated")
    parser.add_argument("--json", metavar="FILE", help="where results go (default of a whole run: bench/results/closures.json)")
    parser.add_argument("--no-time", action="store_true", help="verdicts and paths only")
    parser.add_argument("--steps", type=int, default=runner.STEPS, help="steps against the oracle (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=runner.ROWS, help="size of a timed batch (default: %(default)s)")
    parser.add_argument("--judged", type=int, default=runner.JUDGED,
                        help="size of a batch that is judged (default: %(default)s)")
    parser.add_argument("--random", type=int, metavar="N", help="instead, compare N random closures with the oracle")
    parser.add_argument("--seed", type=int, default=0, help="the first seed of --random (default: %(default)s)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.random is not None:
        from . import random_runner

        return random_runner.main(arguments.random, arguments.seed)
    chosen = chosen_cases(arguments.only)
    if not chosen:
        parser.error(f"no case begins with {' or '.join(map(repr, arguments.only))}; kinds: {', '.join(kinds())}")
    start, outcomes = time.perf_counter(), []
    print(HEADER)
    for case in chosen:
        outcomes.append(run(case, arguments))
        print(line(outcomes[-1]), flush=True)
    seconds = time.perf_counter() - start
    print()
    print("\n".join(summary(outcomes)))
    print(f"{seconds:.0f} s, one thread; {arguments.steps} steps on {arguments.judged} rows, times on {arguments.rows}")
    path = Path(arguments.json) if arguments.json else None if arguments.only or arguments.no_time else RESULTS
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record(outcomes, arguments, seconds), indent=1) + "\n")
        page = path.with_suffix(".md")
        page.write_text("\n".join(["# Closures, by kind", "", "```", *summary(outcomes), "```", "", *by_kind(outcomes)]) + "\n")
        print(f"wrote {path} and {page}")
    return int(any(outcome.failed for outcome in outcomes))


def kinds():
    return list(dict.fromkeys(case.kind for case in CASES.values()))


def chosen_cases(only=None):
    """The cases of these kinds, or whose labels these are."""
    return [case for case in CASES.values() if only is None or any(o in (case.kind, case.label) for o in only)]


def run(case, arguments):
    outcome = runner.judge(case, arguments.judged, arguments.steps)
    if outcome.verdict == runner.RIGHT:
        runner.look(case, outcome, arguments.rows if not arguments.no_time else arguments.judged)
        if not arguments.no_time:
            runner.clock(case, outcome, arguments.rows)
    return outcome


HEADER = f"{'case':46} {'verdict':19} {'path':11} {'M':>5} {'P':>5} {'error':>7} {'LM ms':>8} {'/ Adam':>7} {'/ hand':>7}  note"


def line(o) -> str:
    """A row of the table."""
    number = lambda value, form: "" if value is None else format(value, form)   # noqa: E731
    note = o.message or o.note or o.hand
    return (f"{o.label:46} {o.verdict:19} {o.path:11} {o.residuals or '':>5} {o.parameters or '':>5} "
            f"{number(o.error, '.0e'):>7} {number(o.lm, '.2f'):>8} {number(o.over_adam, '.1f'):>7} "
            f"{number(o.over_hand, '.2f'):>7}  {note[:100]}")


def too_slow(o) -> str:
    """What bound a case misses, if any."""
    if o.lm is None:
        return ""
    if DEEP.search(o.label):
        if o.over_adam > ADAM_DEEP:
            return f"{o.over_adam:.1f} Adam steps, more than {ADAM_DEEP:g}"
    elif o.path == runner.SEPARATED and o.over_adam > ADAM_SEPARATED:
        return f"{o.over_adam:.1f} Adam steps where rows separate, more than {ADAM_SEPARATED:g}"
    if o.over_hand is not None and o.over_hand > BY_HAND:
        return f"{o.over_hand:.2f} steps by hand ({o.hand}), more than {BY_HAND:g}"
    return ""


def summary(outcomes) -> list[str]:
    """Counts, and the labels of what is not as it should be."""
    count = lambda *verdicts: sum(o.verdict in verdicts for o in outcomes)   # noqa: E731
    paths = {path: sum(o.path == path for o in outcomes) for path in (runner.SEPARATED, runner.COUPLED, runner.FALLBACK)}
    slow = {o.label: too_slow(o) for o in outcomes if too_slow(o)}
    over = lambda bound: sum(o.over_adam is not None and o.over_adam > bound for o in outcomes)   # noqa: E731
    by_hand = sum(o.over_hand is not None and o.over_hand > BY_HAND for o in outcomes)
    found = [
        f"{len(outcomes)} closures: {count(runner.RIGHT)} right, {count(runner.EXPECTED)} raise as they should, "
        f"{count(runner.WRONG)} SILENTLY WRONG, {count(runner.RAISES)} raise though they should not, "
        f"{count(runner.BROKEN)} broken cases",
        "right by " + ", ".join(f"{path}: {number}" for path, number in paths.items()),
    ]
    if any(o.lm is not None for o in outcomes):
        found.append(f"slower than {ADAM_SEPARATED:g} Adam steps: {over(ADAM_SEPARATED)}, than {ADAM_DEEP:g}: "
                     f"{over(ADAM_DEEP)}; than {BY_HAND:g} steps by hand: {by_hand}; beyond their bound: {len(slow)}")
    times = {o.label: o.lm for o in outcomes if o.lm is not None}
    found += [f"{a} over {b}: {times[a] / times[b]:.2f} (bound {most:g})" for a, b, most in PAIRS if a in times and b in times]
    found += [f"  {o.verdict}: {o.label}: {o.message[:160]}" for o in outcomes if o.failed]
    found += [f"  slow: {label}: {why}" for label, why in slow.items()]
    return found


def by_kind(outcomes) -> list[str]:
    """A table of verdicts, paths and times, a row per kind."""
    lines = [
        "| kind | closures | right | raise, as they should | rules: rows, whole | double backward | LM / Adam: median, most "
        "| LM / by hand: median, most |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(o.label.split("/")[0] for o in outcomes):
        ours = [o for o in outcomes if o.label.split("/")[0] == kind]
        counts = [sum(o.verdict == verdict for o in ours) for verdict in (runner.RIGHT, runner.EXPECTED)]
        paths = [sum(o.path == path for o in ours) for path in (runner.SEPARATED, runner.COUPLED, runner.FALLBACK)]
        times = [[t for o in ours if (t := getattr(o, name)) is not None] for name in ("over_adam", "over_hand")]
        spread = [f"{median(t):.2f}, {max(t):.2f}" if t else "" for t in times]
        lines.append(f"| {kind} | {len(ours)} | {counts[0]} | {counts[1]} | {paths[0]}, {paths[1]} | {paths[2]} "
                     f"| {spread[0]} | {spread[1]} |")
    return lines


def record(outcomes, arguments, seconds) -> dict:
    return {
        "command": "python -m bench closures", "rows": arguments.rows, "judged": arguments.judged,
        "steps": arguments.steps, "seconds": round(seconds),
        "torch": torch.__version__, "python": platform.python_version(), "threads": 1, "summary": summary(outcomes)[:3],
        "closures": [o.record() for o in outcomes],
    }
