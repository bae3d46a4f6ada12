"""`pgdfast run TASK --nproc N`: one run in N processes of torch.distributed, each with rows of its own.

The command starts itself N times by torchrun; rank 0 alone writes and prints. Without --nproc every function here is that of
one process.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

from pgdfast_experiments.errors import UsageError

_ARGUMENTS = "PGDFAST_ARGUMENTS"
_PATIENCE = 10.0   # seconds that processes have to end after Ctrl-C


def inside():
    """Whether this process is one of several that torchrun has started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def launch(argv, settings):
    """Run `pgdfast` with these arguments in settings.nproc processes; return the exit code, 0 or 1."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(settings.nproc), __file__]
    # Not on its command line, where torchrun would take --nproc for an abbreviation of its own option.
    environment = os.environ | {_ARGUMENTS: json.dumps(list(argv)), "OMP_NUM_THREADS": str(settings.threads)}
    process = subprocess.Popen(command, env=environment)
    try:
        return int(process.wait() != 0)
    except KeyboardInterrupt:   # which they have had, too
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
        process.terminate()
        raise


@contextlib.contextmanager
def joined(settings):
    """Yield the rank of this process among those of the run, 0 of one. Raises UsageError where there are not as many."""
    if getattr(settings, "nproc", 1) == 1 or not inside():
        yield 0
        return
    import torch.distributed as dist

    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != settings.nproc:
        raise UsageError(f"--nproc {settings.nproc} was given, and torchrun has started {started} processes; make them equal")
    dist.init_process_group("gloo")
    try:
        with contextlib.ExitStack() as quiet:
            if dist.get_rank():
                nothing = quiet.enter_context(open(os.devnull, "w", encoding="utf-8"))
                quiet.enter_context(contextlib.redirect_stdout(nothing))
                quiet.enter_context(contextlib.redirect_stderr(nothing))
            yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def group():
    """The process group of the run; None of one process."""
    import torch.distributed as dist

    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def share():
    """Which rows of all are this process's, a slice."""
    import torch.distributed as dist

    return slice(None) if group() is None else slice(dist.get_rank(), None, dist.get_world_size())


def total(number):
    """The sum of all processes' numbers, a float."""
    return _reduced(number, lambda dist, t: dist.all_reduce(t))


def of_first(number):
    """Rank 0's number, a float: what depends on the clock is to be decided alike."""
    return _reduced(number, lambda dist, t: dist.broadcast(t, 0))


def _reduced(number, collective):
    if group() is None:
        return number
    import torch
    import torch.distributed as dist

    t = torch.tensor([number], dtype=torch.float64)
    collective(dist, t)
    return float(t)


if __name__ == "__main__":   # in the processes that `launch` starts
    sys.path[0] = str(Path(__file__).resolve().parent.parent)   # in place of this folder, whose names are those of a package
    from pgdfast_experiments.cli import main

    sys.exit(main(json.loads(os.environ[_ARGUMENTS])))
