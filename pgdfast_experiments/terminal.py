"""What a run shows in the terminal: a progress bar on stderr, tables and verdicts on stdout."""

import contextlib
import importlib.util
import sys

from pgdfast_experiments.errors import UsageError
from pgdfast_experiments.measures import FAIL, OPEN, PASS

_STYLES = {PASS: "green", FAIL: "bold red", OPEN: "yellow"}


def require_extras(*names):
    """Raise `UsageError` when one of the packages `names`, which only the experiments need, is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f'{" and ".join(missing)} missing, which pictures, tables and reports need: '
            'pip install "pgdfast[run]"'
        )


@contextlib.contextmanager
def progress(total, unit="steps"):
    """Show a bar of `total` steps or seconds; yields `announce(text)` and `advance(count)`."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, description=text), lambda count: bar.advance(task, count)


def show_table(title, columns, rows, notes=()):
    """Print a table: `columns` are headings, `rows` lists of text, `notes` lines below it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(Text(title, style="bold"))
    table = Table(box=box.SIMPLE_HEAD)
    for index, heading in enumerate(columns):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for note in notes:
        console.print(Text(f"  {note}"))
    console.print()


def show_checks(checks):
    """Print the verdict of each check with what was claimed and what was measured."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()
    console.print(Text("checks", style="bold"))
    for check in checks:
        verdict = Text.assemble((check.outcome, _STYLES[check.outcome]), ": ", check.claim)
        console.print(Padding(verdict, (0, 0, 0, 2)))
        console.print(Padding(Text(check.measured), (0, 0, 0, 6)))
    console.print()


def complain(who, message):
    """Print one line `who: message` on stderr."""
    print(f"{who}: {' '.join(str(message).split())}", file=sys.stderr)


def say(text, style):
    """Print one line in a style."""
    from rich.console import Console
    from rich.text import Text

    Console(soft_wrap=True).print(Text(text, style=style))


def show_files(files):
    """Print where the results lie."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    for file in files:
        console.print(Text(f"wrote {file}"))
