"""`python -m bench [--quick] [--rounds N] [--output DIR] [PROBLEM ...]`: what `pgdfast bench` runs.

`python -m bench closures [--only KIND/NAME] [--no-time] [--random N]` runs the corpus of closures instead, `python -m bench
nist [--rule RULE] [--acceleration NAME] [NAME ...]` NIST's curve fits, and `python -m bench globalization [--quick]
[--only PROBLEM]` the study of damping rules and accelerations.

Times steps, products with J and their parts in turn, checks their results, judges the bounds, prints tables, and writes
results.json and pictures. Exit codes: 0 done; 1 a bound is missed, a result is wrong, or something could not be measured or
written; 2 a value on the command line is wrong, or something that the benchmarks need is missing; 130 interrupted, with
what was measured until then written.
"""

import importlib.util
import sys
import time


def main(argv=None):
    """Run the command line `argv` (default: that of the process) and return its exit code."""
    from pgdfast_experiments import bench, terminal
    from pgdfast_experiments.errors import UsageError, WriteError
    from pgdfast_experiments.options import OneLineParser

    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["closures"]:
        from .closures.command import main as closures

        return closures(argv[1:])
    if argv[:1] == ["nist"]:
        from .nist.command import main as nist

        return nist(argv[1:])
    if argv[:1] == ["globalization"]:
        from .globalization.command import main as globalization

        return globalization(argv[1:])
    parser = OneLineParser(prog="python -m bench", description=bench.SUMMARY)
    bench.add_options(parser)
    try:
        arguments = parser.parse_args(argv)
        return run(arguments, bench.prepare(arguments))
    except (UsageError, WriteError) as error:
        terminal.complain("python -m bench", error)
        return 2 if isinstance(error, UsageError) else 1


def run(arguments, output):
    """Time, print, write into the folder `output`; returns the exit code."""
    import pgdfast
    from pgdfast_experiments.errors import UsageError, WriteError

    from . import plots
    from .sections import SECTIONS, Run
    from .tables import Results

    state = pgdfast.backends()["native"]
    if state != "available":
        raise UsageError(f"the benchmarks need pgdfast's native backend, but {state}; install it: pip install '.[bench]'")
    results, interrupted = Results(arguments.rounds, arguments.quick), False
    under_way = Run(results)
    try:
        for name in dict.fromkeys(arguments.problems or SECTIONS):
            start = time.perf_counter()
            print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
            SECTIONS[name](under_way)
            print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted; what was measured is written", file=sys.stderr)
    for line in results.lines():
        print(line)
    path = output / "results.json"
    try:
        results.write(path)
        plots.main(path)
    except OSError as error:
        raise WriteError(f"could not write the results to {str(output)!r}: {error}") from error
    print(f"wrote {path}")
    return 130 if interrupted else int(results.failed)


def _prefer_the_installed_package():
    """Take the source folder, which `-m` puts first, off sys.path where pgdfast is installed: it may have no core."""
    if not getattr(sys.flags, "safe_path", False):
        source = sys.path.pop(0)
        if importlib.util.find_spec("pgdfast") is None:
            sys.path.insert(0, source)


if __name__ == "__main__":
    _prefer_the_installed_package()
    sys.exit(main())
