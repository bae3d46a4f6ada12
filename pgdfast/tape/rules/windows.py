"""Windows that slide over positions, as convolutions and averages have them.

Index legend: p positions of the smaller side (a convolution's output, a transposed one's input), k offsets of the kernel,
q = p stride + k dilation - padding positions of the larger side.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Windows:
    """Which positions of the larger side meet which of the smaller one, by dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    small: tuple[int, ...]
    large: tuple[int, ...]

    def split(self, d: int) -> bool:
        """Say whether dimension d falls into windows side by side, all of whose offsets are one strided view."""
        whole = self.padding[d] == 0 and self.dilation[d] == 1 and self.stride[d] >= self.kernel[d]
        return whole and self.kernel[d] > 1 and (self.small[d] - 1) * self.stride[d] + self.kernel[d] <= self.large[d]

    def pieces(self, merges: bool):
        """(offsets, ranges of the smaller side, ranges of the larger side), by dimension, of every non-empty piece.

        merges: take dimensions that are `split` whole; their offset and range of the larger side are then None.
        """
        choices = []
        for d, kernel in enumerate(self.kernel):
            if merges and self.split(d):
                choices.append([(None, (0, self.small[d]), None)])
                continue
            pieces = []
            for k in range(kernel):
                s, at = self.stride[d], k * self.dilation[d] - self.padding[d]
                low, high = max(0, -(at // s)), min(self.small[d], (self.large[d] - 1 - at) // s + 1)
                if low < high:
                    pieces.append((k, (low, high), (low * s + at, (high - 1) * s + at + 1, s)))
            choices.append(pieces)
        for piece in itertools.product(*choices):
            yield tuple(zip(*piece, strict=True))

    def on_large(self, ranges):
        """A function from a tensor (..., *large) to its window (..., *positions, *offsets of split dimensions)."""

        def window(x):
            first = x.dim() - len(ranges)
            for d, r in enumerate(ranges):
                if r is None:
                    x = x.unfold(first + d, self.kernel[d], self.stride[d]).narrow(first + d, 0, self.small[d])
                else:
                    x = x[(slice(None),) * (first + d) + (slice(*r),)]
            return x

        return window


def on_small(ranges, offsets=()):
    """A function from a tensor (..., *small, *kernel) to its window (..., *positions, *offsets left whole)."""

    def window(x):
        first = x.dim() - len(ranges) - len(offsets)
        picked = tuple(slice(None) if k is None else k for k in offsets)
        return x[(slice(None),) * first + tuple(slice(*r) for r in ranges) + picked]

    return window
