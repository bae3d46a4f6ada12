"""One run at a time in a folder: a lock that ends with its process, however that ends."""

import contextlib
import errno
import os
import socket
import time

from pgdfast_experiments import terminal
from pgdfast_experiments.errors import UsageError, WriteError

try:
    import fcntl
except ImportError:   # Windows
    fcntl = None

NAME = ".pgdfast-lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held = set()   # folders that this process has locked


@contextlib.contextmanager
def only_run(folder):
    """Keep the runs of other processes out of `folder` during the block; blocks of one process may be nested.

    The lock is the operating system's, on a file that says who holds it: a killed process lets go of it. The file is removed
    at the end, and one that a killed process left behind is taken over. Where the file system has no locks a note says so.

    Raises UsageError if another process holds the lock, WriteError if the file cannot be written.
    """
    place = os.path.realpath(folder)
    if place in _held:
        yield
        return
    path = os.path.join(place, NAME)
    try:
        file = _locked(path, folder)
    except OSError as error:
        raise WriteError(f"could not write the lock {path!r}: {error.strerror}") from error
    _held.add(place)
    try:
        yield
    finally:
        _held.discard(place)
        _release(file, path)


def _locked(path, folder):
    """Return the open, locked file of this path, or None where there are no locks."""
    while fcntl is not None:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _same(file, path):   # its last holder removed it after it was opened here
                os.close(file)
                continue
            os.ftruncate(file, 0)
            now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}, since {now}".encode())
            return file
        except BlockingIOError:
            holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(file)
            raise UsageError(
                f"--out: the folder {str(folder)!r} is in use by another run ({holder}); wait until it ends, or give another "
                "folder"
            ) from None
        except OSError as error:
            _release(file, path)
            if error.errno not in _UNSUPPORTED:
                raise
            break
    terminal.complain("note", f"no locks in the folder {str(folder)!r}: let no other run write to it meanwhile")
    return None


def _same(file, path):
    """Whether the open file is the one of this path."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), os.stat(path))
    return False


def _release(file, path):
    """Remove the lock's file while the lock is held, so that nobody else's is removed, and let go of it."""
    if file is not None:
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(file)
