"""The Python calls of one default LM step on problem A, and the modules that they cross. `python -m bench.calls [--list]`.

Calls of the closure, of PyTorch and of the standard library are left out, and so are the constructors that dataclasses and
named tuples generate.
"""

import argparse
import sys
from pathlib import Path

import pgdfast

from .problems import PROBLEMS

WARM_UP = 6   # before the first probe of corrected steps
LIBRARY = str(Path(pgdfast.__file__).parent)


def calls_of_step(name="A", **options):
    """(module, function) of every call of the library in one accepted plain step."""
    problem = PROBLEMS[name]
    model = problem.model()
    closure, optimizer = problem.closure(model), pgdfast.LM(model.parameters(), **options)
    calls = []

    def trace(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(LIBRARY):
            calls.append((frame.f_code.co_filename[len(LIBRARY) + 1 :], frame.f_code.co_qualname))

    for _ in range(WARM_UP):
        optimizer.step(closure)
    while True:   # a step that is accepted at its first damping
        del calls[:]
        sys.setprofile(trace)
        try:
            optimizer.step(closure)
        finally:
            sys.setprofile(None)
        report = optimizer.report
        if report.status == "accepted" and report.attempts == 1 and report.mode in ("", "plain"):
            return calls


def main():
    """Print how many calls and modules, and with --list each call."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="print every call")
    arguments = parser.parse_args()
    calls = calls_of_step()
    if arguments.list:
        print(*(f"{module:40} {function}" for module, function in calls), sep="\n")
    print(f"{len(calls)} calls in {len({module for module, _ in calls})} modules")


if __name__ == "__main__":
    main()
