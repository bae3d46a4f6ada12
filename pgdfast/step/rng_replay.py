"""The random numbers of a closure: a trial draws those of the linearisation again, so that both see the same batch."""

from __future__ import annotations

import ctypes
import random
import types

import numpy as np
import torch


def code_of(closure):
    """What stays the same of a function that is defined anew for every step; None for what is not written in Python."""
    return getattr(closure, "__code__", None) or getattr(type(closure).__call__, "__code__", None)


class RandomReplays:
    """Which generators the closures of one optimizer move: torch's are always looked after, others where a closure moves them.

    To ask for the states of Python's and numpy's generators takes some 40 microseconds, too long for every step; a look at
    their memory takes less than one. Closures are told apart by their code, and instances with `__call__` one by one.
    """

    def __init__(self):
        self._moved: dict = {}   # by id of the code, which is kept beside: to hash code takes longer than all the rest here

    def __reduce__(self):
        """Copies learn anew."""
        return RandomReplays, ()

    def record(self, closure, device: torch.device) -> RandomReplay:
        """The states before the closure runs."""
        code = code_of(closure)
        key = id(code) if isinstance(closure, types.FunctionType) else (id(code), id(closure))
        _, kinds = self._moved.get(key, (code, None))
        if len(self._moved) >= 64:
            self._moved.clear()
        return RandomReplay(self._moved, key, code, kinds, device if device.type == "cuda" else None)


class RandomReplay:
    """States of generators before a closure runs. As a context they go back there, and at its end to where they were."""

    __slots__ = ("_after", "_before", "_code", "_gpu", "_key", "_kinds", "_known", "_seen")

    def __init__(self, known: dict, key, code, kinds: tuple | None, gpu: torch.device | None):
        self._known, self._key, self._code, self._gpu, self._after = known, key, code, gpu, None
        self._kinds = _ALL if kinds is None or code is None else kinds
        self._seen = [None if kind in self._kinds else kind.glance() for kind in _ALL]
        self._before = self._states()

    def linearised(self) -> None:
        """Say that the closure has run once, to learn which generators it moves."""
        surprises = []
        for kind, seen in zip(_ALL, self._seen, strict=True):
            if seen is not None and kind.glance() != seen:
                surprises.append((kind, kind.before(seen)))
        self._kinds += tuple(kind for kind, _ in surprises)
        self._before += tuple(state for _, state in surprises)
        self._after = self._states()
        if self._code is not None and (surprises or self._key not in self._known):
            pairs = zip(self._kinds, self._before[2:], self._after[2:], strict=True)
            moved = [kind for kind, a, b in pairs if not kind.same(a, b) or kind.glance() is None]
            self._known[self._key] = self._code, tuple(moved)

    def rewind(self) -> None:
        """Go back to before the closure ran."""
        self._go(self._before)

    def finish(self) -> None:
        """Go to where one run of the closure leaves the generators."""
        if self._after is not None:
            self._go(self._after)

    def _states(self) -> tuple:
        gpu = None if self._gpu is None else torch.cuda.get_rng_state(self._gpu)
        state = torch.default_generator.get_state()
        return (state, gpu, *[kind.get() for kind in self._kinds]) if self._kinds else (state, gpu)

    def _go(self, states: tuple) -> None:
        torch.default_generator.set_state(states[0])
        if self._gpu is not None:
            torch.cuda.set_rng_state(states[1], self._gpu)
        for kind, state in zip(self._kinds, states[2:], strict=True):
            kind.set(state)

    def __enter__(self) -> RandomReplay:
        self._go(self._before)
        return self

    def __exit__(self, *_) -> None:
        self._go(self._after)


class _Python:
    """Python's `random`: the words of its Mersenne twister, in memory where CPython keeps them."""

    get, set = staticmethod(random.getstate), staticmethod(random.setstate)
    _words: ctypes.Array | None = (ctypes.c_uint32 * 625).from_address(id(random._inst) + object.__basicsize__)
    if (*_words[1:], _words[0]) != random.getstate()[1]:   # another Python
        _words = None

    @staticmethod
    def same(a, b) -> bool:
        return a == b

    @classmethod
    def glance(cls) -> bytes | None:
        """The memory of the generator; None where it is not known."""
        return None if cls._words is None else bytes(cls._words)

    @classmethod
    def before(cls, seen: bytes):
        """The state that goes with a glance, as `set` takes it."""
        version, _, gauss = random.getstate()
        index, *words = (ctypes.c_uint32 * 625).from_buffer_copy(seen)
        return version, (*words, index), gauss


class _Numpy:
    """numpy's `np.random`, whose bit generator says where its state lies."""

    get, set = staticmethod(np.random.get_state), staticmethod(np.random.set_state)

    @staticmethod
    def same(a, b) -> bool:
        return a[0] == b[0] and np.array_equal(a[1], b[1]) and a[2:] == b[2:]

    @staticmethod
    def glance() -> bytes | None:
        """The words of the Mersenne twister and its position; None for another bit generator."""
        bits = np.random.mtrand._rand._bit_generator
        return ctypes.string_at(bits.ctypes.state_address, 625 * 4) if isinstance(bits, np.random.MT19937) else None

    @staticmethod
    def before(seen: bytes):
        """The state that goes with a glance, as `set` takes it."""
        now, words = np.random.get_state(), np.frombuffer(seen, np.uint32)
        return (now[0], words[:624].copy(), int(words[624]), *now[3:])


_ALL = (_Python, _Numpy)
