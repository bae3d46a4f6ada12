"""`python -m bench globalization`: runs the study, goes on where it was left, and writes tables, JSON and a picture.

Exit codes: 0 done; 1 the results could not be written; 2 a value on the command line is wrong; 130 interrupted, with finished
runs kept.
"""

import json
import platform
import sys
import time

import torch

from pgdfast_experiments import options, records, terminal
from pgdfast_experiments.errors import UsageError, WriteError

from . import profile, tables
from .problems import PROBLEMS
from .runner import fingerprint, run
from .variants import VARIANTS, applies

SUMMARY = """\
Train every problem of the study with every fixed combination of damping rule and acceleration, with today's default and with
pgdfast.LM(params) alone, to an early and a deep target each; say how far the default is from the best. Writes globalization.md,
globalization.json and profile.png. Finished runs are kept in the JSON and not run again."""
JSON, PAGE, PICTURE = "globalization.json", "globalization.md", "profile.png"


def main(argv=None) -> int:
    """Run the command line and return the exit code; bounds are judged in the report, not by it."""
    try:
        return study(_parser().parse_args(argv))
    except (UsageError, WriteError) as error:
        terminal.complain("python -m bench globalization", error)
        return 2 if isinstance(error, UsageError) else 1


def _parser():
    parser = options.OneLineParser(prog="python -m bench globalization", description=SUMMARY)
    add = parser.add_argument
    add("--only", metavar="NAME,...", help=f"problems, of {', '.join(PROBLEMS)} (default: all)")
    add("--variants", metavar="NAME,...", help=f"of {', '.join(VARIANTS)} (default: all)")
    add("--seeds", type=options.whole_number(1), metavar="N", help="for every problem (default: 1 to 3, as it says)")
    add("--repeats", type=options.whole_number(1), default=1, metavar="N",
        help="time every run so often and take the least, on a busy machine; short runs are repeated anyway")
    add("--quick", action="store_true", help="two minutes: some small problems, one seed")
    add("--output", default="runs/globalization", metavar="DIR", help="made where missing (default: %(default)s)")
    add("--fresh", action="store_true", help="run everything anew")
    add("--fresh-variant", metavar="NAME,...", help="run these variants anew, such as a default that has changed")
    return parser


def study(given) -> int:
    """Run what is asked and not yet there, then write the report of all runs in the folder."""
    names = chosen(given.only, PROBLEMS, "problem") or [n for n, p in PROBLEMS.items() if p.quick or not given.quick]
    variants = chosen(given.variants, VARIANTS, "variant") or list(VARIANTS)
    anew = list(VARIANTS) if given.fresh else chosen(given.fresh_variant, VARIANTS, "variant")
    folder = records.prepare_folder(given.output, "--output")
    torch.set_num_threads(1)
    found, interrupted, start = kept(folder / JSON), False, time.perf_counter()
    todo = [
        (name, seed, variant)
        for name in names for seed in range(given.seeds or (1 if given.quick else PROBLEMS[name].seeds)) for variant in variants
        if applies(variant, PROBLEMS[name]) and (variant in anew or (name, seed, variant) not in found)
    ]
    print(f"{len(todo)} runs to do, {len(found)} in {folder}", flush=True)
    try:
        for k, (name, seed, variant) in enumerate(todo):
            found[name, seed, variant] = run(PROBLEMS[name], variant, seed, given.repeats)
            print(line(name, found[name, seed, variant]), flush=True)
            if k + 1 == len(todo) or todo[k + 1][:2] != (name, seed):
                keep(folder / JSON, found)
    except KeyboardInterrupt:
        interrupted = True
        keep(folder / JSON, found)
        print("interrupted; finished runs are kept", file=sys.stderr)
    runs = {name: mine for name in PROBLEMS if (mine := [r for (n, _, _), r in found.items() if n == name])}
    try:
        spent = sum(r["seconds"] * r["repeated"] for r in found.values())
        (folder / PAGE).write_text(tables.page(runs, spent), encoding="utf-8")
        profile.draw(folder / PICTURE, runs)
    except OSError as error:
        raise WriteError(f"could not write the report to {str(folder)!r}: {error}") from error
    print("\n".join(["", *tables.verdict_lines(runs)]))
    print(f"{time.perf_counter() - start:.0f} s for {len(todo)} runs, one thread; wrote {folder / PAGE}, {JSON} and {PICTURE}")
    return 130 if interrupted else 0


def chosen(text, known, what) -> list[str]:
    """The names in a list with commas; [] for none. Raises UsageError for an unknown one."""
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UsageError(f"unknown {what} {name!r}; needed: any of {', '.join(known)}")
    return names


def kept(path) -> dict:
    """{(problem, seed, variant): record} of the finished runs whose problem, budget and options are still these."""
    if not path.exists():
        return {}
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))["runs"]
        return {
            (name, r["seed"], r["variant"]): r for name, mine in whole.items() for r in mine
            if name in PROBLEMS and VARIANTS.get(r["variant"]) == r["options"]
            and r["fingerprint"] == json.loads(json.dumps(fingerprint(PROBLEMS[name])))
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{str(path)!r} holds no runs of this study ({error!r}); needed: another --output") from error


def keep(path, found) -> None:
    """Write all runs; the file has its old or its new contents at any moment."""
    runs = {}
    for (name, _, _), record in found.items():
        runs.setdefault(name, []).append(record)
    whole = {"command": "python -m bench globalization", "torch": torch.__version__, "python": platform.python_version(),
             "threads": 1, "runs": runs}
    try:
        records.write_whole(path, (json.dumps(records.as_read(whole)) + "\n").encode())
    except OSError as error:
        raise WriteError(f"could not write {str(path)!r}: {error}") from error


def line(name, record) -> str:
    """A run in one line."""
    reached = [f"{t} {r['seconds']:.3g} s, {r['steps']} steps" if (r := record[t]) else f"{t} -" for t in ("early", "deep")]
    return (f"{name:15} {record['seed']} {record['variant']:22} {'; '.join(reached):50} all: {record['steps']} steps, "
            f"{record['solves']} solves, {record['seconds']:.2f} s, loss {record['loss'] or 0:.2e}, {record['end']}")
