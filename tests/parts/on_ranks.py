"""What the ranks of a process group do in tests of `pgdfast.parts.group`; each function gets its group first."""

import hashlib
import os
import pickle
import signal
import time

import torch
from helpers import mlp, rand

from pgdfast.parts.failures import LostRank
from pgdfast.parts.group import Ranks


def ranks_of(group, params=None):
    ranks = Ranks(group)
    ranks.start(params or [torch.zeros(3, dtype=torch.float64)])
    return ranks


def rows_of(rank, columns=3):
    """Rank r's rows: unequal, none on rank 1."""
    return rand((0, 4, 2, 5)[(rank + 3) % 4], columns, seed=10 + rank)


def told(act):
    """(class name, text, cause's class name) of what `act()` raises, None where it raises nothing."""
    try:
        act()
    except BaseException as error:
        return type(error).__name__, str(error), type(error.__cause__).__name__
    return None


def collectives(group):
    """Every collective of unequal rows, with its words."""
    ranks = ranks_of(group)
    t = rows_of(ranks.rank)
    found = {}

    def note(name, value):
        found[name] = value, ranks.words
        ranks.words = 0.0

    note("total", ranks.total(rand(7, seed=ranks.rank)))
    with ranks.adding((2, 3), torch.float32, torch.device("cpu")) as found_sum:
        found_sum.add_(t[:2].sum(0).float() + 1)
    note("adding", found_sum)
    note("view", ranks.total(rand(4, 6, seed=ranks.rank).T[1:3]))
    note("joined", ranks.joined(t))
    note("known", ranks.joined(t, [len(rows_of(r)) for r in range(ranks.size)]))
    note("equal", ranks.joined(rand(2, 3, seed=ranks.rank)))
    note("nobody", ranks.joined(t[:0]))
    note("no columns", ranks.joined(t[:, :0]))
    note("gather", ranks.gather(t[:, 0].float()))
    note("columns", ranks.columns_of(rows_of(ranks.rank, 7)))
    note("few columns", ranks.columns_of(t[:, :1]))
    note("objects", ranks.objects({"rank": ranks.rank}))
    note("least", ranks.least([5.0, float("inf"), -2.5, 3.0][ranks.rank]))
    note("infinite", ranks.least(float("inf")))
    note("same", ranks.same(rand(5, seed=ranks.rank)))
    note("nan", told(lambda: ranks.least(float("nan") if ranks.rank == 1 else 1.0)))
    return ranks.rank, ranks.size, found


def sums(group):
    """Sums of many lengths and sizes of numbers, as bytes, twice."""
    ranks, found = ranks_of(group), []
    for k in range(120):
        generator = torch.Generator().manual_seed(1000 * ranks.rank + k)
        length = (1, 2, 3, 5, 17, 300, 4099, 100_003)[k % 8]
        t = torch.randn(length, dtype=torch.float64, generator=generator) * 10 ** torch.randn(length, generator=generator)
        t = t.to((torch.float64, torch.float32)[k % 2])
        first, second = (ranks.total(t.clone()) for _ in range(2))
        found.append((first.numpy().tobytes(), second.numpy().tobytes()))
    return hashlib.sha256(b"".join(a for a, _ in found)).hexdigest(), all(a == b for a, b in found)


