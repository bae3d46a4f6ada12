"""Command-line values: their checks, and the options that every task has.

Imports no PyTorch, so that `pgdfast --help` answers at once.
"""

import argparse
import math
import os
import re
import textwrap
import types

from pgdfast_experiments.errors import UsageError


class _Paragraphs(argparse.HelpFormatter):
    """Wraps descriptions to the terminal's width, paragraph by paragraph; indented lines are items of a list."""

    def _fill_text(self, text, width, indent):
        return "\n".join(self._filled(line, width) for line in re.sub(r"(?<=\S)\n(?=\S)", " ", text).split("\n"))

    @staticmethod
    def _filled(line, width):
        item = re.match(r"\s+\S.*?\s{2,}", line)
        return textwrap.fill(line, width, subsequent_indent=" " * len(item[0]) if item else "", break_on_hyphens=False)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one `UsageError`, without the usage text."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_Paragraphs, **kwargs)

    def error(self, message):
        """Raise `UsageError` where argparse would print its usage and leave."""
        message = message.removeprefix("argument ")
        if message.startswith("unrecognized arguments: "):
            message = f"{message}; '{self.prog} --help' lists the options"
        raise UsageError(message)


def whole_number(minimum):
    """Return a reader of whole numbers of at least `minimum`."""

    def read(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < minimum:
            raise argparse.ArgumentTypeError(
                f"got {text!r}; needed: a whole number of {minimum} or more"
            )
        return value

    return read


def positive_number(text):
    """Read a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"got {text!r}; needed: a number above 0")
    return value


def numbers(text):
    """Read a comma list of finite numbers above 0, such as `0.5,1,2`, into a tuple."""
    return tuple(positive_number(part.strip()) for part in text.split(","))


def methods(known):
    """Return a reader of comma lists of optimizer names out of `known`, such as `sgd,lm-0.5,gn`."""
    from pgdfast_experiments.methods import parse

    def read(text):
        chosen = []
        for name in text.split(","):
            method = parse(name.strip(), known)
            if method is None:
                raise argparse.ArgumentTypeError(
                    f"got {name.strip()!r}; needed: a comma list of {_listing(known)}"
                )
            if method.name in [other.name for other in chosen]:
                raise argparse.ArgumentTypeError(f"got {method.name!r} twice; needed: each name once")
            chosen.append(method)
        return tuple(chosen)

    return read


def cores():
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _listing(known):
    names = ["lm-MU with MU > 0 (for example lm-0.5)" if name == "lm-MU" else name for name in known]
    return ", ".join(names)


def task_parser(task):
    """Return the parser of `pgdfast run TASK`."""
    parser = OneLineParser(prog=f"pgdfast run {task.NAME}", description=task.SUMMARY)
    add_common(parser, task)
    task.add_options(parser)
    return parser


def add_common(parser, task):
    """Add the options of every task to `parser`.

    task: its module, with NAME, KNOWN (optimizer names), RATES (learning rate by kind), DEFAULTS and QUICK (values that
    `--quick` puts in place of the defaults), dicts by option: optimizers, steps, seeds, threads.
    """
    defaults, ensembles = task.DEFAULTS, getattr(task, "ENSEMBLES", False)
    faster = ", ".join(f"--{name.replace('_', '-')} {_shown(value)}" for name, value in task.QUICK.items())
    rates = ", ".join(f"{rate:g} for {kind}" for kind, rate in task.RATES.items())
    add = parser.add_argument
    add("--optimizers", "--optimizer", type=methods(task.KNOWN), metavar="LIST",
        help=f"comma list of {_listing(task.KNOWN)} (default: {defaults['optimizers']})")
    add("--steps", type=whole_number(1), metavar="N",
        help=f"steps of every optimizer (default: {_shown(defaults['steps'])})")
    add("--seeds", type=whole_number(1), metavar="N",
        help=f"how many runs of each optimizer, from seed 0 up (default: {defaults['seeds']})")
    add("--lr", type=positive_number, metavar="ETA",
        help=f"learning rate of every optimizer (default: {rates})")
    add("--quick", action="store_true",
        help=f"a run of at most a minute that still shows the mechanism: {faster}, where not given")
    add("--out", default=f"runs/{task.NAME}", metavar="DIR",
        help="folder for the results, made where missing (default: %(default)s)")
    add("--resume", action="store_true",
        help="go on where an interrupted run with the same options in the same folder stopped")
    add("--backend", choices=("auto", "native", "torch", "reference"), default="auto",
        help="which implementation of LM runs (default: %(default)s)")
    add("--threads", type=whole_number(1), metavar="N",
        help=f"CPU threads of PyTorch (default: {defaults['threads']}{'; of ensembles all cores' if ensembles else ''})")
    if ensembles:
        add("--sequential", action="store_true",
            help="train every network by itself; without it the LM runs of one damping that differ only in seed or alpha are "
                 "one ensemble (first-order methods, Gauss-Newton and hybrids always run one after another)")


def _shown(value):
    if isinstance(value, dict):
        return ", ".join(f"{_shown(item)} for {kind}" for kind, item in value.items())
    return ",".join(f"{item:g}" for item in value) if isinstance(value, tuple) else str(value)


def fill(task, arguments):
    """Return `arguments` as a namespace; what was not given comes from the task's DEFAULTS, or QUICK."""
    values = vars(arguments)
    defaults, quick = task.adjust(values) if hasattr(task, "adjust") else (task.DEFAULTS, task.QUICK)
    fallback = {**defaults, **quick} if values["quick"] else defaults
    filled = {name: fallback[name] if value is None and name in fallback else value for name, value in values.items()}
    if isinstance(filled["optimizers"], str):
        filled["optimizers"] = methods(task.KNOWN)(filled["optimizers"])
    return Settings(task.RATES, ensemble_threads=values["threads"] or cores(), **filled)


class Settings(types.SimpleNamespace):
    """The values of a run's options, with what depends on the optimizer."""

    def __init__(self, rates, **values):
        super().__init__(**values)
        self._rates = rates

    def rate(self, method):
        """Return the learning rate of a method: --lr, or the task's for its kind."""
        return self.lr if self.lr is not None else self._rates.get(method.name, self._rates.get(method.kind))

    def steps_of(self, method):
        """Return how many steps a method takes: --steps, or the task's for its kind."""
        if not isinstance(self.steps, dict):
            return self.steps
        return self.steps.get(method.name, self.steps.get(method.kind))

    def plain(self):
        """Return everything that decides what is computed, as plain values for records and checkpoints."""
        silent = ("out", "resume", "quick", "sequential", "ensemble_threads", "nproc", "_rates")
        values = {name: value for name, value in vars(self).items() if name not in silent}
        values["optimizers"] = [method.name for method in self.optimizers]
        values["lr"] = {method.name: self.rate(method) for method in self.optimizers}
        values["steps"] = {method.name: self.steps_of(method) for method in self.optimizers}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
