"""Operations whose output elements are input elements or constants, at places that the saved numbers tell.

The operation itself, run on the numbers of the input's elements, gives their positions. They belong to the structure.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .scatters import scatter, table_of
from .table import rule, signed

aten = torch.ops.aten
_MOST_KEPT = 1 << 25   # bytes of positions

_kept: dict = {}


def _signed(values) -> list[int]:
    return [signed(v) for v in values]


def picks(*nodes: str, saved: str = "", transposed: tuple[str, str] | None = None):
    """Register `function(shape, *saved)` for nodes of these names.

    shape: the output's. It returns the positions of the output's elements in the flat input (-1: a constant), in the output's
    shape, and the input's shape. transposed: a node whose operation adds elements up the other way round, and its saved fields;
    the function is called without a shape and takes the input's shape behind them.
    """

    def register(function):
        @rule(*nodes, saved=saved, shape=True)
        def pick(op, *values):
            *values, shape, device = values
            rows, trailing = kept(_merged_positions, function, shape, device, values)
            op.gather(0, rows, -trailing or None, fixed=True)

        if transposed:
            @rule(transposed[0], saved=transposed[1], shape=True)
            def spread(op, *values):
                *values, shape, device = values
                if op.needs[0]:
                    scatter(op, 0, kept(_exact_table, function, None, device, [*values, shape]), shape, None, fixed=True)
                else:
                    op.scale(1, 0.0)

        return function

    return register


def _merged_positions(function, shape, device, values) -> tuple[torch.Tensor, int]:
    positions, sizes = function(torch.Size(shape), *values)
    rows, trailing = merged(positions, torch.Size(sizes))
    return rows.to(device), trailing


def _exact_table(function, shape, device, values) -> torch.Tensor:
    positions, sizes = function(shape, *values)
    return table_of(positions, math.prod(sizes), exact=True).to(device)


def kept(build, function, shape, device, values):
    """build(function, shape, device, values), computed once for these values; of saved tensors only the shape is read."""
    values = tuple([tuple(v.shape) if isinstance(v, torch.Tensor) else tuple(v) if isinstance(v, list) else v for v in values])
    key = build, function, shape, device, values
    if key not in _kept:
        found = build(function, shape, device, values)
        size = sum(t.nbytes for t in (found if isinstance(found, tuple) else (found,)) if isinstance(t, torch.Tensor))
        if sum(size for _, size in _kept.values()) + size > _MOST_KEPT:
            _kept.clear()
        _kept[key] = found, size
    return _kept[key][0]


def merged(positions: torch.Tensor, sizes: torch.Size) -> tuple[torch.Tensor, int]:
    """Positions of elements as positions of the longest rows over trailing dimensions, of input and output alike."""
    trailing, width = 0, 1
    for d in range(1, min(len(sizes), positions.dim()) + 1):
        if sizes[-d] != positions.shape[-d] or not positions.numel():
            break
        wider = width * sizes[-d]
        rows = positions.reshape(-1, wider)
        first = rows[:, :1]
        run = first + torch.arange(wider, device=rows.device)
        if not ((rows == run) & (first % wider == 0) | (rows < 0) & (first < 0)).all():
            break
        trailing, width = d, wider
    first = positions.reshape(-1, width)[:, 0]
    return torch.where(first < 0, first, first // width), trailing


def numbers(sizes) -> torch.Tensor:
    """The numbers of a tensor's elements, in its shape."""
    return torch.arange(math.prod(sizes)).view(tuple(sizes))


def _through(operation, sizes) -> torch.Tensor:
    """Positions by an operation that knows floating-point numbers alone and pads with zeros; in float64 they are exact."""
    return operation(numbers(sizes).double() + 1).to(torch.int64) - 1


@picks("FlipBackward0", saved="dims")
def flip(shape, dims):
    return numbers(shape).flip([signed(d) for d in dims]), shape


@picks("RollBackward0", saved="dims shifts")
def roll(shape, dims, shifts):
    return numbers(shape).roll([signed(s) for s in shifts], [signed(d) for d in dims]), shape


@picks("Rot90Backward0", saved="dims k")
def rot90(shape, dims, k):
    dims, sizes = [signed(d) for d in dims], list(shape)
    if signed(k) % 2:
        a, b = dims
        sizes[a], sizes[b] = sizes[b], sizes[a]
    return numbers(sizes).rot90(signed(k), dims), sizes


