"""What survives an interruption: finished runs and the states of those under way, in one file."""

import io
import time

import numpy as np
import torch

from pgdfast_experiments import records
from pgdfast_experiments.errors import UsageError, WriteError
from pgdfast_experiments.training import Run


class Checkpoint:
    """The checkpoint of one task in one folder.

    settings: plain values that decide what is computed; a file made with others is refused. interval: seconds between
    two writes at most. writes: False in processes that leave that to another. Every write goes to a new file that then
    takes the old one's place, so that a reader, or the next run, never sees half of one.
    """

    def __init__(self, path, settings, interval=30.0, writes=True):
        self.path, self.settings, self.interval, self._writes = path, settings, interval, writes
        self.runs, self.current = [], {}   # current: states of runs under way, by key
        self._written = time.monotonic()

    @property
    def exists(self):
        """Whether an interrupted run left its file."""
        return self.path.exists()

    def load(self):
        """Read the file.

        Raises UsageError if it cannot be read, or was made with other settings (it names them).
        """
        try:
            found = torch.load(self.path, weights_only=True)
            settings = found["settings"]
        except Exception as error:
            raise UsageError(
                f"--resume: {str(self.path)!r} cannot be read ({type(error).__name__}); delete it and start again"
            ) from error
        if told := records.differences(settings, self.settings):
            raise UsageError(
                f"--resume: {str(self.path)!r} was made with other settings ({told}); give the same ones, or delete it"
            )
        self.runs = [_run(values) for values in found["runs"]]
        self.current = {tuple(state["key"]): state for state in found["current"]}

    def done(self, key):
        """Return the finished run of this key, or None."""
        return next((run for run in self.runs if run.key == key), None)

    def saved(self, key):
        """Return the state that the interrupted run of this key had, or None."""
        return self.current.get(key)

    def finish(self, run):
        """Note a finished run; it is on disk after at most `interval` seconds more of work."""
        self.runs.append(run)
        self.current.pop(run.key, None)
        self.keep(list)

    def note(self, states):
        """Note the states of runs under way, each in place of its earlier one."""
        self.current |= {tuple(state["key"]): state for state in states}

    def keep(self, states):
        """Write, if the last write is `interval` seconds past; `states()` gives those of runs under way that have changed."""
        if time.monotonic() - self._written >= self.interval:
            self.write(states())

    def write(self, states=()):
        """Write the file now.

        Raises WriteError if that fails, a full disk for one; the file of the last write is then as it was.
        """
        self.note(states)
        if not self._writes:
            self._written = time.monotonic()
            return
        values = {
            "settings": self.settings, "runs": [_values(run) for run in self.runs], "current": list(self.current.values()),
        }
        content = io.BytesIO()
        torch.save(values, content)   # in memory: a file that torch.save cannot write is no OSError
        try:
            records.write_whole(self.path, content.getbuffer())
        except OSError as error:
            advice = ("make room; --resume then goes on from the checkpoint written before" if self.exists else
                      "there is no earlier one to go on from")
            raise WriteError(f"could not write {str(self.path)!r}: {error.strerror or error}; {advice}") from error
        self._written = time.monotonic()

    def remove(self):
        """Delete the file: the results are written."""
        self.path.unlink(missing_ok=True)


def _values(run):
    return {
        "key": list(run.key), "at": torch.from_numpy(np.asarray(run.at)), "last": run.last, "stopped_at": run.stopped_at,
        "columns": {name: torch.from_numpy(column) for name, column in run.columns.items()},
        "step_seconds": torch.from_numpy(run.step_seconds), "outcome": run.outcome,
    }


def _run(values):
    columns = {name: column.numpy() for name, column in values["columns"].items()}
    return Run(*values["key"], values["at"].numpy(), columns, values["step_seconds"].numpy(), values["last"],
               values["stopped_at"], values["outcome"])
