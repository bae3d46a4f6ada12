"""Times several calls in turn, so that a machine that drifts or is shared slows all of them alike."""

import gc
import math
import os
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import torch

THREADS = (1, 2) if (os.cpu_count() or 1) > 1 else (1,)
OWN = 0                # the "thread count" of a library that keeps its own threads, such as XLA
BATCH_SECONDS = 5e-3   # a timed batch of calls lasts about this long
ROW_SECONDS = 2.0      # what all rounds of a row may take for one thread count: slow rows sit out most rounds
SLOW = 0.1             # calls above this are their own batch, and need no call before it to wake the threads
PICKY = 0.5            # calls above this run with the thread count that was faster at first
LAZY = 3.0             # a call above this is timed from its first run on, with the most threads: two runs in all


@dataclass
class Row:
    """Something to time: `call`, and `reset`, which is not timed and runs before every batch.

    flops: operations of a call, where they are counted. threads: the counts to try. share: how many equal parts a call has;
    the time of one is given.
    """

    name: str
    call: object
    reset: object = None
    flops: float | None = None
    threads: tuple[int, ...] = THREADS
    share: int = 1


@dataclass
class Timing:
    """Seconds per call: by thread count, by round. A slow row has no number for the rounds it sat out."""

    row: Row
    seconds: dict[int, dict[int, float]]
    _threads: int | None = field(default=None, repr=False)

    @property
    def threads(self):
        """The thread count at which this row is fastest."""
        if self._threads is None:
            self._threads = min(self.seconds, key=lambda n: median(self.seconds[n].values()))
        return self._threads

    @property
    def rounds(self):
        """{round: seconds per call} at the best thread count."""
        return self.seconds[self.threads]

    @property
    def best(self):
        """Seconds per call of every round, at the best thread count."""
        return list(self.rounds.values())

    @property
    def median(self):
        return median(self.best)

    @property
    def gflops(self):
        """10^9 operations per second, by the median; None where operations are not counted."""
        return None if self.row.flops is None else self.row.flops / self.median / 1e9


@dataclass
class Ratio:
    """One row's time over another's, round by round, each at its best thread count."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, one, *others):
        """`one` over the sum of `others`, in the rounds that all of them ran in."""
        both = [k for k in one.rounds if all(k in other.rounds for other in others)]
        if not both:   # slow rows that never met
            value = one.median / sum(other.median for other in others)
            return cls(value, value, value)
        ratios = [one.rounds[k] / sum(other.rounds[k] for other in others) for k in both]
        return cls(min(ratios), median(ratios), max(ratios))


def difference(name, less, more, steps, flops=None):
    """The timing of one of `steps` equal steps by which `more` exceeds `less`, at the best thread count of `more`."""
    threads = more.threads
    a, b = less.seconds.get(threads, less.rounds), more.seconds[threads]
    values = {k: max(b[k] - a[k], 1e-9) / steps for k in b if k in a}
    return Timing(Row(name, None, flops=flops), {threads: values})


def interleaved(rows, rounds, budget=ROW_SECONDS):
    """{name: Timing}. In a round every row runs once for each thread count, in alternating order.

    Rows so slow that all rounds would take more than `budget` seconds run in some of them, evenly spread, and above PICKY
    seconds with the thread count of the faster first call only; those above LAZY seconds run twice in all.
    """
    timings = {row.name: Timing(row, {}) for row in rows}
    before, collecting = torch.get_num_threads(), gc.isenabled()
    try:
        plans = {}
        for row in rows:
            plans.update(_plan(row, rounds, budget, timings[row.name]))
        gc.disable()
        for number in range(1, rounds + 1):
            order = rows if number % 2 else rows[::-1]
            for threads in (OWN, *THREADS):
                torch.set_num_threads(threads or THREADS[-1])
                for row in order:
                    plan = plans.get((row.name, threads))
                    if plan is not None and number in plan.rounds:
                        timings[row.name].seconds[threads][number] = _batch(row, plan.calls, plan.wake)
            gc.collect()
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()
    return timings


@dataclass
class _Plan:
    calls: int       # per batch
    wake: bool       # call once before, not timed: wakes the threads and fills the caches
    rounds: set      # to run in


def _plan(row, rounds, budget, timing):
    """{(row name, threads): _Plan}, from a few calls; a very slow first one is kept as a measurement."""
    first = {}
    for threads in reversed(row.threads):
        torch.set_num_threads(threads or THREADS[-1])
        seconds = row.share * _batch(row, 1, False)
        if seconds > LAZY:
            timing.seconds[threads] = {0: seconds / row.share}
            return {(row.name, threads): _Plan(1, False, {(rounds + 1) // 2})}
        for _ in range(2 if seconds < SLOW else 1):
            seconds = min(seconds, row.share * _batch(row, 1, False))
        first[threads] = seconds
    best = min(first, key=first.get)
    if first[best] > PICKY:
        first = {best: first[best]}
    timing.seconds.update({threads: {} for threads in first})
    return {(row.name, threads): _Plan(calls_per_batch(seconds), seconds < SLOW, spread(rounds, seconds, budget))
            for threads, seconds in first.items()}


def calls_per_batch(seconds):
    return min(max(math.ceil(BATCH_SECONDS / seconds), 1), 500)


def spread(rounds, seconds, budget=ROW_SECONDS):
    """The rounds out of 1 .. `rounds`, evenly spread and at least 3 if there are, that a row of such calls runs in."""
    batch = seconds * (calls_per_batch(seconds) + (seconds < SLOW))
    count = min(rounds, max(3, int(budget / batch)))
    return {1 + k * (rounds - 1) // max(count - 1, 1) for k in range(count)}


def _batch(row, calls, wake):
    if row.reset is not None:
        row.reset()
    if wake:
        row.call()
    start = perf_counter()
    for _ in range(calls):
        row.call()
    return (perf_counter() - start) / calls / row.share
