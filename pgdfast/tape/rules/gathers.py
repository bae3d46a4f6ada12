"""Operations that pick elements by positions: embedding, indexing, sorting and the like."""

from __future__ import annotations

import math

import torch

from ..program import UnsupportedStructure
from .table import rule, signed


@rule("EmbeddingBackward0", saved="indices padding_idx scale_grad_by_freq")
def embedding(op, indices, padding, by_frequency):
    if by_frequency:
        raise UnsupportedStructure("an embedding with scale_grad_by_freq")
    padding = signed(padding)
    op.gather(0, indices if padding < 0 else indices.masked_fill(indices == padding, -1), 1)


@rule("IndexSelectBackward0", saved="dim index self_sym_sizes")
def index_select(op, dim, index, sizes):
    lead = signed(dim) % max(len(sizes), 1) + 1
    op.gather(0, _numbers(sizes[:lead], index).index_select(max(lead - 1, 0), index), min(lead, len(sizes)))


@rule("IndexBackward0", "UnsafeIndexBackward0", saved="indices self_sym_sizes")
def index(op, indices, sizes):
    """x[i, j, ...] with tensors of integers or truth values; None takes a whole dimension."""
    op.gather(0, *indexed_rows(indices, sizes))


def indexed_rows(indices, sizes) -> tuple[torch.Tensor, int]:
    """Which rows of x an index names, rows being its first so many dimensions flattened; and that number."""
    picked, dims = [], 0   # dimensions of x that an index covers: one, or a mask's own number
    for k in indices:
        mask = k is not None and k.dtype in (torch.bool, torch.uint8)
        dims += k.dim() if mask else 1
        picked.append(slice(None) if k is None else k.bool() if mask else k)
    while picked and isinstance(picked[-1], slice):
        picked.pop()
        dims -= 1
    like = next(k for k in indices if k is not None)
    return _numbers(sizes[:dims], like)[tuple(picked)], dims


@rule("GatherBackward0", saved="dim index self")
def gather(op, dim, index, x):
    _along(op, dim, index, x.shape)


@rule("MaskedSelectBackward0", saved="mask self")
def masked_select(op, mask, x):
    shape = torch.broadcast_shapes(mask.shape, x.shape)
    op.gather(0, _numbers(x.shape, mask).expand(shape)[mask.expand(shape)], x.dim())


@rule("TakeBackward0", saved="index self")
def take(op, index, x):
    op.gather(0, torch.where(index < 0, index + x.numel(), index), x.dim())


@rule("TopkBackward0", "SortBackward0", "SortBackward1", saved="dim indices self_sym_sizes")
def sort(op, dim, indices, sizes):
    _along(op, dim, indices, sizes)


@rule("CummaxBackward0", "CumminBackward0", saved="dim indices self")
def running_extremum(op, dim, indices, x):
    _along(op, dim, indices, x.shape)


@rule("MaxBackward0", "MinBackward0", saved="dim indices keepdim self_sym_sizes")
@rule("MedianBackward1", "NanmedianBackward1", "KthvalueBackward0", "ModeBackward0", saved="dim indices keepdim self_sym_sizes")
def extremum_along(op, dim, indices, keepdim, sizes):
    if not keepdim and sizes:
        indices = indices.unsqueeze(signed(dim) % len(sizes))
    _along(op, dim, indices, sizes)


@rule("MaxPool2DWithIndicesBackward0", "AdaptiveMaxPool2DBackward0", "FractionalMaxPool2DBackward0", saved="result1 self")
def max_pool2d(op, index, x):
    op.gather(0, in_planes(index, x.shape, 2), x.dim())


@rule("MaxPool3DWithIndicesBackward0", "AdaptiveMaxPool3DBackward0", "FractionalMaxPool3DBackward0", saved="result1 self")
def max_pool3d(op, index, x):
    op.gather(0, in_planes(index, x.shape, 3), x.dim())


def in_planes(index: torch.Tensor, sizes, dims: int) -> torch.Tensor:
    """Numbers within planes, the last `dims` dimensions of a tensor of these sizes, as numbers within all of it."""
    planes = math.prod(sizes[:-dims])
    first = math.prod(sizes[-dims:]) * torch.arange(planes, device=index.device)
    return index.reshape(planes, -1) + first[:, None]


def _along(op, dim, index, sizes):
    """Out[.., i, ..] = x[.., index[.., i, ..], ..]."""
    if not sizes:
        op.gather(0, torch.zeros_like(index), 0)
        return
    dim = signed(dim) % len(sizes)
    positions = index * math.prod(sizes[dim + 1 :])
    for d, n in enumerate(index.shape):
        if d != dim:
            step = math.prod(sizes[d + 1 :]) * torch.arange(n, device=index.device)
            positions = positions + step.view(-1, *[1] * (len(sizes) - d - 1))
    op.gather(0, positions, len(sizes))


def _numbers(sizes, like: torch.Tensor) -> torch.Tensor:
    """The positions of a contiguous tensor's elements, in its shape."""
    return torch.arange(math.prod(sizes), device=like.device).view(sizes)
