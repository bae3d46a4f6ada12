"""Errors that one rank tells the others, and the one error that all ranks raise for them."""

from __future__ import annotations

import contextlib
import sys
from typing import NamedTuple

_ENDS = (StopIteration, StopAsyncIteration, GeneratorExit)   # they would end what they pass through


class LostRank(RuntimeError):
    """Another rank of the process group has gone or does not answer."""


def settled(error: BaseException) -> BaseException:
    """The error, marked as one that all ranks raise alike, since it follows from what all were told: nobody waits for them."""
    error.pgdfast_settled = True   # type: ignore[attr-defined]
    return error


@contextlib.contextmanager
def alike():
    """Around what raises on all ranks or on none, and holds no collective."""
    try:
        yield
    except Exception as error:
        settled(error)
        raise


class Failure(NamedTuple):
    """An error, as the other ranks are told of it: where its class is defined, and what it says."""

    module: str
    name: str
    text: str
    fatal: bool   # Ctrl-C, exit: not an Exception


def described(error: BaseException | None) -> Failure | None:
    """The error as others are told of it; None for None."""
    if error is None:
        return None
    kind = type(error)
    text = " ".join([str(error) or kind.__name__, *(f"({note})" for note in getattr(error, "__notes__", ()))])
    return Failure(kind.__module__, kind.__qualname__, text, not isinstance(error, Exception))


def combined(failures: list[Failure | None]) -> BaseException:
    """The error that all ranks raise, from what each has told; at least one has failed.

    It has the class of the first that failed, one that was interrupted before others; the text names every rank.
    """
    told: dict[Failure, list[int]] = {}
    for rank, failure in enumerate(failures):
        if failure is not None:
            told.setdefault(failure, []).append(rank)
    order = sorted(told, key=lambda failure: not failure.fatal)
    kind = _class_of(order[0])
    error = None
    if kind is not None:
        try:
            error = kind(_text(order, told, order[0]))
        except Exception:   # a class of the user's that is not made from a message
            error = None
    return RuntimeError(_text(order, told, None)) if error is None else error


def ranks_named(numbers: list[int]) -> str:
    """"rank 2", or "ranks 0, 2"."""
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"


def _text(order: list[Failure], told: dict[Failure, list[int]], first: Failure | None) -> str:
    """What all ranks say; errors of another class than the first have its name."""
    parts = []
    for failure in order:
        same = first is not None and failure[:2] == first[:2]
        parts.append(f"{ranks_named(told[failure])}: {'' if same else failure.name + ': '}{failure.text}")
    return "; ".join(parts)


def _class_of(failure: Failure) -> type | None:
    """The exception's class as this process knows it, None where it does not, or where raising it would end a loop."""
    found = sys.modules.get(failure.module)
    for name in failure.name.split("."):
        found = getattr(found, name, None)
    known = isinstance(found, type) and issubclass(found, BaseException) and not issubclass(found, _ENDS)
    return found if known else None