@rule("ConstantPadNdBackward0", saved="pad")
def constant_pad(op, pad):
    pad = [signed(k) for k in pad]
    sides = [(-1 - d, pad[2 * d], pad[2 * d + 1]) for d in range(len(pad) // 2)]   # dimension, before, after

    def without(x, cut):
        for d, before, after in sides:
            a, b = max(cut * before, 0), max(cut * after, 0)
            x = x.narrow(d, a, x.shape[d] - a - b)
        return x

    op.view(0, lambda x: without(x, -1), out="kept")
    op.add("kept", where=lambda y: without(y, 1))


def _padding(kind: str, dims: int) -> None:
    """Register the padding of the last dimensions by what stands inside."""
    operation, node = getattr(aten, f"{kind.lower()}_pad{dims}d"), f"{kind}Pad{dims}DBackward"

    @picks(f"{node}0", saved="padding self", transposed=(f"{node}Backward0", "padding"))
    def pad(shape, padding, sizes):
        return _through(lambda x: operation(x, _signed(padding)), sizes), sizes


for _kind in ("Reflection", "Replication"):
    for _dims in (1, 2, 3):
        _padding(_kind, _dims)


@picks("UnfoldBackward0", saved="dimension size step self_sym_sizes", transposed=("UnfoldBackwardBackward0", "dim size step"))
def unfold(shape, dim, size, step, sizes):
    return numbers(sizes).unfold(signed(dim), size, step), sizes


@picks("Im2ColBackward0", saved="dilation kernel_size padding self_sym_argsize_minus_1 self_sym_argsize_minus_2 stride")
def im2col(shape, dilation, kernel, padding, width, height, stride):
    sizes = (*shape[:-2], shape[-2] // math.prod(kernel), height, width)
    return _through(lambda x: aten.im2col(x, kernel, dilation, padding, stride), sizes), sizes


@rule("Col2ImBackward0", saved="dilation kernel_size padding stride", shape=True)
def col2im(op, dilation, kernel, padding, stride, shape, device):
    table = kept(_exact_table, _fold, None, device, (dilation, kernel, padding, stride, shape))
    scatter(op, 0, table, shape, None, fixed=True)


def _fold(shape, dilation, kernel, padding, stride, sizes):
    return _through(lambda x: aten.im2col(x, kernel, dilation, padding, stride), sizes), sizes


@picks("PixelShuffleBackward0", saved="upscale_factor")
def pixel_shuffle(shape, factor):
    sizes = F.pixel_unshuffle(numbers(shape), factor).shape
    return F.pixel_shuffle(numbers(sizes), factor), sizes


@picks("PixelUnshuffleBackward0", saved="downscale_factor")
def pixel_unshuffle(shape, factor):
    sizes = F.pixel_shuffle(numbers(shape), factor).shape
    return F.pixel_unshuffle(numbers(sizes), factor), sizes


@picks("ChannelShuffleBackward0", saved="groups")
def channel_shuffle(shape, groups):
    return torch.channel_shuffle(numbers(shape), groups), shape


@picks("UpsampleNearest1DBackward0", saved="output_size scales self_sym_sizes",
       transposed=("UpsampleNearest1DBackwardBackward0", "output_size scales"))
def nearest1d(shape, size, scale, sizes):
    return _through(lambda x: aten.upsample_nearest1d(x, size, scale), sizes), sizes


@picks("UpsampleNearest2DBackward0", saved="output_size scales_h scales_w self_sym_sizes",
       transposed=("UpsampleNearest2DBackwardBackward0", "output_size scales_h scales_w"))
def nearest2d(shape, size, h, w, sizes):
    return _through(lambda x: aten.upsample_nearest2d(x, size, h, w), sizes), sizes


@picks("UpsampleNearest3DBackward0", saved="output_size scales_d scales_h scales_w self_sym_sizes",
       transposed=("UpsampleNearest3DBackwardBackward0", "output_size scales_d scales_h scales_w"))
def nearest3d(shape, size, d, h, w, sizes):
    return _through(lambda x: aten.upsample_nearest3d(x, size, d, h, w), sizes), sizes


@picks("UpsampleNearestExact1DBackward0", saved="output_size scales self_sym_sizes",
       transposed=("UpsampleNearestExact1DBackwardBackward0", "output_size scales"))
def nearest_exact1d(shape, size, scale, sizes):
    return _through(lambda x: aten._upsample_nearest_exact1d(x, size, scale), sizes), sizes


@picks("UpsampleNearestExact2DBackward0", saved="output_size scales_h scales_w self_sym_sizes",
       transposed=("UpsampleNearestExact2DBackwardBackward0", "output_size scales_h scales_w"))
def nearest_exact2d(shape, size, h, w, sizes):
    return _through(lambda x: aten._upsample_nearest_exact2d(x, size, h, w), sizes), sizes


@picks("UpsampleNearestExact3DBackward0", saved="output_size scales_d scales_h scales_w self_sym_sizes",
       transposed=("UpsampleNearestExact3DBackwardBackward0", "output_size scales_d scales_h scales_w"))
def nearest_exact3d(shape, size, d, h, w, sizes):
    return _through(lambda x: aten._upsample_nearest_exact3d(x, size, d, h, w), sizes), sizes


@rule("DiagEmbedBackward0", "DiagonalBackwardBackward0", saved="dim1 dim2 offset")
def diag_embed(op, dim1, dim2, offset):
    op.add(0, where=lambda y: y.diagonal(signed(offset), signed(dim1), signed(dim2)))


@rule("TraceBackward0", saved="self_sym_sizes")
def trace(op, sizes):
    op.view(0, lambda x: x.diagonal(), out="diagonal")
    op.sum("diagonal", (0,), False)
