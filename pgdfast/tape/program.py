"""The linear program: what a closure's tape does to a parameter tangent, in four kinds of instruction.

Every operation's derivative is written with

    muladd   y[i] += alpha * c[i] * x[i]          over a strided index space; zero strides broadcast or reduce
    matmul   y[b] += alpha * x[b] @ c[b]          a constant on the left is the same form transposed
    gather   y[i] += alpha * x[p[i]]              rows of x at positions p; -1 gives none
    project  y[i] += a[i] * (x[i] - alpha * sum_t l_t[i] <r_t[i], x[i]>)   row by row: softmax, layer norm

where all but x and y are constants read off the tape. Views cost nothing: a slot is a strided window on a buffer. Run
forward the list is J v; run backward, with x and y exchanged in each instruction, it is J^T u.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

PARAMETER, RESIDUAL, WORKSPACE = 0, 1, 2
MULADD, MATMUL, GATHER, PROJECT = 0, 1, 2, 3
MAX_DIMS = 6
# What the kernels make of a constant c when it is bound; numbered as in csrc/cpu/simd.h. Positions are 64-bit integers.
FUNCTIONS = ("c", "1 - c^2", "c - c^2", "positions")


class UnsupportedStructure(Exception):
    """A tape that the instructions cannot express; the closure takes the double-backward form."""


@dataclass(slots=True)
class Slot:
    """A strided window on a buffer: `view` is a meta tensor that carries shape, strides and offset."""

    buffer: int
    view: torch.Tensor


@dataclass(slots=True)
class Pair:
    """The real and the imaginary part of a complex tensor."""

    re: Slot
    im: Slot


@dataclass(slots=True)
class Instruction:
    """One instruction; `extents` are its index space and strides, in the order of csrc/plan/plan.h.

    muladd   shape, strides of y, of x, of c
    matmul   one list: b, m, n, k, strides of y (b, m, n), of x (b, m, k), of c (b, k, n); a second batch dimension and its
             strides in y, x, c
    gather   one list: rows, width, strides of a row in y and in x, rows of x
    project  shape, strides of y, of x, of a, of l and r of each term; the numbers of those constants (-1: ones) and the
             offsets into them

    In a project the last dimension is the row; the others are batch.
    """

    kind: int
    y: int
    y_offset: int
    x: int
    x_offset: int
    constant: int
    alpha: float
    extents: list[list[int]]
    c_offset: int = 0


@dataclass(slots=True)
class Program:
    """Buffers (role, elements), instructions in forward order, and the layouts and functions of constants.

    fixed: numbers of constants that are the same at every step. live: per buffer, how many elements the sweeps touch, filled
    by `simplify`.
    """

    dtype: torch.dtype
    buffers: list[tuple[int, int]] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    layouts: list[tuple[tuple[int, ...], tuple[int, ...]] | None] = field(default_factory=list)
    functions: list[str] = field(default_factory=list)   # of each constant: a key of FUNCTIONS
    fixed: set[int] = field(default_factory=set)
    residual_shapes: list[torch.Size] = field(default_factory=list)
    live: list[int] = field(default_factory=list)

    def add_buffer(self, role: int, size: int) -> int:
        """Append a buffer and return its number."""
        self.buffers.append((role, size))
        return len(self.buffers) - 1

    def positions_that_mix(self) -> list[int]:
        """Constants with positions in the workspace that may change: they decide which elements reach which residuals."""
        return [
            op.constant for op in self.instructions
            if op.kind == GATHER and self.buffers[op.x][0] == WORKSPACE and op.constant not in self.fixed
        ]

    def function_numbers(self) -> list[int]:
        """The constants' functions as the native plan numbers them."""
        return [FUNCTIONS.index(name) for name in self.functions]

    def sizes(self, role: int) -> list[int]:
        """Element counts of all buffers with this role, in order."""
        return [size for r, size in self.buffers if r == role]


def whole(buffer: int, shape) -> Slot:
    """The contiguous window on all of a buffer."""
    return Slot(buffer, torch.empty(shape, device="meta"))


def coalesce(shape, *strides) -> list[list[int]]:
    """Drop unit dimensions, order the rest for locality and merge neighbours that all operands traverse alike."""
    dims = [(n, *(s[d] for s in strides)) for d, n in enumerate(shape) if n != 1]
    dims.sort(key=lambda dim: -max(dim[1], dim[2]))
    merged: list[tuple[int, ...]] = []
    for dim in dims:
        if merged and all(merged[-1][k] == dim[k] * dim[0] for k in range(1, len(dim))):
            merged[-1] = (merged[-1][0] * dim[0], *dim[1:])
        else:
            merged.append(dim)
    if len(merged) > MAX_DIMS:
        raise UnsupportedStructure(f"an elementwise operation over more than {MAX_DIMS} dimensions")
    return [[dim[k] for dim in merged] for k in range(1 + len(strides))]


def fits_blas(shape, strides) -> bool:
    """Say whether a BLAS can read and write a matrix with these strides in place."""
    (rows, cols), (row, col) = shape[-2:], strides[-2:]
    column_major = (row == 1 or rows == 1) and (cols == 1 or col >= max(rows, 1))
    row_major = (col == 1 or cols == 1) and (rows == 1 or row >= max(cols, 1))
    return column_major or row_major


def blas_constant(c: torch.Tensor) -> torch.Tensor:
    """`c`, copied if neither its rows nor its columns are contiguous."""
    strides, shape = c.stride(), c.shape
    if strides[-1] == 1 and strides[-2] >= shape[-1] or strides[-2] == 1 and strides[-1] >= shape[-2]:
        return c
    return c.contiguous()


def rows_last(c: torch.Tensor, dims, copy: bool = True) -> torch.Tensor:
    """`c` with these dimensions moved to the end and merged; a view, unless that takes a copy and it may be one."""
    dims = [d % c.dim() for d in dims] if c.dim() else []
    if not dims:
        return c.reshape(1)
    moved = c.movedim(dims, tuple(range(c.dim() - len(dims), c.dim()))) if len(dims) < c.dim() else c
    if len(dims) == 1:
        return moved
    shape = (*moved.shape[: -len(dims)], moved.shape[-len(dims) :].numel())
    return moved.reshape(shape) if copy else moved.view(shape)
