"""A closure over the parts of its rows: run for each batch in turn, whatever is wanted of each result."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator

import torch

_PEEKS = 3   # entries of a tensor that a fingerprint has, beside the sum of all


class Batched:
    """closure(batch) over batches that can be iterated again and again; closure() where these are None.

    Args:
        closure: the user's, of a batch, or of nothing.
        batches: an iterable that yields the same contents every time, or None.
        name: how an error names a batch by its number.
        progress: True for a line on standard error, a callable (what, batches done) or None.

    Raises TypeError for what is not iterable, ValueError for an iterator, which would be empty at the second pass.
    """

    def __init__(self, closure, batches: Iterable | None, name: Callable[[int], str] | None = None, progress=None):
        if batches is not None:
            _check_iterable(batches)
        self.given_closure, self.batches = closure, batches
        self.name = name or (lambda number: f"batch {number}")
        self._progress = _Line() if progress is True else progress or None
        self._prints: list | None = None   # of the contents at the first pass
        self.value: Callable | None = None   # what a plain call gathers of each result
        self.section: Callable = contextlib.nullcontext   # around a plain call, for processes that fail together
        self.around: Callable | None = None   # a context for passes beside the first, for random numbers
        self.batch = self.before = None   # the one that the closure ran on last, and the one before it

    def __call__(self) -> list:
        """`value(number, result)` of every batch: what trial points ask for."""
        with self.section():
            return self.run(self.value, "trial")

    def run(self, visit: Callable, what: str, only: set[int] | None = None) -> list:
        """[visit(number, result of the closure)] over the batches; only: the numbers of those whose closure is to run.

        Raises ValueError where the batches are not those of the first pass, and what the closure raises, with the batch named.
        """
        found, prints = [], []
        for number, batch in enumerate(self._batches()):
            prints.append(_fingerprint(batch))
            self._compare(prints, number)
            if only is not None and number not in only:
                continue
            self.before, self.batch = self.batch, batch
            try:
                found.append(visit(number, self.given_closure() if self.batches is None else self.given_closure(batch)))
            except Exception as error:
                if self.batches is not None and hasattr(error, "add_note"):   # Python 3.11
                    error.add_note(f"in {self.name(number)}, counted from 0")
                raise
            if self._progress is not None:
                self._progress(what, number + 1)
        self.batch = self.before = None
        if self._prints is None:
            self._prints = prints
        elif len(prints) != len(self._prints):
            raise ValueError(_changed(f"{len(self._prints)} batches the first time and {len(prints)} now"))
        return found

    def repeated(self):
        """A context for passes beside those that `rewind` random numbers by themselves."""
        return contextlib.nullcontext() if self.around is None else self.around()

    def _batches(self) -> Iterator:
        return iter((None,)) if self.batches is None else iter(self.batches)

    def _compare(self, prints: list, number: int) -> None:
        if self._prints is None:
            return
        if number >= len(self._prints):
            raise ValueError(_changed(f"{len(self._prints)} batches the first time and more now"))
        if not _same(self._prints[number], prints[number]):
            raise ValueError(_changed(f"another {self.name(number)} than the first time"))


def on_all_rows(closure, batches) -> Callable:
    """The closure on the rows of all batches as one: what a step over them means, at the price of all rows in memory.

    Raises ValueError where batches are no tensors, or tuples, lists or dicts of those, that can be put one behind the other.
    """
    _check_iterable(batches)
    whole = _concatenated(list(batches))
    return lambda: closure(whole)


def _concatenated(values: list):
    first = values[0]
    if isinstance(first, torch.Tensor) and first.dim():
        return torch.cat(values)
    if isinstance(first, dict):
        return {key: _concatenated([value[key] for value in values]) for key in first}
    if isinstance(first, (tuple, list)):
        items = [_concatenated(list(items)) for items in zip(*values, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    raise ValueError(
        f"pgdfast: the reference takes all batches as one, and a {type(first).__name__} cannot be put one behind the "
        "other; let batches be tensors, or tuples, lists or dicts of tensors."
    )


def _check_iterable(batches) -> None:
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise TypeError(
            f"pgdfast: batches is a {type(batches).__name__}; it must be a list, a DataLoader or another iterable of "
            "batches that closure(batch) takes."
        )
    if hasattr(batches, "__next__"):
        raise ValueError(
            f"pgdfast: batches is an iterator ({type(batches).__name__}), which can be gone through only once, and a "
            "step goes through its batches several times; pass a list or the DataLoader itself."
        )


def _changed(how: str) -> str:
    return (
        f"pgdfast: the batches have changed within a step ({how}); a step goes through its batches several times, and "
        "they must be the same each time: use a DataLoader without shuffling and without random augmentation, or a list."
    )


def _fingerprint(value) -> tuple:
    """What a batch's tensors hold, in few numbers; other objects count by their type alone."""
    if isinstance(value, torch.Tensor):
        t = value.detach()
        if t.layout is not torch.strided or not t.numel():
            return "tensor", tuple(t.shape), t.dtype
        flat = t.reshape(-1) if not t.is_complex() else torch.view_as_real(t).reshape(-1)
        peeks = [flat[k * (len(flat) - 1) // (_PEEKS - 1)].double() for k in range(_PEEKS)]
        return "tensor", tuple(t.shape), t.dtype, torch.stack([flat.sum(dtype=torch.float64), *peeks])
    if isinstance(value, dict):
        return "dict", *((key, _fingerprint(item)) for key, item in value.items())
    if isinstance(value, (tuple, list)):
        return "list", *map(_fingerprint, value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return "data", *(_fingerprint(getattr(value, f.name)) for f in dataclasses.fields(value))
    return ("number", value) if isinstance(value, (int, float, str, bool)) else ("object", type(value))


def _same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and bool(((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(_same, a, b))
    return a == b or (a != a and b != b)


class _Line:
    """Progress on one line of standard error."""

    def __call__(self, what: str, done: int) -> None:
        sys.stderr.write(f"\rpgdfast: {what}, {done} batches ")
        sys.stderr.flush()