class Picky(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


ERRORS = {
    "value": lambda: ValueError("pgdfast.LM: no rows"),
    "type": lambda: TypeError("not that"),
    "memory": lambda: MemoryError("1 GB"),
    "cuda": lambda: torch.OutOfMemoryError("of memory"),
    "silent": lambda: ZeroDivisionError(),
    "key": lambda: KeyError("name"),
    "own": lambda: Picky(1, 2),
    "stop": lambda: StopIteration("end"),
    "pickle": lambda: pickle.PickleError("local"),
    "ctrl-c": lambda: KeyboardInterrupt(),
    "exit": lambda: SystemExit(3),
    "unicode": lambda: UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"),
}


def failing(group, case, who):
    """What every rank raises where these fail, {rank: name of the error}; then a sum, to see that the group still works."""
    ranks = ranks_of(group)

    def act():
        with ranks.section():
            if ranks.rank in who:
                raise ERRORS[who[ranks.rank]]()

    return told(act), float(ranks.total(torch.ones(1, dtype=torch.float64)))


def failing_sum(group):
    """Rank 1 fails on its way to a sum, of which its numbers are not finite."""
    ranks = ranks_of(group)

    def act():
        with ranks.adding((2,), torch.float64, torch.device("cpu")) as found:
            found.fill_(float("nan"))
            if ranks.rank == 1:
                raise MemoryError("no room")

    return told(act), float(ranks.total(torch.ones(1)))


def nested(group):
    """An error passes two sections, and is settled once."""
    ranks = ranks_of(group)

    def act():
        with ranks.section():
            with ranks.section():
                if ranks.rank == 1:
                    raise ValueError("inside")

    return told(act), float(ranks.total(torch.ones(1)))


def different(group, what):
    """What construction and checks say where rank 1 has something else."""
    params = list(mlp(2, 3, 1).parameters())
    other = group.rank() == 1
    if what == "shape":
        return told(lambda: ranks_of(group, params[:2] if other else params))
    if what == "dtype":
        return told(lambda: ranks_of(group, [p.float() for p in params] if other else params))
    ranks = ranks_of(group, params)
    if what == "list":   # one freezes a parameter, the others go on
        return told(lambda: ranks.start(params[1:] if other else params))
    if what == "option":
        return told(lambda: ranks.agree("dampings", 0.5 if other else 0.25))
    if what in ("bit", "sign of zero", "swapped"):
        with torch.no_grad():
            params[1][0] = 0.0
            params[0][0] = torch.tensor([1.0, 2.0])
            if other and what == "bit":
                params[2][0, 1] = torch.nextafter(params[2][0, 1], torch.tensor(9.0, dtype=torch.float64))
            if other and what == "sign of zero":
                params[1][0] = -0.0
            if other and what == "swapped":
                params[0][0] = torch.tensor([2.0, 1.0])
    return told(lambda: ranks.start(params))


def kinds(group):
    """Parameters of all kinds are compared."""
    params = [rand(3, 2, dtype=d) for d in (torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128)]
    params += [rand(4, 4).T, rand(6)[::2], torch.zeros(0, dtype=torch.float64)]
    ranks_of(group, params)
    found = []
    for k, p in enumerate(params[:-1]):
        q = p.clone() if not group.rank() else p * 2
        found.append(told(lambda q=q, k=k: ranks_of(group, [*params[:k], q, *params[k + 1:]])))
    return found


def now_and_then(group, check_every):
    """At which of six steps it is seen that rank 1's parameters have changed after the first."""
    params, ranks = [torch.zeros(3)], Ranks(group, check_every)
    seen = []
    for step in range(6):
        seen.append(told(lambda: ranks.start(params)) is not None)
        if group.rank() == 1 and step == 0:
            params[0] += 1
        if seen[-1]:
            break
    return seen.index(True) if any(seen) else None


def late(group, delay):
    """Rank 1 stays away for longer than the group's time-out."""
    ranks = ranks_of(group)
    if ranks.rank == 1:
        time.sleep(delay)
    start = time.monotonic()
    first = told(lambda: ranks.total(torch.ones(1)))
    waited = time.monotonic() - start
    try:
        ranks.settle(ValueError("own"))
    except LostRank as error:
        again = str(error)
    except Exception as error:
        again = error
    return first, waited, again


def abandoned(group):
    """Rank 1 leaves a step by an error that rank 0, in a sum, is not told of, and begins another."""
    ranks = ranks_of(group)
    if ranks.rank == 1:
        ranks.left(MemoryError("in a solver"))
        return told(lambda: ranks.start([torch.zeros(3, dtype=torch.float64)]))
    return told(lambda: ranks.total(torch.ones(1)))


def killed(group):
    """Rank 1 is killed before a sum."""
    ranks = ranks_of(group)
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    return told(lambda: ranks.total(torch.ones(1))), time.monotonic() - start


def divided(group):
    """A fault of one rank while the other waits."""
    if group.rank() == 1:
        return 1 / 0
    return None
