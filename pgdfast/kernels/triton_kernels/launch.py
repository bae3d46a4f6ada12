"""Index spaces as the kernels read them: extents and strides in a small tensor, so that no shape needs a compilation."""

from __future__ import annotations

import math

import torch


def cdiv(a: int, b: int) -> int:
    """The quotient a / b, rounded up."""
    return -(-a // b)


def next_power(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def on_device(cache: dict, name: str, values: list[int], device) -> torch.Tensor:
    """Integers as an int64 tensor, copied to a device once."""
    if (name, device) not in cache:
        cache[name, device] = torch.tensor(values or [0], dtype=torch.int64).to(device)
    return cache[name, device]


class Space:
    """A muladd's index space: shape, strides of y, x, c. Zero strides of y with more than one index are summed over."""

    def __init__(self, shape, ys, xs, cs):
        dims = [dim for dim in zip(shape, ys, xs, cs, strict=True) if dim[0] != 1]
        self.total = math.prod(shape)
        kept, summed = [d for d in dims if d[1] != 0], [d for d in dims if d[1] == 0]
        self.sums, self._cache = bool(summed), {}
        self.kept, self.summed = math.prod(d[0] for d in kept), math.prod(d[0] for d in summed)
        if self.sums:
            self.kept_dims, self.summed_dims = len(kept), len(summed)
            inner_first = [*reversed(kept), *reversed(summed)]
            self._geometry = [v for n, _, x, c in inner_first for v in (n, x, c)]
            self._target = [v for n, y, _, _ in reversed(kept) for v in (n, y)]
        else:
            *outer, self.last = dims or [(1, 1, 1, 1)]
            self.outer = len(outer)
            self._geometry = [v for dim in reversed(outer) for v in dim]

    def geometry(self, device) -> torch.Tensor:
        """Size and strides per dimension, innermost first."""
        return on_device(self._cache, "geometry", self._geometry, device)

    def target(self, device) -> torch.Tensor:
        """Size and stride in y of every dimension that is not summed over."""
        return on_device(self._cache, "target", self._target, device)
