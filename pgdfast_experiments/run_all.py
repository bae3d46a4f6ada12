"""`pgdfast run all`: every task with its own defaults, one after another, and a report of them all."""

import traceback

from pgdfast_experiments import experiment, locks, options, records, report, tasks, terminal
from pgdfast_experiments.errors import UsageError, WriteError
from pgdfast_experiments.methods import check_backend

SUMMARY = """\
Run every task, and mnist a second time with its cross-entropy, one after another with the options
that each has by default, into one folder; then make the report (see 'pgdfast report --help').

A task that fails (MNIST's files may be missing) is named, and the others go on; the exit code is
then 1. With --resume, tasks that are complete in the folder with the same settings are skipped,
and an interrupted one goes on where it stopped."""


def add_options(parser):
    """Add the options of the command to `parser`; each reaches the tasks that know it."""
    add = parser.add_argument
    add("--out", default="runs/all", metavar="DIR",
        help="folder for the results of all tasks, made where missing (default: %(default)s)")
    add("--quick", action="store_true", help="the quick run of every task, a few minutes in all")
    add("--resume", action="store_true", help="skip what is complete, go on with what was interrupted")
    add("--data", metavar="DIR", help="folder with the MNIST files (default: PGDFAST_DATA, else a download)")
    add("--threads", type=options.whole_number(1), metavar="N", help="CPU threads of PyTorch (default: each task's own)")
    add("--backend", choices=("auto", "native", "torch", "reference"), default="auto",
        help="which implementation of LM runs (default: %(default)s)")


def run(arguments):
    """Run all tasks and make the report; return 0, or 1 if a task failed."""
    terminal.require_extras("matplotlib", "rich", "jinja2")
    folder = records.prepare_folder(arguments.out)
    with locks.only_run(folder):
        check_backend(options.methods(("lm",))("lm"), arguments.backend)  # once, instead of a failure of every task
        return _run_in(folder, arguments)


def _run_in(folder, arguments):
    failed = []
    for number, (name, command) in enumerate(tasks.ALL.items(), 1):
        place = f"{number} of {len(tasks.ALL)}: {name}"
        try:
            task = tasks.load(command[0])
            own = _arguments(task, command[1:], arguments)
            if arguments.resume and experiment.complete(folder, name, options.fill(task, own).plain()):
                terminal.say(f"{place} is complete in {folder} with these settings: skipped\n", "bold")
                continue
            terminal.say(place, "bold")
            experiment.run(task, own)
        except (UsageError, WriteError) as error:
            terminal.complain(f"pgdfast run all: {name}", error)
            failed.append(name)
        except Exception:  # a fault in one task; those hours away from it still run
            traceback.print_exc()
            failed.append(name)
    if failed:
        terminal.complain("pgdfast run all", f"{len(failed)} of {len(tasks.ALL)} failed: {', '.join(failed)}")
    try:
        report.write(folder)
    except UsageError as error:  # nothing to report on
        terminal.complain("pgdfast run all", error)
    return 1 if failed else 0


def _arguments(task, command, given):
    """Return the task's own options, with those `given` to all that it knows."""
    own = options.task_parser(task).parse_args(command)
    for name, value in vars(given).items():
        if hasattr(own, name) and value is not None:
            setattr(own, name, value)
    return own
