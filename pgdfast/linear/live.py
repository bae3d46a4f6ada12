"""Constants of a tape whose memory the closure may write to again: data, weights and buffers that it updates in place.

A trial runs the closure, and with `w.mul_(0.9).add_(...)` in it the next solve of the same step would pair the new w with the
old residuals. PyTorch counts the writes to a tensor's memory: where the count has changed, a copy from before the first trial
takes the constant's place. A structure's first step copies all such constants, later ones only those that it saw change.
"""

from __future__ import annotations

import torch

from ..tape.replay import copied

_COPIED_BYTES = 64 << 20   # a structure's first step copies this much
CHANGED = (
    "pgdfast: a tensor that the closure reads as a constant was changed in place since it was linearized, by the closure's "
    "own trials or from outside; the parameters are left unchanged. Write it out of place (w = 0.9 * w + ...), or change it "
    "between steps."
)


class Live:
    """Which constants of a plan may change.

    places: their numbers. steady: did no trial of a structure's first step change any; None before that.
    """

    __slots__ = ("_changing", "places", "steady")

    def __init__(self, constants: list, params):
        """Find those that are neither numbers, nor parameters, nor what the closure's last run has made with gradients."""
        own = {p.untyped_storage()._cdata for p in params}
        tensors = [(k, c) for k, c in enumerate(constants) if isinstance(c, torch.Tensor) and not c.is_inference()]
        self.places = [k for k, c in tensors if not c.requires_grad and c.untyped_storage()._cdata not in own]
        self.steady: bool | None = None
        self._changing: set[int] = set()

    def copies(self, constants: list) -> dict[int, torch.Tensor]:
        """Copies of what may change, by number: at a structure's first trial of all that is not large."""
        taken = self.places if self.steady is None else sorted(self._changing)
        if self.steady is None and sum(constants[k].nbytes for k in taken) > _COPIED_BYTES:
            return {}
        return {k: copied(constants[k]) for k in taken}

    def learn(self, changed: list[int]) -> None:
        """Note which constants the trials of a step have changed."""
        self._changing.update(changed)
        self.steady = not self._changing
