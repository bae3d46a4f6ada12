"""Times several calls in turn, so that a machine that drifts or is shared slows all of them alike."""

import gc
import math
import os
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import torch

THREADS = (1, 2) if (os.cpu_count() or 1) > 1 else (1,)
BATCH_SECONDS = 5e-3   # a timed batch of calls lasts about this long


@dataclass
class Row:
    """Something to time: `call`, and `reset`, which is not timed and runs before every batch."""

    name: str
    call: object
    reset: object = None
    flops: float | None = None


@dataclass
class Timing:
    """Seconds per call, one number per round and thread count."""

    row: Row
    seconds: dict[int, list[float]] = field(default_factory=lambda: {n: [] for n in THREADS})

    @property
    def threads(self):
        """The thread count at which this row is fastest."""
        return min(self.seconds, key=lambda n: median(self.seconds[n]))

    @property
    def best(self):
        """Seconds per call of every round, at the best thread count."""
        return self.seconds[self.threads]

    @property
    def gflops(self):
        """10^9 operations per second, by the median; None where operations are not counted."""
        return None if self.row.flops is None else self.gflops_with(self.threads)

    def gflops_with(self, threads):
        return self.row.flops / median(self.seconds[threads]) / 1e9


@dataclass
class Ratio:
    """One row's time over another's, round by round, each at its best thread count."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, one, other):
        ratios = [a / b for a, b in zip(one.best, other.best, strict=True)]
        return cls(min(ratios), median(ratios), max(ratios))


def interleaved(rows, rounds):
    """{name: Timing}. In a round every row runs once for each thread count, in alternating order."""
    timings = {row.name: Timing(row) for row in rows}
    before, collecting = torch.get_num_threads(), gc.isenabled()
    try:
        counts = {}
        for threads in THREADS:
            torch.set_num_threads(threads)
            counts |= {(row.name, threads): _calls_per_batch(row) for row in rows}
        gc.disable()
        for number in range(rounds):
            order = rows if number % 2 == 0 else rows[::-1]
            for threads in THREADS:
                torch.set_num_threads(threads)
                for row in order:
                    seconds = _batch(row, counts[row.name, threads])
                    timings[row.name].seconds[threads].append(seconds)
            gc.collect()
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()
    return timings


def _calls_per_batch(row):
    for _ in range(3):
        seconds = _batch(row, 1)
    return min(max(math.ceil(BATCH_SECONDS / seconds), 1), 500)


def _batch(row, calls):
    if row.reset is not None:
        row.reset()
    row.call()   # wakes the threads and fills the caches; not timed
    start = perf_counter()
    for _ in range(calls):
        row.call()
    return (perf_counter() - start) / calls


class Recorded:
    """A timer for pytest-benchmark that hands it what `interleaved` measured.

    pytest-benchmark runs one function's rounds after another's; here they were taken in turn. Its table, its JSON and
    its comparisons show these numbers, though the function it calls meanwhile does nothing.
    """

    __name__ = "interleaved"

    def __init__(self):
        self._now, self._running, self._seconds = 0.0, False, iter(())

    def __call__(self):
        if self._running:
            self._now += next(self._seconds)
        self._running = not self._running
        return self._now

    def hand_over(self, benchmark, seconds):
        self._now, self._running, self._seconds = 0.0, False, iter(seconds)
        benchmark.pedantic(lambda: None, rounds=len(seconds))
