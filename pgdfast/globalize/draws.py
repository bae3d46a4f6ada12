"""The random numbers of a closure: a trial draws those of the linearisation again, so that both see the same batch."""

from __future__ import annotations

import random

import numpy as np
import torch


def code_of(closure):
    """What stays the same of a function that is defined anew for every step; None for what is not written in Python."""
    return getattr(closure, "__code__", None) or getattr(type(closure).__call__, "__code__", None)


class Generators:
    """Which generators the closures of one optimizer move: torch's always, the others where a closure's first step moved them.

    To ask for the states of Python's and numpy's takes some 50 microseconds: too long for every step.
    """

    def __init__(self):
        self._moved = {}   # by id of the code, which is kept beside: to hash code takes longer than all the rest here

    def __reduce__(self):
        """Copies learn anew."""
        return Generators, ()

    def draws(self, closure, device: torch.device) -> Draws:
        """The states before the closure runs."""
        code = code_of(closure)
        _, kinds = self._moved.get(id(code), (code, _ALL))
        found = Draws(kinds, device if device.type == "cuda" else None)
        if kinds is _ALL and code is not None:
            if len(self._moved) >= 64:
                self._moved.clear()
            found.learn = self._moved, code
        return found


class Draws:
    """States of generators before a closure runs. As a context they go back there, and at its end to where they were."""

    __slots__ = ("_after", "_before", "_gpu", "_kinds", "learn")

    def __init__(self, kinds: tuple, gpu: torch.device | None):
        self._kinds, self._gpu, self._after, self.learn = kinds, gpu, None, None
        self._before = self._states()

    def linearised(self) -> None:
        """Say that the closure has run once, to learn which generators it moves."""
        if self.learn is None:
            return
        moved, code = self.learn
        self._after = self._states()
        pairs = zip(self._kinds, self._before[2:], self._after[2:], strict=True)
        moved[id(code)] = code, tuple([kind for kind, a, b in pairs if not kind.same(a, b)])

    def rewind(self) -> None:
        """Go back to before the closure ran."""
        self._go(self._before)

    def _states(self) -> tuple:
        gpu = None if self._gpu is None else torch.cuda.get_rng_state(self._gpu)
        return torch.get_rng_state(), gpu, *[kind.get() for kind in self._kinds]

    def _go(self, states: tuple) -> None:
        torch.default_generator.set_state(states[0])
        if self._gpu is not None:
            torch.cuda.set_rng_state(states[1], self._gpu)
        for kind, state in zip(self._kinds, states[2:], strict=True):
            kind.set(state)

    def __enter__(self) -> Draws:
        if self._after is None:
            self._after = self._states()
        self._go(self._before)
        return self

    def __exit__(self, *_) -> None:
        self._go(self._after)


class _Python:
    get, set = staticmethod(random.getstate), staticmethod(random.setstate)

    @staticmethod
    def same(a, b) -> bool:
        return a == b


class _Numpy:
    get, set = staticmethod(np.random.get_state), staticmethod(np.random.set_state)

    @staticmethod
    def same(a, b) -> bool:
        return a[0] == b[0] and np.array_equal(a[1], b[1]) and a[2:] == b[2:]


_ALL = (_Python, _Numpy)   # asked at the first step of a closure's code
