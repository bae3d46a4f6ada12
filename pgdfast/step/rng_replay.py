"""The random numbers of a closure: a trial draws those of the linearization again, so that both see the same batch."""

from __future__ import annotations

import contextlib
import ctypes
import random

import numpy as np
import torch

from ..linear import code_of


class MovedGenerators(dict):
    """Which of Python's and numpy's generators the closures of one optimizer move; torch's are always looked after.

    To ask for their states takes some 40 microseconds, too long for every step; a look at their memory takes less than one.
    Closures are told apart by the id of their code, which is kept beside (to hash code takes longer than all the rest here),
    and instances with `__call__` one by one.
    """

    def __reduce__(self):
        """Copies learn anew."""
        return MovedGenerators, ()


class RandomReplay:
    """States of generators before a closure runs: `rewind` goes back there, `finish` to where one run leaves them."""

    __slots__ = ("_after", "_before", "_code", "_gpu", "_key", "_kinds", "_moved", "_seen")

    def __init__(self, moved: MovedGenerators, closure, device: torch.device):
        closure = getattr(closure, "given_closure", closure)   # balance.Weighted and parts.Batched are made anew for every step
        code = getattr(closure, "__code__", None)
        self._key = id(code) if code is not None else (id(code_of(closure)), id(closure))
        self._code = code if code is not None else code_of(closure)
        known = moved.get(self._key) if self._code is not None else None
        self._moved, self._after, self._gpu = moved, None, device if device.type == "cuda" else None
        self._kinds: tuple = _ALL if known is None else known[1]
        self._seen = None if known is None else memory_of_generators()
        quick = not self._kinds and self._gpu is None
        self._before = (torch.default_generator.get_state(), None) if quick else self._states()

    def linearized(self) -> None:
        """Say that the closure has run once, to learn which generators it moves."""
        if self._seen is not None:
            seen = memory_of_generators()
            if seen != self._seen:
                self._be_surprised(seen)
            quick = not self._kinds and self._gpu is None
            self._after = (torch.default_generator.get_state(), None) if quick else self._states()
            return
        self._after = self._states()
        if self._code is not None:
            pairs = zip(self._kinds, self._before[2:], self._after[2:], strict=True)
            moved = [kind for kind, a, b in pairs if not kind.same(a, b)]
            if None in memory_of_generators():   # one that cannot be looked at
                moved = _ALL
            if len(self._moved) >= 64:
                self._moved.clear()
            self._moved[self._key] = self._code, tuple(moved)

    def _be_surprised(self, seen: tuple) -> None:
        """Look after generators that this closure has not moved before, now and from now on."""
        for kind, before, after in zip(_ALL, self._seen, seen, strict=True):
            if before != after and kind not in self._kinds:
                self._kinds += (kind,)
                self._before += (kind.before(before),)
        self._moved[self._key] = self._code, self._kinds

    def rewind(self) -> None:
        """Go back to before the closure ran."""
        torch.default_generator.set_state(self._before[0])
        if len(self._before) > 2 or self._gpu is not None:
            self._go(self._before)

    def finish(self) -> None:
        """Go to where one run of the closure leaves the generators; nowhere if it has not run."""
        if self._after is not None:
            torch.default_generator.set_state(self._after[0])
            if len(self._after) > 2 or self._gpu is not None:
                self._go(self._after)

    @contextlib.contextmanager
    def repeated(self):
        """A run of the closure with the random numbers of the first."""
        self.rewind()
        try:
            yield
        finally:
            self.finish()

    def _states(self) -> tuple:
        gpu = None if self._gpu is None else torch.cuda.get_rng_state(self._gpu)
        state = torch.default_generator.get_state()
        return (state, gpu, *[kind.get() for kind in self._kinds]) if self._kinds else (state, gpu)

    def _go(self, states: tuple) -> None:
        if self._gpu is not None:
            torch.cuda.set_rng_state(states[1], self._gpu)
        for kind, state in zip(self._kinds, states[2:], strict=True):
            kind.set(state)


class _Python:
    """Python's `random`."""

    get, set = staticmethod(random.getstate), staticmethod(random.setstate)

    @staticmethod
    def same(a, b) -> bool:
        return a == b

    @staticmethod
    def before(seen: bytes):
        """The state that goes with a look at the memory, as `set` takes it."""
        version, _, gauss = random.getstate()
        index, *words = (ctypes.c_uint32 * _WORDS).from_buffer_copy(seen)
        return version, (*words, index), gauss


class _Numpy:
    """numpy's `np.random`."""

    get, set = staticmethod(np.random.get_state), staticmethod(np.random.set_state)

    @staticmethod
    def same(a, b) -> bool:
        return a[0] == b[0] and np.array_equal(a[1], b[1]) and a[2:] == b[2:]

    @staticmethod
    def before(seen: bytes):
        """The state that goes with a look at the memory, as `set` takes it."""
        now, words = np.random.get_state(), np.frombuffer(seen, np.uint32)
        return (now[0], words[:-1].copy(), int(words[-1]), *now[3:])


_ALL = (_Python, _Numpy)
_WORDS = 625   # of a Mersenne twister and its position


def memory_of_generators() -> tuple[bytes | None, bytes | None]:
    """The memory of Python's and of numpy's generator; None for one that is no Mersenne twister in a known place."""
    bits = np.random.mtrand._rand._bit_generator
    return (
        None if _python_words is None else bytes(_python_words),
        ctypes.string_at(bits.ctypes.state_address, 4 * _WORDS) if isinstance(bits, np.random.MT19937) else None,
    )


# CPython keeps the position and the words behind the head of the object; believed if `getstate` says the same.
_python_words = (ctypes.c_uint32 * _WORDS).from_address(id(random._inst) + object.__basicsize__)
if (*_python_words[1:], _python_words[0]) != random.getstate()[1]:
    _python_words = None
