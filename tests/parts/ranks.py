"""Functions on the ranks of a process group: gloo processes, each of one thread, that wait for work.

    pool = Pool(4)
    values = pool.run(2, function, *arguments)   # [function(group, *arguments) on ranks 0 and 1 of a group of 2]

A function stands in a module that can be imported. Processes that fail or do not answer are killed, and new ones started.
"""

import contextlib
import datetime
import faulthandler
import multiprocessing
import sys
import tempfile
import time
import traceback
import uuid
from pathlib import Path

TIMEOUT = 60   # seconds, of the groups


class RankError(AssertionError):
    """A function raised on a rank, or a rank did not answer."""


class Pool:
    """As many processes as its largest group has ranks; groups of fewer consist of the first ones."""

    def __init__(self, count, timeout=TIMEOUT):
        self.count, self.timeout, self._processes, self._pipes = count, timeout, [], []

    def start(self):
        context = multiprocessing.get_context("spawn")
        store = Path(tempfile.mkdtemp(prefix="ranks-")) / uuid.uuid4().hex
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.count, str(store), self.timeout, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, size, function, *arguments, timeout=300, expect_death=()):
        """What the function returns on each rank, by rank; None of those that are to die.

        Raises RankError with the traceback of a rank that raised, or where one dies or does not answer.
        """
        if not self._processes:
            self.start()
        for pipe in self._pipes[:size]:
            pipe.send((size, function, arguments))
        answers, end = [], time.monotonic() + timeout
        for rank, pipe in enumerate(self._pipes[:size]):
            try:
                if not pipe.poll(max(0.0, end - time.monotonic())):
                    raise TimeoutError
                answers.append(pipe.recv())
            except (EOFError, OSError) as error:   # TimeoutError is an OSError
                if rank in expect_death and not isinstance(error, TimeoutError):
                    answers.append((None, ""))
                    continue
                self.stop()
                what = "did not answer" if isinstance(error, TimeoutError) else "died"
                raise RankError(f"rank {rank} of {size} {what}") from None
        errors = [f"rank {rank} of {size}:\n{text}" for rank, (_, text) in enumerate(answers) if text]
        if errors:
            self.stop()
            raise RankError("\n".join(errors))
        return [value for value, _ in answers]

    def stop(self):
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


def _serve(rank, count, store, timeout, pipe):
    import torch
    import torch.distributed as dist

    faulthandler.enable()
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=wait)
    groups = {size: dist.new_group(range(size), timeout=wait) for size in range(1, count)} | {count: dist.group.WORLD}
    with contextlib.suppress(EOFError):
        while True:
            size, function, arguments = pipe.recv()
            try:
                answer = function(groups[size], *arguments), ""
            except BaseException:
                answer = None, traceback.format_exc()
            pipe.send(answer)
            sys.stdout.flush()
