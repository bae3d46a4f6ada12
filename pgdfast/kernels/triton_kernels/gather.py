"""Rows at given positions, and back.

    forward   y[i, :] (+)= alpha x[p[i], :]          p[i] = -1 gives nothing
    adjoint   x[t, :] += alpha sum of y[i, :] over p[i] = t, in the order of i

for K tangents at once. The adjoint reads the positions sorted, so that one program owns a row of x and adds in an order
that never changes. Source: the gather instruction of pgdfast/tape/program.py (indexing, embeddings).
"""

import torch
import triton
import triton.language as tl

from .launch import cdiv, next_power

BLOCK = 1024
MEMBERS = 16   # rows of y that are read at once


@triton.jit
def _forward(
    y, x, positions, number, y_batch, x_batch, rows, width, y_row, x_row, OVERWRITE: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < rows * width
    k = tl.program_id(1).to(tl.int64)
    row, column = i // width, i % width
    at = tl.load(positions + row, mask=inside, other=-1)
    alpha = tl.load(number).to(x.dtype.element_ty)
    value = alpha * tl.load(x + k * x_batch + at * x_row + column, mask=inside & (at >= 0), other=0)
    y_at = y + k * y_batch + row * y_row + column
    if not OVERWRITE:
        value += tl.load(y_at, mask=inside, other=0)
    tl.store(y_at, value, mask=inside)


@triton.jit
def _adjoint(x, y, order, starts, number, x_batch, y_batch, width, y_row, x_row, MEMBERS: tl.constexpr, BLOCK: tl.constexpr):
    target = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = tl.program_id(2).to(tl.int64)
    first, last = tl.load(starts + target), tl.load(starts + target + 1)
    acc = tl.zeros([MEMBERS, BLOCK], y.dtype.element_ty)
    for begin in range(first, last, MEMBERS):
        j = begin + tl.arange(0, MEMBERS)
        row = tl.load(order + j, mask=j < last, other=0)
        inside = (j < last)[:, None] & (column < width)[None, :]
        acc += tl.load(y + k * y_batch + row[:, None] * y_row + column[None, :], mask=inside, other=0)
    at = x + k * x_batch + target * x_row + column
    alpha = tl.load(number).to(y.dtype.element_ty)
    value = tl.load(at, mask=column < width, other=0) + alpha * tl.sum(acc, 0)
    tl.store(at, value, mask=column < width)


def sorted_positions(positions: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(order, starts): members of target t are order[starts[t] : starts[t + 1]], in ascending order."""
    values, order = torch.sort(positions, stable=True)
    return order, torch.searchsorted(values, torch.arange(count + 1, device=positions.device))


def forward(y, x, positions, number, rows: int, width: int, y_row: int, x_row: int, overwrite: bool) -> None:
    """Windows y and x start at (K, ...); number: alpha; overwrite: y holds nothing yet."""
    if rows * width:
        _forward[(cdiv(rows * width, BLOCK), len(y))](
            y, x, positions, number, y.stride(0), x.stride(0), rows, width, y_row, x_row, OVERWRITE=overwrite, BLOCK=BLOCK,
        )


def adjoint(x, y, order, starts, number, width: int, y_row: int, x_row: int) -> None:
    """The adjoint; order, starts: of `sorted_positions`."""
    block = min(next_power(width), 128)
    count = len(starts) - 1
    if count and width:
        _adjoint[(count, cdiv(width, block), len(y))](
            x, y, order, starts, number, x.stride(0), y.stride(0), width, y_row, x_row, MEMBERS=MEMBERS, BLOCK=block,
        )
