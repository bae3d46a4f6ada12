"""Averages over windows, and their adjoints, which nested derivatives leave."""

from __future__ import annotations

import math

import torch

from .table import RULES, Rule, reader, rule
from .windows import Windows, on_small


def _register(node: str, saved: str, averages) -> None:
    """averages(small, large, *saved): of the shapes of both sides (windows, the shares of their sums), or matrices `along`."""
    names = tuple(["_saved_" + name for name in saved.split()])
    read = reader(names)

    @rule(f"{node}Backward0", saved=f"self {saved}", shape=True)
    def average(op, x, *values):
        *values, shape, device = values
        _average(op, averages(shape, x.shape, *values), x.shape, shape, device)

    def read_adjoint(node) -> tuple:
        child, number = node.next_functions[0]
        shapes = [] if child is None else [tuple(child._input_metadata[number].shape)]
        m = node._input_metadata[0]
        return (*read(node), *shapes, tuple(m.shape), m.device)

    def adjoint(op, *values):
        *values, large, device = values
        if not op.needs[0]:
            op.scale(1, 0.0)
            return
        *values, small = values
        _spread(op, averages(small, large, *values), small, large, device)

    RULES[f"{node}BackwardBackward0"] = Rule(adjoint, names, read_adjoint)


def _average(op, averages, large, small, device) -> None:
    """Out[p] = share[p] * sum over the window of p."""
    if isinstance(averages, list):
        along(op, large, [matrix.to(device) for matrix in averages])
        return
    w, share = averages
    uniform = isinstance(share, float)
    alpha = share if uniform else 1.0
    op.temporary("sums", small)
    for offsets, p, q in w.pieces(merges=len(w.kernel) < 3):
        op.view(0, w.on_large(q), out="window")
        op.view("sums", on_small(p), out="piece")
        whole = [k - offsets.count(None) for k in range(offsets.count(None))]
        if whole:
            op.sum("window", whole, False, alpha=alpha, out="piece")
        else:
            op.add("window", alpha, out="piece")
    if uniform:
        op.view("sums", lambda t: t)
    else:
        op.scale("sums", share.to(device))


def _spread(op, averages, small, large, device) -> None:
    """The adjoint."""
    if isinstance(averages, list):
        along(op, small, [matrix.mT.to(device) for matrix in averages])
        return
    w, share = averages
    uniform = isinstance(share, float)
    alpha = share if uniform else 1.0
    source = 0
    if not uniform:
        op.temporary("shares", small)
        op.scale(0, share.to(device), out="shares")
        source = "shares"
    for offsets, p, q in w.pieces(merges=len(w.kernel) < 3):
        op.view(source, on_small(p), out="piece")
        for _ in range(offsets.count(None)):
            op.view("piece", lambda t: t[..., None], out="piece")
        op.add("piece", alpha, where=w.on_large(q))


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


def _average_pool(dims: int):
    def averages(small, large, counts_padding, divisor, kernel, padding, stride):
        kernel, padding, stride = ((*v,) * (dims // len(v)) for v in (kernel, padding, stride or kernel))
        w = Windows(kernel, stride, padding, (1,) * dims, tuple(small[-dims:]), tuple(large[-dims:]))
        if divisor is not None:
            return w, 1 / divisor
        counts = [_counts(w, d, counts_padding) for d in range(dims)]
        if all(min(c) == max(c) for c in counts if c):
            return w, 1 / math.prod(max(c, default=1) for c in counts)
        shares = torch.ones((), dtype=torch.float64)
        for c in counts:
            shares = shares[..., None] / torch.tensor(c, dtype=torch.float64)
        return w, shares

    return averages


def _counts(w: Windows, d: int, counts_padding: bool) -> list[int]:
    """How many elements the windows along a dimension are averaged over."""
    counts = []
    for p in range(w.small[d]):
        start = p * w.stride[d] - w.padding[d]
        end = min(start + w.kernel[d], w.large[d] + w.padding[d])
        counts.append(end - start if counts_padding else min(end, w.large[d]) - max(start, 0))
    return counts


def _adaptive_average_pool(dims: int):
    def averages(small, large, *_):
        small, large = tuple(small[-dims:]), tuple(large[-dims:])
        if all(b and a % b == 0 for a, b in zip(large, small, strict=True)):
            kernel = tuple(a // b for a, b in zip(large, small, strict=True))
            return Windows(kernel, kernel, (0,) * dims, (1,) * dims, small, large), 1 / math.prod(kernel)
        return [_adaptive_matrix(a, b) for a, b in zip(large, small, strict=True)]

    return averages


def _adaptive_matrix(large: int, small: int) -> torch.Tensor:
    matrix = torch.zeros(small, large, dtype=torch.float64)
    for p in range(small):
        start, end = p * large // small, -(-(p + 1) * large // small)
        matrix[p, start:end] = 1 / (end - start)
    return matrix


for _dims in (2, 3):
    _register(f"AvgPool{_dims}D", "count_include_pad divisor_override kernel_size padding stride", _average_pool(_dims))
    _register(f"AdaptiveAvgPool{_dims}D", "", _adaptive_average_pool(_dims))
