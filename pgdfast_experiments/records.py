"""The files of a run: numbers (CSV), settings and summary (JSON); all of them written, or none."""

import contextlib
import csv
import errno
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

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PROBE = 1 << 16   # bytes
_SCRATCH, _PART = ".unfinished-", ".part"


def prepare_folder(path, option="--out"):
    """Make the folder `path`, which `option` named, where missing, prove that a file can be written in it, and return it.

    Raises WriteError if there is no room for a small file, UsageError for any other reason.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(_PROBE))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        if getattr(error, "errno", None) in _FULL:
            raise WriteError(f"could not write to {str(path)!r}: {reason}; make room, or give another folder") from error
        raise UsageError(
            f"{option}: got {str(path)!r} ({reason}); needed: a folder that can be made and written to"
        ) from error
    return path


def clear_leftovers(folder):
    """Remove what runs that were killed while they wrote have left in `folder`; for the holder of its lock."""
    for scratch in folder.glob(f"{_SCRATCH}*"):
        shutil.rmtree(scratch, ignore_errors=True)
    for part in folder.glob(f"*.checkpoint*{_PART}"):
        with contextlib.suppress(OSError):
            part.unlink()


def write_whole(path, content):
    """Write the bytes `content` to `path`, which has its old or its new contents at any moment, even if the machine stops.

    What fails (OSError) or is interrupted leaves the old file, and nothing beside it; a killed process may leave a file
    whose name ends in ".part".
    """
    part = path.with_name(f"{path.name}.{os.getpid()}{_PART}")   # of this process alone
    try:
        with open(part, "wb") as file:
            file.write(content)
            _settle(file)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    _settle_folder(path.parent)


@contextlib.contextmanager
def all_or_nothing(folder, advice=""):
    """Yield a scratch folder whose files move into `folder` when the block ends well, the record (JSON) last.

    When it does not (an error, Ctrl-C, a full disk), the scratch folder goes and `folder` is as it was. Each
    file is put in place by a rename, so that a reader never sees half of one; a process that is killed between two
    renames leaves whole files, some of them new. `advice` ends the message of a WriteError.
    """
    scratch = None
    try:
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=folder))
        yield scratch
        _move(sorted(scratch.iterdir(), key=lambda file: (file.suffix == ".json", file.name)), folder, scratch / ".before")
    except OSError as error:
        raise WriteError(f"could not write the results to {str(folder)!r}: {error.strerror or error}{advice}") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _move(files, folder, before):
    """Move `files` into `folder`, all or none; `before` is a folder to be made, for those that they replace."""
    before.mkdir()
    for file in files:
        with open(file, "rb+") as written:
            _settle(written)
        _second_name(folder / file.name, before / file.name)
    begun = []
    try:
        for file in files:
            begun.append(file.name)
            os.replace(file, folder / file.name)
    except BaseException:
        for name in begun:
            if (before / name).exists():
                os.replace(before / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        raise
    _settle_folder(folder)


def _second_name(old, new):
    """Give an existing file another name as well: a link, or a copy where there are none."""
    if not old.exists():
        return
    try:
        os.link(old, new)
    except OSError:
        shutil.copy2(old, new)


def _settle(file):
    """Have the disk hold what was written to an open file: what has no room fails here at the latest."""
    file.flush()
    os.fsync(file.fileno())


def _settle_folder(folder):
    """Have the disk hold the names of a folder's files, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def differences(before, now):
    """Return in words how settings differ, the first three of them, or "" where they do not."""
    other = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return "; ".join(f"{name} was {_told(before.get(name))}, is {_told(now.get(name))}" for name in other[:3])


def _told(value):
    """Return a setting as text; one that is the same for every optimizer once."""
    if isinstance(value, dict) and value and all(item == next(iter(value.values())) for item in value.values()):
        value = next(iter(value.values()))
    return repr(value)


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
