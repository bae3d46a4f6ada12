"""The files of a run: numbers (CSV), settings and summary (JSON); all of them written, or none."""

import contextlib
import csv
import json
import math
import os
import platform
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np

from pgdfast_experiments.errors import UsageError, WriteError


def prepare_folder(path, option="--out"):
    """Make the folder `path`, which `option` named, where missing, prove that a file can be made in it, and return it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"{option}: got {str(path)!r} ({reason}); needed: a folder that can be made and written to"
        ) from error
    return path


@contextlib.contextmanager
def all_or_nothing(folder):
    """Yield a scratch folder whose files move into `folder` when the block ends well.

    When it does not (an error, Ctrl-C), the scratch folder goes and `folder` is as it was. Each
    file is put in place by a rename, so that a reader never sees half of one.
    """
    scratch = None
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
        yield scratch
        for file in sorted(scratch.iterdir()):
            os.replace(file, folder / file.name)
    except OSError as error:
        raise WriteError(f"could not write the results to {str(folder)!r}: {error}") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def write_csv(path, runs):
    """Write one row per optimizer, variant, seed and measured step, with every digit (a float reads back as itself).

    A run that ended early has rows up to where it ended. `seconds` is the wall time spent in steps so far.
    """
    names = list(runs[0].columns)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["optimizer", "variant", "seed", "step", *names, "seconds"])
        for run in runs:
            table = np.stack([run.columns[name] for name in names], axis=1).tolist()
            for step, row, seconds in zip(run.at.tolist(), table, run.seconds.tolist(), strict=True):
                if step <= run.last:
                    writer.writerow([*run.key, step, *row, seconds])


def write_json(path, record):
    """Write `record` as JSON; a value that is not finite becomes null."""
    text = json.dumps(_plain(record), indent=2, allow_nan=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def as_read(value):
    """Return `value` as it reads after `write_json`: tuples are lists, keys are text, what is not finite is None."""
    return json.loads(json.dumps(_plain(value), allow_nan=False))


def pgdfast_version():
    """Return the installed version of pgdfast, or in words that it is not installed."""
    try:
        return metadata.version("pgdfast")
    except metadata.PackageNotFoundError:
        return "not installed (run from its source folder)"


def versions():
    """Return the versions of pgdfast and of what it runs on."""
    import torch  # here and below: reports and help texts do without it

    return {
        "pgdfast": pgdfast_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def machine():
    """Return the machine as far as it decides about times and rounding."""
    import torch

    return {
        "platform": platform.platform(),
        "architecture": platform.machine(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
