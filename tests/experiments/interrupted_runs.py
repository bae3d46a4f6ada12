"""Runs of the command that are killed, or find the disk full, at chosen moments: each in a fork of this process.

    python interrupted_runs.py '[[moment, argv], ...]'

prints a line of JSON for each: its exit status (negative: the signal) and what it wrote to stderr. Checkpoints are written
after every step.
"""

import contextlib
import json
import os
import resource
import signal
import sys
import tempfile
import traceback
from pathlib import Path

from pgdfast_experiments import checkpoints, plotting, records, regression_1d, report
from pgdfast_experiments.cli import main


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fill_up():
    """From now on no file of this process can grow beyond 100 bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


def before(owner, name, act, number=1, where=lambda *_: True):
    """Have `act` called right before the given call of a function."""
    function, count = getattr(owner, name), 0

    def wrapped(*given):
        nonlocal count
        count += where(*given)
        if count == number and where(*given):
            act(*given)
        return function(*given)

    setattr(owner, name, wrapped)


def half(file):
    """Cut the file that is about to be settled in half, and die."""
    os.ftruncate(file, os.fstat(file).st_size // 2)
    die()


def to(ending):
    """Return whether a file is renamed to a name of this ending."""
    return lambda part, path: str(path).endswith(ending)


MOMENTS = {
    "first step": lambda: before(checkpoints.Checkpoint, "keep", lambda *_: die()),
    "half the first checkpoint": lambda: before(os, "fsync", half),
    "half a later checkpoint": lambda: before(os, "fsync", half, 9),   # a file, its folder, a file, ...
    "checkpoint not yet in place": lambda: before(os, "replace", lambda *_: die(), 11),
    "between two checkpoints": lambda: before(checkpoints.Checkpoint, "keep", lambda *_: die(), 14),
    "pictures": lambda: before(plotting, "save", lambda *_: die()),
    "results not yet in place": lambda: before(os, "replace", lambda *_: die(), where=to(".csv")),
    "some results in place": lambda: before(os, "replace", lambda *_: die(), where=to(".json")),
    "results in place": lambda: before(checkpoints.Checkpoint, "remove", lambda *_: die()),
    "full at the start": fill_up,
    "full at the first checkpoint": lambda: before(records, "write_whole", lambda *_: fill_up()),
    "full at a later checkpoint": lambda: before(records, "write_whole", lambda *_: fill_up(), 6),
    "full at the numbers": lambda: before(records, "write_csv", lambda *_: fill_up()),
    "full at the record": lambda: before(records, "write_json", lambda *_: fill_up()),
    "full at the pictures": lambda: before(plotting, "save", lambda *_: fill_up()),
    "full at the page": lambda: before(report, "render", lambda *_: fill_up()),
}


def run(moment, argv):
    """Run `argv` in a fork that ends at the moment; returns (status, stderr)."""
    reads, writes = os.pipe()   # not a file, which fill_up would limit
    child = os.fork()
    if child == 0:
        os.dup2(writes, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        MOMENTS[moment]()
        code = 99   # of a traceback
        try:
            code = main(argv)
        except Exception:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writes)
    with os.fdopen(reads) as said:
        text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


if __name__ == "__main__":
    checkpoints.Checkpoint.keep = lambda self, states: self.write(states())
    regression_1d.pictures = lambda *_: {"": (None, "nothing to see")}
    plotting.save = lambda figure, path: Path(path).write_bytes(bytes(1000))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):   # what is imported late, once for all
        main(["run", "regression-1d", "--optimizers", "adam,lm-1", "--steps", "1", "--seeds", "2", "--threads", "1",
              "--out", folder])
    for moment, argv in json.loads(sys.argv[1]):
        print(json.dumps(run(moment, argv)), flush=True)
