"""Convolutions of any dimension.

Index legend: n samples, g groups, o and c channels of the output and the input within a group; p, q and k as in windows.py.
Tangents lie channels last, so that one matrix product serves all positions; what it multiplies is gathered offset by offset
by strided copies, which, unlike one copy of all windows, never touch an element twice.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .table import rule
from .windows import Windows, on_small


def _patches(x: torch.Tensor, w: Windows, groups: int) -> torch.Tensor:
    """The windows of x (n, channels, *large) as (g, n p, c k)."""
    padding = [n for p in reversed(w.padding) for n in (p, p)]
    x = F.pad(x, padding) if any(padding) else x
    for d, (k, s, dilation) in enumerate(zip(w.kernel, w.stride, w.dilation, strict=True)):
        x = x.unfold(2 + d, (k - 1) * dilation + 1, s).narrow(2 + d, 0, w.small[d])[..., ::dilation]
    x = x.unflatten(1, (groups, -1))
    dims = len(w.kernel)
    x = x.permute(1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims))
    return x.reshape(groups, x.shape[1] * math.prod(w.small), -1)


def _convolve(op, i, j, x, weight, w: Windows, groups: int, n: int, to) -> None:
    """To += the convolution of x with weight; i, j: the inputs with their tangents, or None."""
    op.temporary("result", (n, *w.small, weight.shape[0]))
    op.view("result", lambda y: y.flatten(0, -2).unflatten(-1, (groups, -1)).movedim(-2, 0), out="by group")
    if j is not None:   # (g, c k, o)
        op.reshape(j, (groups, weight.shape[0] // groups, weight[0].numel()), out="weight")
        op.view("weight", lambda t: t.mT, out="weight")
        op.matmul("weight", left=_patches(x, w, groups), out="by group")
    if i is not None:
        _gather_patches(op, i, w, groups, n, weight.shape[1])
        matrix = weight.unflatten(0, (groups, -1)).movedim(2, -1).reshape(groups, weight.shape[0] // groups, -1)
        op.matmul("patches", right=matrix.mT, out="by group")
    op.view("result", lambda y: y.movedim(-1, 1), out=to)


def _gather_patches(op, i, w: Windows, groups: int, n: int, channels: int) -> None:
    """Let "patches" be the windows of input i (n, g c, *large) as (g, n p, k c)."""
    op.temporary("patches", (groups, n, *w.small, *w.kernel, channels))
    op.view("patches", lambda t: t.permute(1, 0, t.dim() - 1, *range(2, t.dim() - 1)), out="positions last")
    op.view(i, lambda t: t.unflatten(1, (groups, channels)), out="input")
    for offsets, small, large in w.pieces(merges=groups == 1 and len(w.kernel) < 3):
        op.view("input", w.on_large(large), out="window")
        op.add("window", out="positions last", where=on_small(small, offsets))
    op.reshape("patches", (groups, n * math.prod(w.small), math.prod(w.kernel) * channels), out="patches")


def _convolve_transposed(op, i, j, x, weight, w: Windows, groups: int, n: int, to) -> None:
    """The adjoint of `_convolve` in its input: to[q] += sum over o, k of x[p] weight[o, :, k]."""
    dims, channels = len(w.kernel), weight.shape[1]
    op.temporary("products", (n, *w.small, groups, channels, *w.kernel))
    op.view(
        "products", lambda t: t.flatten(0, dims).flatten(2).movedim(1, 0), out="by group",   # (g, n p, c k)
    )
    if j is not None:
        op.reshape(j, (groups, weight.shape[0] // groups, weight[0].numel()), out="weight")
        values = x.movedim(1, -1).flatten(0, -2).unflatten(-1, (groups, -1)).movedim(-2, 0)
        op.matmul("weight", left=values, out="by group")
    if i is not None:
        op.view(i, lambda t: t.movedim(1, -1), out="channels last")
        op.reshape("channels last", (n * math.prod(w.small), groups, weight.shape[0] // groups), out="input")
        op.view("input", lambda t: t.movedim(1, 0), out="input")
        op.matmul("input", right=weight.reshape(groups, weight.shape[0] // groups, -1), out="by group")
    op.temporary("result", (n, *w.large, groups, channels))
    last = 1 + dims
    op.view("result", lambda t: t.permute(0, last, last + 1, *range(1, last)), out="positions last")
    op.view("products", lambda t: t.permute(0, last, last + 1, *range(1, last), *range(last + 2, t.dim())), out="sources")
    for offsets, small, large in w.pieces(merges=groups == 1 and dims < 3):
        op.view("sources", on_small(small, offsets), out="window")
        op.add("window", out="positions last", where=w.on_large(large))
    op.view("result", lambda t: t.flatten(-2).movedim(-1, 1), out=to)


def _windows(shape, large, weight, stride, padding, dilation) -> Windows:
    kernel = tuple(weight.shape[2:])
    return Windows(kernel, tuple(stride), tuple(padding), tuple(dilation), tuple(shape[2:]), tuple(large[2:]))


@rule("ConvolutionBackward0", saved="dilation groups input padding stride transposed weight", shape=True)
def convolution(op, dilation, groups, x, padding, stride, transposed, weight, shape, device):
    """Of x (n, channels, *positions), weight and bias; a transposed one is the adjoint in its input."""
    i, j = (k if op.needs[k] else None for k in (0, 1))
    small, large, run = (x.shape, shape, _convolve_transposed) if transposed else (shape, x.shape, _convolve)
    if i is not None or j is not None:
        run(op, i, j, x, weight, _windows(small, large, weight, stride, padding, dilation), groups, shape[0], 0)
    if op.needs[2]:
        op.add(2, where=lambda y: y.movedim(1, -1))


@rule("ConvolutionBackwardBackward0", saved="dilation grad_output groups input padding stride transposed weight", used=True)
def convolution_backward(op, dilation, grad, groups, x, padding, stride, transposed, weight, used):
    """f(g, x, weight): the cotangents of x, of weight and of a bias, as far as they are used, given that of the output."""
    i, j = (k if op.needs[k] else None for k in (0, 2))
    small, large, run = (x, grad, _convolve) if transposed else (grad, x, _convolve_transposed)
    w = _windows(small.shape, large.shape, weight, stride, padding, dilation)
    if 0 in used and (i is not None or j is not None):
        run(op, i, j, grad, weight, w, groups, len(x), 0)
    if 1 in used:   # (g, o, c k) = values (g, o, n p) @ patches (g, n p, c k)
        op.temporary("cotangent", weight.shape)
        op.view("cotangent", lambda t: t.view(groups, weight.shape[0] // groups, -1), out="by group")
        by_values, by_patches = (1, 0) if transposed else (0, 1)
        if op.needs[by_values]:
            op.view(by_values, lambda t: t.movedim(1, 0), out="values")
            op.reshape("values", (groups, small.shape[1] // groups, small[:, 0].numel()), out="values")
            op.matmul("values", right=_patches(large, w, groups), out="by group")
        if op.needs[by_patches]:
            channels = weight.shape[1]
            _gather_patches(op, by_patches, w, groups, len(x), channels)
            op.temporary("products", (groups, weight.shape[0] // groups, math.prod(w.kernel), channels))
            op.view("products", lambda t: t.flatten(2), out="matrices")
            op.matmul("patches", left=small.movedim(1, 0).reshape(groups, weight.shape[0] // groups, -1), out="matrices")
            op.view("products", lambda t: t.mT, out="products")
            op.view("cotangent", lambda t: t.view(groups, weight.shape[0] // groups, channels, -1), out="channels first")
            op.add("products", out="channels first")
        op.view("cotangent", lambda t: t, out=1)
    if 2 in used and op.needs[0]:
        op.sum(0, (0, *range(2, grad.dim())), False, out=2)
