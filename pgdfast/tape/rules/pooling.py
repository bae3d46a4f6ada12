"""Averages over windows, and other linear maps that act on each dimension by itself."""

from __future__ import annotations

import math

import torch

from .table import rule
from .windows import Windows, on_small


def _average_pool(node: str, dims: int) -> None:
    @rule(node, saved="count_include_pad divisor_override kernel_size padding self stride", shape=True)
    def apply(op, counts_padding, divisor, kernel, padding, x, stride, shape, device):
        kernel, padding, stride = ((*v,) * (dims // len(v)) for v in (kernel, padding, stride or kernel))
        w = Windows(kernel, stride, padding, (1,) * dims, tuple(shape[-dims:]), tuple(x.shape[-dims:]))
        if divisor is not None:
            _sum_windows(op, w, shape, 1 / divisor)
            return
        counts = [_counts(w, d, counts_padding) for d in range(dims)]
        if all(min(c) == max(c) for c in counts if c):
            _sum_windows(op, w, shape, 1 / math.prod(max(c, default=1) for c in counts))
            return
        shares = torch.ones((), dtype=torch.float64)
        for c in counts:
            shares = shares[..., None] / torch.tensor(c, dtype=torch.float64)
        _sum_windows(op, w, shape, 1.0, "sums")
        op.scale("sums", shares.to(device))


def _counts(w: Windows, d: int, counts_padding: bool) -> list[int]:
    """How many elements the windows along a dimension are averaged over."""
    counts = []
    for p in range(w.small[d]):
        start = p * w.stride[d] - w.padding[d]
        end = min(start + w.kernel[d], w.large[d] + w.padding[d])
        counts.append(end - start if counts_padding else min(end, w.large[d]) - max(start, 0))
    return counts


def _sum_windows(op, w: Windows, shape, alpha: float, out=0) -> None:
    """out[p] = alpha * sum over the window of p."""
    op.temporary("sums", shape)
    for offsets, small, large in w.pieces(merges=len(w.kernel) < 3):
        op.view(0, w.on_large(large), out="window")
        op.view("sums", on_small(small), out="piece")
        whole = [k - offsets.count(None) for k in range(offsets.count(None))]
        if whole:
            op.sum("window", whole, False, alpha=alpha, out="piece")
        else:
            op.add("window", alpha, out="piece")
    if out == 0:
        op.view("sums", lambda t: t)


def _adaptive_average_pool(node: str, dims: int) -> None:
    @rule(node, saved="self", shape=True)
    def apply(op, x, shape, device):
        large, small = tuple(x.shape[-dims:]), tuple(shape[-dims:])
        if all(b and a % b == 0 for a, b in zip(large, small, strict=True)):
            kernel = tuple(a // b for a, b in zip(large, small, strict=True))
            _sum_windows(op, Windows(kernel, kernel, (0,) * dims, (1,) * dims, small, large), shape, 1 / math.prod(kernel))
            return
        along(op, x.shape, [_adaptive_matrix(a, b).to(device) for a, b in zip(large, small, strict=True)])


def _adaptive_matrix(large: int, small: int) -> torch.Tensor:
    matrix = torch.zeros(small, large, dtype=torch.float64)
    for p in range(small):
        start, end = p * large // small, -(-(p + 1) * large // small)
        matrix[p, start:end] = 1 / (end - start)
    return matrix


def along(op, shape, matrices: list[torch.Tensor]) -> None:
    """Output 0 is input 0 (of this shape) with a matrix applied along each of its last dimensions."""
    source, shape = 0, list(shape)
    for d, matrix in enumerate(matrices, -len(matrices)):
        name = f"along {d}"
        moved = [*shape[:d], *(shape[d + 1 :] if d < -1 else ()), shape[d]]
        op.view(source, lambda t, d=d: t.movedim(d, -1), out="last")
        op.reshape("last", (math.prod(moved[:-1]), moved[-1]), out="rows")
        op.temporary(name, (*moved[:-1], len(matrix)))
        op.view(name, lambda t: t.flatten(0, -2), out="products")
        op.matmul("rows", right=matrix.mT, out="products")
        op.view(name, lambda t, d=d: t.movedim(-1, d), out=name)
        source, shape[d] = name, len(matrix)
    op.view(source, lambda t: t)


_average_pool("AvgPool2DBackward0", 2)
_average_pool("AvgPool3DBackward0", 3)
_adaptive_average_pool("AdaptiveAvgPool2DBackward0", 2)
_adaptive_average_pool("AdaptiveAvgPool3DBackward0", 3)
