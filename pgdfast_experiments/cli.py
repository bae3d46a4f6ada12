"""The `pgdfast` command: reads the command line, hands on the work, returns an exit code.

Exit codes: 0 done; 1 the results could not be written, `verify` found an error or `bench` a time beyond its bound, or
tasks of `run all` failed; 2 a value on the command line is wrong, or something that the command needs is missing (one
line on stderr says which); 130 interrupted.

Commands are imported when they run: help and version do not wait for PyTorch.
"""

import argparse
import sys

from pgdfast_experiments import options, records, tasks, terminal
from pgdfast_experiments.errors import UsageError, WriteError
from pgdfast_experiments.options import OneLineParser


def main(argv=None):
    """Run the command line `argv` (default: that of the process) and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        command = _command_parser().parse_args(argv[:1]).command
    except UsageError as error:
        return _fail("pgdfast", error, code=2)
    except SystemExit as stop:  # --help and --version
        return stop.code or 0

    prog = f"pgdfast {command}"
    try:
        return _COMMANDS[command](argv[1:]) or 0
    except UsageError as error:
        return _fail(prog, error, code=2)
    except WriteError as error:
        return _fail(prog, error, code=1)
    except SystemExit as stop:
        return stop.code or 0
    except KeyboardInterrupt:
        return _fail(
            prog,
            "interrupted; no result is half written, and --resume goes on from the last checkpoint if there is one",
            code=130,
        )


def _run(argv):
    """`pgdfast run TASK [options]`: the options are the task's own. `pgdfast run all`: every task with its own."""
    known = f"{', '.join(tasks.TASKS)}, all"
    if argv[:1] in (["-h"], ["--help"]):
        _run_parser().parse_args(argv[:1])
    if not argv or argv[0].startswith("-"):
        got = f"got {argv[0]!r} where the task belongs" if argv else "no task given"
        raise UsageError(f"{got}; needed: pgdfast run TASK [options], with TASK one of: {known}")
    name = argv[0]
    if name == "all":
        from pgdfast_experiments import run_all

        return _with_own_options("pgdfast run all", run_all, argv[1:])
    if name not in tasks.TASKS:
        raise UsageError(f"unknown task {name!r}; the tasks are: {known}")

    from pgdfast_experiments import experiment

    task = tasks.load(name)
    return experiment.run(task, options.task_parser(task).parse_args(argv[1:]), ["run", *argv])


def _verify(argv):
    """`pgdfast verify [TASK ...]`."""
    from pgdfast_experiments import verify

    return _with_own_options("pgdfast verify", verify, argv)


def _bench(argv):
    """`pgdfast bench [PROBLEM ...]`, or one of the other studies of the bench folder, whose options are their own."""
    from pgdfast_experiments import bench

    if argv[:1] and argv[0] in bench.STUDIES:
        return bench.in_tree(argv, bench.STUDIES[argv[0]])
    return _with_own_options("pgdfast bench", bench, argv)


def _report(argv):
    """`pgdfast report DIR`."""
    from pgdfast_experiments import report

    return _with_own_options("pgdfast report", report, argv)


def _with_own_options(prog, module, argv):
    """Run a command whose module has SUMMARY, add_options(parser) and run(arguments)."""
    parser = OneLineParser(prog=prog, description=module.SUMMARY)
    module.add_options(parser)
    return module.run(parser.parse_args(argv))


_COMMANDS = {"run": _run, "report": _report, "verify": _verify, "bench": _bench}


def _command_parser():
    parser = OneLineParser(
        prog="pgdfast",
        usage="pgdfast COMMAND [options]",
        description="A Levenberg-Marquardt optimizer for PyTorch: its experiments.",
        epilog="commands:\n"
        "  run TASK       train on one of the experiments; write pictures, numbers and a record\n"
        "  run all        train on every experiment, one after another, and make the report\n"
        "  report DIR     put the records and pictures in a folder on one page (HTML)\n"
        "  verify [TASK]  compare the fast solver with the reference on every task\n"
        "  bench          time steps and their parts beside other packages; tables and pictures\n\n"
        "'pgdfast COMMAND --help' says more.",
    )
    parser.add_argument("--version", action=_Version)
    parser.add_argument("command", choices=_COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def _run_parser():
    width = max(map(len, tasks.TASKS))
    listing = "\n".join(f"  {name:{width}}    {line}" for name, (_, line) in tasks.TASKS.items())
    return OneLineParser(
        prog="pgdfast run",
        usage="pgdfast run TASK [options]",
        description="Train on one of the experiments of arXiv 2601.03162, or solve one of the worked differential\n"
        "equations, with several optimizers; write a picture (PNG), the numbers (CSV) and a record of every setting (JSON).",
        epilog=f"tasks:\n{listing}\n  {'all':{width}}    all of them, one after another, and a report\n\n"
        "'pgdfast run TASK --help' lists the options of a task.",
    )


class _Version(argparse.Action):
    """Print the version, looked up only when it is asked for."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs, nargs=0, help="print the version and leave")

    def __call__(self, parser, namespace, values, option_string=None):
        print(f"pgdfast {records.pgdfast_version()}")
        parser.exit(0)


def _fail(prog, message, code):
    """Print one line `prog: message` on stderr and return `code`."""
    terminal.complain(prog, message)
    return code
