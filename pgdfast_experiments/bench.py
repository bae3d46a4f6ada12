"""`pgdfast bench`: the benchmarks of the source tree, as tables, JSON and pictures.

What is timed lies in the bench folder, which is not installed; this finds it and runs pytest there.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from pgdfast_experiments import records
from pgdfast_experiments.errors import UsageError

SECTIONS = ("A", "B", "C", "D", "E", "F", "G", "pde", "dampings", "ensembles", "sweeps", "memory")
SUMMARY = """\
Time steps, products with J and their parts beside other packages and PyTorch's own matrix products, and judge the
bounds that the project holds itself to. Runs pytest on the bench folder of the source tree, which has to be the current
folder or above it; prints a table per problem; writes results.json and pictures (PNG). The exit code is 1 if a bound or
a result is wrong.

A: 1-80-80-1, 100 rows. B: 2-80-80-1, 400 rows. C: PINN. D: modular addition. E: polynomial. F: transformer.
G: 784-250-10. pde: Laplacians of networks. dampings: 16 against one. ensembles: many networks at once. sweeps: width,
depth, rows. memory: peak memory of exact steps.
bench/README.md says more."""
QUICK_ROUNDS = 6

# Without the current folder on sys.path: the installed package, with its core, is to be timed and not the source folder.
_PYTEST = "import sys; sys.path[:] = [p for p in sys.path if p]; import pytest; sys.exit(pytest.main(sys.argv[1:]))"


def add_options(parser):
    """Add the options of the command to `parser`."""
    add = parser.add_argument
    add("problems", nargs="*", metavar="PROBLEM", help=f"what to time (default: all of {', '.join(SECTIONS)})")
    add("--output", default="runs/bench", metavar="DIR",
        help="folder for results.json and the pictures, made where missing (default: %(default)s)")
    add("--quick", action="store_true",
        help=f"{QUICK_ROUNDS} rounds in place of 40, fewer sizes, and without the peers that take seconds a step")


def run(arguments):
    """Time, print, write; returns 0, 1 if a bound or a result is wrong, or 130 if interrupted."""
    unknown = [name for name in arguments.problems if name not in SECTIONS]
    if unknown:
        raise UsageError(f"unknown problem {unknown[0]!r}; needed: any of {', '.join(SECTIONS)}")
    folder = find(Path.cwd())
    for module, package in (("pytest", "pytest"), ("pytest_benchmark", "pytest-benchmark"), ("matplotlib", "matplotlib")):
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"{package} is missing, which the benchmarks need: pip install 'pgdfast[bench]'")
    output = records.prepare_folder(arguments.output, "--output").resolve()
    results = output / "results.json"
    before = _written(results)
    code = subprocess.call([sys.executable, "-c", _PYTEST, *options(folder)], cwd=folder.parent,
                           env=environment(arguments, output, os.environ))
    if _written(results) == before:
        raise records.WriteError(f"pytest ended with code {code} before there were results; its last lines say why")
    drawn = subprocess.call([sys.executable, str(folder / "plots.py"), str(results)], cwd=folder.parent)
    print(f"wrote {results}")
    if drawn:
        raise records.WriteError(f"{results} could not be drawn; the last lines say why")
    return {0: 0, 2: 130}.get(code, 1)


def _written(path):
    """Return when a file was written, or None where there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


def find(start):
    """Return the bench folder of the source tree that `start` lies in."""
    for folder in (start, *start.parents):
        if (folder / "bench" / "interleave.py").is_file() and (folder / "pyproject.toml").is_file():
            return folder / "bench"
    raise UsageError(
        f"no benchmarks in {str(start)!r} or above it; needed: pgdfast's source tree as the current folder, since its bench "
        "folder is not installed"
    )


def options(folder):
    """Return what pytest is given."""
    quiet = ["--benchmark-quiet", "--tb=line", "-q"]
    return [str(folder), "--benchmark-only", *quiet, "-p", "no:cacheprovider", "-p", "no:logging"]


def environment(arguments, output, outer):
    """Return the environment of the run: what to time, how often and where to write; rounds that are set outside stay."""
    inner = {"PGDFAST_BENCH_ONLY": ",".join(arguments.problems), "PGDFAST_BENCH_OUTPUT": str(output),
             "PGDFAST_BENCH_QUICK": "1" if arguments.quick else ""}
    if arguments.quick:
        inner["PGDFAST_BENCH_ROUNDS"] = outer.get("PGDFAST_BENCH_ROUNDS", str(QUICK_ROUNDS))
    return {**outer, **inner}
