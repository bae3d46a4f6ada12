"""Constants of a tape whose memory the closure may write to again: data, weights and buffers that it updates in place.

A trial runs the closure, and with `w.mul_(0.9).add_(...)` in it the next solve of the same step would pair the new w with the
old residuals. PyTorch counts the writes to a tensor's memory: where the count has changed, a copy from before the first trial
takes the constant's place. A structure's first step copies all such constants, later ones only those that it saw change.
"""

from __future__ import annotations

from operator import attrgetter
from typing import NamedTuple

import torch

from ..tape.replay import copied

_version = attrgetter("_version")
_COPIED_BYTES = 64 << 20   # a structure's first step copies this much
CHANGED = (
    "pgdfast: a tensor that the closure reads as a constant was changed in place since it was linearized, by the closure's "
    "own trials or from outside; the parameters are left unchanged. Write it out of place (w = 0.9 * w + ...), or change it "
    "between steps."
)


class Places(NamedTuple):
    """Which constants of a program may change; changing: those that have, learnt in a list that is empty before."""

    places: list[int]
    changing: set[int]
    learnt: list[bool]


class Live:
    """The constants of one tape that may change; shared by all precisions of a linearization."""

    __slots__ = ("_constants", "_copies", "_plan", "_tensors", "_tried", "_versions")

    def __init__(self, plan, constants: list):
        self._plan, self._constants, self._copies, self._tried = plan, constants, None, False
        self._tensors = [constants[k] for k in plan.live.places]
        self._versions = list(map(_version, self._tensors))

    @staticmethod
    def places(constants: list, params) -> Places:
        """Which constants are neither numbers, nor parameters, nor what the closure's last run has made with gradients."""
        own = {p.untyped_storage()._cdata for p in params}
        tensors = [(k, c) for k, c in enumerate(constants) if isinstance(c, torch.Tensor) and not c.is_inference()]
        places = [k for k, c in tensors if not c.requires_grad and c.untyped_storage()._cdata not in own]
        return Places(places, set(), [])

    def before_trial(self) -> None:
        """Copy what may change: at a structure's first trial all that is not large, then what has changed before."""
        if self._tried:
            return
        self._tried = True
        places, changing, learnt = self._plan.live
        if learnt and not changing:
            return
        taken = [k for k, place in enumerate(places) if place in changing or not learnt]
        size = sum(self._tensors[k].nbytes for k in taken)
        if learnt or size <= _COPIED_BYTES:
            self._copies = {k: copied(self._tensors[k]) for k in taken}

    def refresh(self) -> None:
        """Let copies take the place of what has changed. Raises RuntimeError where there are none."""
        if list(map(_version, self._tensors)) == self._versions:
            return
        places, changing, learnt = self._plan.live
        changed = self._changed()
        changing.update(places[k] for k in changed)
        learnt[:] = [True]
        if self._copies is None or any(k not in self._copies for k in changed):
            raise RuntimeError(CHANGED)
        for k in changed:
            self._constants[places[k]] = self._tensors[k] = self._copies[k]
            self._versions[k] = self._copies[k]._version
        self._plan.release(self._constants)

    def learn(self) -> None:
        """Note, at the end of a structure's first step, what its trials have changed."""
        places, changing, learnt = self._plan.live
        if self._tried and not learnt:
            changing.update(places[k] for k in self._changed())
            learnt.append(True)

    def _changed(self) -> list[int]:
        return [k for k, (t, version) in enumerate(zip(self._tensors, self._versions, strict=True)) if t._version != version]
