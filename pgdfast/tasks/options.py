"""Command-line values: their checks, and the options that every task has."""

import argparse
import math

from pgdfast.tasks.errors import UsageError


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one `UsageError`, without the usage text."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

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


def methods(text):
    """Read a comma list of optimizer names, such as `sgd,lm-0.5,gn`, into a tuple of methods."""
    from pgdfast.tasks.methods import NAMES, parse

    chosen = []
    for name in text.split(","):
        method = parse(name.strip())
        if method is None:
            raise argparse.ArgumentTypeError(
                f"got {name.strip()!r}; needed: a comma list of {NAMES}"
            )
        if method.name in [other.name for other in chosen]:
            raise argparse.ArgumentTypeError(f"got {method.name!r} twice; needed: each name once")
        chosen.append(method)
    return tuple(chosen)


def add_common(parser, task, defaults, quick):
    """Add the options of every task.

    Args:
        parser: the task's parser.
        task: its name, for the default folder.
        defaults: dict of default values by option (`optimizers`, `steps`, `seeds`, `lr`).
        quick: the values that `--quick` puts in place of some of them.

    """
    faster = ", ".join(f"--{name} {value}" for name, value in quick.items())
    add = parser.add_argument
    add("--optimizers", type=methods, default=defaults["optimizers"], metavar="LIST",
        help="comma list of sgd, adam, gn, lm-MU with any MU > 0 (default: %(default)s)")
    add("--steps", type=whole_number(1), metavar="N",
        help=f"optimizer steps of every run (default: {defaults['steps']})")
    add("--seeds", type=whole_number(1), metavar="N",
        help=f"how many runs of each optimizer, from seed 0 up (default: {defaults['seeds']})")
    add("--lr", type=positive_number, metavar="ETA",
        help=f"learning rate of every optimizer (default: {defaults['lr']:g})")
    add("--quick", action="store_true",
        help=f"a short run that still shows the mechanism: {faster}, where not given")
    add("--out", default=f"runs/{task}", metavar="DIR",
        help="folder for the results, made where missing (default: %(default)s)")
    add("--backend", choices=("auto", "native", "torch", "reference"), default="auto",
        help="which implementation of LM runs (default: %(default)s)")
    add("--threads", type=whole_number(1), default=1, metavar="N",
        help="CPU threads of PyTorch (default: %(default)s)")


def fill(arguments, defaults, quick):
    """Return `arguments` as a dict; what was not given comes from `defaults` or `quick`."""
    values = vars(arguments)
    fallback = {**defaults, **quick} if values["quick"] else defaults
    return {
        name: fallback[name] if value is None and name in fallback else value
        for name, value in values.items()
    }
