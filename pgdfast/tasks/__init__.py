"""The experiments: one file each, and this table.

A new task is one file and one line in `TASKS`. Its module has three names:

    SUMMARY                a paragraph for `--help`: data, model, loss, what is compared
    add_options(parser)    its command-line options (`options.add_common` has those of every task)
    run(arguments) -> int  check the values, train, write the files, print the table; an exit code

What the tasks share lies beside them: `options` (command-line values), `methods` (optimizers by
name), `models`, `training` (the loop and its clock), `measures` (Fourier modes, decay fits,
checks), `records` (CSV, JSON, all-or-nothing writing), `plotting` and `terminal`.
Tasks use the public names of pgdfast alone, as any user would.
"""

import importlib

TASKS = {
    "regression-1d": ("regression_1d", "three sines by a tanh network: the error by Fourier mode"),
}


def load(name):
    """Import the module of the task `name`, a key of `TASKS`."""
    module, _ = TASKS[name]
    return importlib.import_module(f"{__name__}.{module}")
