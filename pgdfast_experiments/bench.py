"""`pgdfast bench`: the benchmarks of the source tree, as tables, JSON and pictures.

What is timed lies in the bench folder, which is not installed; this finds it and runs `python -m bench` there.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

from pgdfast_experiments import options, records
from pgdfast_experiments.errors import UsageError, WriteError

SECTIONS = ("A", "B", "C", "D", "E", "F", "G", "pde", "dampings", "ensembles", "sweeps", "memory")
STUDIES = {"closures": "bench/results", "globalization": "runs/globalization", "nist": "runs/nist"}   # where they write
ROUNDS, QUICK_ROUNDS = 40, 6
SUMMARY = """\
Time steps, products with J and their parts beside other packages and PyTorch's own matrix products, and judge the
bounds that the project holds itself to. Works in the source tree of pgdfast, which has to be the current folder or above
it, since its bench folder is not installed; prints a table per problem; writes results.json and pictures (PNG). The exit
code is 1 if a bound is missed or a result is wrong.

problems:
  A          1-80-80-1, 100 rows
  B          2-80-80-1, 400 rows
  C          PINN
  D          modular addition
  E          polynomial
  F          transformer
  G          784-250-10
  pde        Laplacians of networks
  dampings   16 against one
  ensembles  many networks at once
  sweeps     width, depth, rows
  memory     peak memory of exact steps

`pgdfast bench closures` runs the corpus of closures instead, `pgdfast bench globalization` the study of damping rules
and accelerations, and `pgdfast bench nist` NIST's curve fits; `--help` after any of them says how.

bench/README.md says more."""


def add_options(parser):
    """Add the options of the command to `parser`."""
    add = parser.add_argument
    add("problems", nargs="*", metavar="PROBLEM", help="what to time (default: all)")
    add("--output", default="runs/bench", metavar="DIR",
        help="folder for results.json and the pictures, made where missing (default: %(default)s)")
    add("--rounds", type=options.whole_number(1), metavar="N",
        help=f"how often every row is timed, slow ones less often (default: {ROUNDS}, quick {QUICK_ROUNDS})")
    add("--quick", action="store_true", help="fewer sizes, and without the peers that take seconds a step")


def prepare(arguments):
    """Check the values of the options, fill in the rounds, make the output folder and return it."""
    unknown = [name for name in arguments.problems if name not in SECTIONS]
    if unknown:
        raise UsageError(f"unknown problem {unknown[0]!r}; needed: any of {', '.join(SECTIONS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("matplotlib is missing, which the benchmarks need: pip install 'pgdfast[bench]'")
    if arguments.rounds is None:
        arguments.rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    return records.prepare_folder(arguments.output, "--output").resolve()


def run(arguments):
    """Run the benchmarks in a process of their own; returns their exit code."""
    find(Path.cwd())
    output = prepare(arguments)
    return in_tree(["--output", str(output), "--rounds", str(arguments.rounds),
                    *(["--quick"] if arguments.quick else []), *arguments.problems], str(output))


def in_tree(argv, results):
    """Run `python -m bench` with these words in the source tree; returns its exit code. results: where it writes."""
    with subprocess.Popen([sys.executable, "-m", "bench", *argv], cwd=find(Path.cwd())) as process:
        code = None
        while code is None:
            try:
                code = process.wait() if process.returncode is None else process.returncode
            except KeyboardInterrupt:   # the benchmarks are interrupted, too, and write what they have
                continue
    if code < 0:
        raise WriteError(
            f"signal {-code} ended the benchmarks before they wrote their results (9 is often a lack of memory); results of an "
            f"earlier run in {results!r} are as they were"
        )
    return code


def find(start):
    """Return the source tree that `start` lies in."""
    for folder in (start, *start.parents):
        if (folder / "bench" / "__main__.py").is_file() and (folder / "pyproject.toml").is_file():
            return folder
    raise UsageError(
        f"no benchmarks in {str(start)!r} or above it; needed: pgdfast's source tree as the current folder, since its bench "
        "folder is not installed"
    )
