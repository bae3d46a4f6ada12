"""Is a closure's loss on a batch what its losses on two parts of it combine to? Asked once, by running it on both.

Rows that depend on each other, as by batch norm or differences of neighbours, make it something else. And where the tape
cannot tell whether a number counts rows, parts of different sizes can.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from ..linear.adjoint import tolerance_of
from ..tape import Tracer
from .combine import Combination, common_penalties, same_values

_OPEN = {"likely", "divided", "unknown"}   # kinds that sizes may decide
_MOST_OPEN = 4
_REPEATS = 1e3   # times the rounding unit: by how much the loss of a part may differ when its closure runs again


class Probed(NamedTuple):
    """What came out.

    disagreement: a sentence, "" where the losses agree or could not be compared. settled: of each term "sum", "mean" or "once"
    where the tape alone does not tell, else None; for Combination. () where nothing was compared. told: does a disagreement,
    had there been one, mean anything?
    """

    disagreement: str
    settled: tuple = ()
    told: bool = False


class _Read(NamedTuple):
    loss: float
    shares: tuple
    values: list | None
    penalty: float
    penalties: dict


def probe(closure: Callable, batch, tracer: Tracer, loss: float | None = None) -> Probed:
    """Compare the loss on a batch with what the losses on its first two fifths and on the rest combine to.

    Nothing is compared where the batch holds no tensors of at least two rows, the closure draws random numbers, fails on a
    part, or has terms whose values cannot be had. Where tensors of the batch differ in length, losses that disagree tell
    nothing. loss: that of the batch, where the closure has run on it before: it must be the same again. Cost: the closure on
    the batch and on both parts.
    """
    for cut, telling in _cuts(batch):
        try:
            halves = [cut(batch, 0), cut(batch, 1)]
        except Exception:   # noqa: BLE001 - sparse tensors, classes of the user's: they are not cut
            return Probed("")
        found = _compared(closure, batch, halves, tracer, loss)
        if found is None:
            return Probed("", told=True)   # random numbers: nothing can be told
        if found.settled or telling:
            return found._replace(told=telling)
    return Probed("")


def probe_together(closure: Callable, first, second, tracer: Tracer) -> Probed:
    """Compare the losses on two batches with that on both as one: for batches whose tensors differ in length.

    Tensors that are the same in both are no rows. Nothing is compared where the others cannot be joined. Cost: the closure on
    both and on each.
    """
    try:
        whole = _joined(first, second)
    except (TypeError, ValueError, RuntimeError):
        return Probed("")
    return _compared(closure, whole, [first, second], tracer, None) or Probed("")


def _joined(a, b):
    """Two batches as one."""
    if isinstance(a, torch.Tensor):
        return a if a.shape == b.shape and torch.equal(a, b) else torch.cat([a, b])
    if type(a) is dict and a.keys() == b.keys():
        return {key: _joined(value, b[key]) for key, value in a.items()}
    if type(a) in (list, tuple) and len(a) == len(b):
        return type(a)(map(_joined, a, b))
    if isinstance(a, tuple) and hasattr(a, "_fields"):
        return type(a)(*map(_joined, a, b))
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        fields = {f.name: _joined(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a) if f.init}
        return dataclasses.replace(a, **fields)
    if a is b or isinstance(a, (str, int, float, bool)) and a == b:
        return a
    raise TypeError("batches of this kind are not joined")


def _compared(closure: Callable, batch, parts: list, tracer: Tracer, before_all: float | None) -> Probed | None:
    """What a comparison tells; None where the closure draws random numbers."""
    before = _generators()
    read = []
    for part in parts:
        try:
            with torch.enable_grad():
                result = closure(part)
            if not _same_generators(before):
                _restore(before)
                return None
            read.append(_read(result, Tracer(tracer.params)))
        except Exception:   # noqa: BLE001 - no closure for any number of rows; on the batch itself it will say so
            _restore(before)
            return Probed("")
    try:
        with torch.enable_grad():
            result = closure(batch)
        if isinstance(result, torch.Tensor) and result.dim() and result.numel() == 1:
            result = tracer.as_loss(result)
        trace = tracer.trace(result)
        whole = _read(result, tracer, trace)
    except Exception:   # noqa: BLE001 - no closure for joined batches; on one of the user's it has run before
        _restore(before)
        return Probed("")
    if not same_loss(before_all, trace.value, trace.loss.dtype):
        return Probed(changed_loss("a batch", before_all, trace.value))
    name = ("the first rows of a batch", "its other rows", "the batch").__getitem__
    totals, refused = {}, None
    try:
        common_penalties([part.penalties for part in (*read, whole)], name)
    except ValueError as error:
        return Probed(str(error))
    for settled in _suppositions(read):
        try:
            combination = Combination([part.shares for part in read], name, settled)
        except ValueError as error:
            refused = refused or str(error)
            continue
        totals[combination.kinds] = _total(combination, read, whole)
    if not totals:
        return Probed(refused or "")
    if None in totals.values():
        return Probed("")
    tolerance = tolerance_of(trace)
    agreeing = [kinds for kinds, (total, loss, size) in totals.items() if abs(total - loss) <= tolerance * size]
    if len(agreeing) == 1:
        return Probed("", agreeing[0])
    total, loss, _ = next(iter(totals.values()))
    if agreeing:
        return Probed("")
    return Probed(
        f"pgdfast.LM: the closure's loss on a batch, {loss:.9g}, is not what its losses on two parts of it combine to, "
        f"{total:.9g}; either rows depend on each other (batch norm, differences of neighbours, a quantity that is taken over "
        "the batch), or their number enters in a way that the tape does not show. Let each row count by itself, and write "
        "means with .mean()."
    )


def same_loss(before: float | None, now: float, dtype: torch.dtype) -> bool:
    """Whether a closure that ran twice returned the same loss, but for rounding."""
    return before is None or abs(now - before) <= _REPEATS * torch.finfo(dtype).eps * abs(before)


def changed_loss(where: str, before: float, now: float) -> str:
    """What is said where it did not."""
    return (
        f"pgdfast: the closure's loss on {where} was {before} and is {now} when it runs again at the same parameters; "
        "a step over batches runs it several times, and it must return the same each time: no random numbers of its own "
        "generators, no state that it changes."
    )


def _suppositions(read: list[_Read]):
    """What terms may be of which the tape does not tell."""
    terms = list(zip(*(part.shares for part in read), strict=False))
    options, doubtful = [], 0
    for shares in terms:
        may_be, kinds = [], {s.kind for s in shares}
        if doubtful < _MOST_OPEN and kinds & _OPEN:
            may_be = ["mean", "sum"]
        elif doubtful < _MOST_OPEN and kinds <= {"sum", "whole"} and same_values(shares):   # may not belong to the rows at all
            may_be = ["once", "sum"] if kinds == {"sum"} else ["once"]
        doubtful += bool(may_be)
        options.append(may_be or [None])
    return itertools.product(*options)


def _read(result, tracer: Tracer, trace=None) -> _Read:
    if isinstance(result, torch.Tensor) and result.dim() and result.numel() == 1:
        result = tracer.as_loss(result)
    trace = tracer.trace(result) if trace is None else trace
    if not math.isfinite(trace.value):
        raise ValueError("pgdfast: the loss on a batch is not finite when the closure runs again; nothing was changed.")
    shares = tracer.shares(result, trace.residual)
    values = tracer.term_values(result)
    return _Read(trace.value, shares, values, tracer.penalty_value(trace.penalties), trace.penalties)


def _total(combination: Combination, read: list[_Read], whole: _Read) -> tuple[float, float, float] | None:
    """(combined loss, loss on the batch, sum of sizes of what was added), or None."""
    values = [part.values for part in read]
    if None not in values and whole.values is not None:
        total = combination.total_of_terms(values, whole.penalty)
        size = sum(abs(s * v) for scales, terms in zip(combination.scales, values, strict=True)
                   for s, v in zip(scales, terms, strict=True))
        loss = sum(whole.values) + whole.penalty
    elif combination.uniform is not None:
        total = combination.total([p.loss for p in read], [p.penalty for p in read], whole.penalty)
        size = sum(abs(s * p.loss) for s, p in zip(combination.uniform, read, strict=True))
        loss = whole.loss
    else:
        return None
    return total, loss, size + abs(loss)


# --- batches --------------------------------------------------------------------------------------------------------------


def _cuts(batch) -> list[tuple[Callable, bool]]:
    """Ways to cut a batch in two, and whether a disagreement tells anything."""
    lengths = [t.shape[0] for t in _tensors(batch) if t.dim()]
    if not lengths or max(lengths) < 2:
        return []

    def cut(keeps):
        def part(tree, which: int):
            def piece(t):
                if not t.dim() or not keeps(t.shape[0]):
                    return t
                first = max(1, 2 * t.shape[0] // 5)
                return t[first:] if which else t[:first]

            return _mapped(piece, tree)

        return part

    if len(set(lengths)) == 1:
        return [(cut(lambda n: True), True)]
    return [(cut(lambda n: n > 1), False), (cut(lambda n: n == lengths[0]), False)]


def _tensors(tree):
    found = []
    _mapped(lambda t: found.append(t) or t, tree)
    return found


def _mapped(function: Callable, tree):
    """A batch with its tensors replaced; in lists, tuples, dicts and dataclasses."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*[_mapped(function, t) for t in tree])
    if type(tree) in (list, tuple):
        return type(tree)(_mapped(function, t) for t in tree)
    if isinstance(tree, dict):
        return type(tree)({key: _mapped(function, t) for key, t in tree.items()}) if type(tree) is dict else tree
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = {f.name: _mapped(function, getattr(tree, f.name)) for f in dataclasses.fields(tree) if f.init}
        return dataclasses.replace(tree, **fields)
    return tree


# --- generators -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def same_generators():
    """Leave random numbers where they were."""
    before = _generators()
    try:
        yield
    finally:
        _restore(before)


def _generators() -> tuple:
    """The states of torch's, Python's and numpy's global generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda], random.getstate(), np.random.get_state()


def _same_generators(before: tuple) -> bool:
    now = _generators()
    drawn = before[1] != now[1] or before[2][2:] != now[2][2:] or not np.array_equal(before[2][1], now[2][1])
    return not drawn and len(now[0]) == len(before[0]) and all(map(torch.equal, before[0], now[0]))


def _restore(before: tuple) -> None:
    (cpu, *cuda), python, numpy = before
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python)
    np.random.set_state(numpy)
