"""Row-wise projections: softmax, layer norm, RMS norm.

    forward   y (+)= a * (x - alpha sum_t l_t <r_t, x>)
    adjoint   x (+)= z - alpha sum_t r_t <l_t, z>,   z = a * y

row by row, for K tangents at once, t <= 2. One kernel: y (+)= post * (pre * x - alpha sum_t left_t <right_t, pre * x>).
Source: the project instruction of pgdfast/tape/program.py. Sums are float32 for float32, float64 for float64.
"""

import math

import triton
import triton.language as tl

from .launch import cdiv, next_power, on_device

WIDEST, TILE = 1024, 2048   # columns read at once, elements of a tile


@triton.jit
def _coefficient(c, at, column, step, inside, HAS: tl.constexpr, dtype: tl.constexpr):
    if HAS:
        return tl.load(c + at[:, None] + column[None, :] * step, mask=inside, other=0)
    else:
        return tl.where(inside, 1.0, 0.0).to(dtype)


@triton.jit
def _project(
    y, x, pre, post, left0, right0, left1, right1, number, geometry, y_batch, x_batch, rows, width,
    OUTER: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr, LEFT0: tl.constexpr, RIGHT0: tl.constexpr,
    LEFT1: tl.constexpr, RIGHT1: tl.constexpr, TERMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    # geometry: strides along the row of y, x, pre, post, left0, right0, left1, right1; then size and those of each dimension.
    rest = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = rest < rows
    k = tl.program_id(1).to(tl.int64)
    none = rest * 0
    y_at, x_at, pre_at, post_at, l0_at, r0_at, l1_at, r1_at = none, none, none, none, none, none, none, none
    for d in tl.static_range(OUTER):
        size = tl.load(geometry + 8 + 9 * d)
        at = rest % size
        rest = rest // size
        y_at += at * tl.load(geometry + 9 + 9 * d)
        x_at += at * tl.load(geometry + 10 + 9 * d)
        pre_at += at * tl.load(geometry + 11 + 9 * d)
        post_at += at * tl.load(geometry + 12 + 9 * d)
        l0_at += at * tl.load(geometry + 13 + 9 * d)
        r0_at += at * tl.load(geometry + 14 + 9 * d)
        l1_at += at * tl.load(geometry + 15 + 9 * d)
        r1_at += at * tl.load(geometry + 16 + 9 * d)
    ys, xs, pre_s, post_s = tl.load(geometry), tl.load(geometry + 1), tl.load(geometry + 2), tl.load(geometry + 3)
    l0_s, r0_s, l1_s, r1_s = tl.load(geometry + 4), tl.load(geometry + 5), tl.load(geometry + 6), tl.load(geometry + 7)
    dtype = x.dtype.element_ty
    alpha = tl.load(number).to(dtype)
    dot0 = tl.zeros([ROWS], dtype)
    dot1 = tl.zeros([ROWS], dtype)
    x_at = x + k * x_batch + x_at
    for begin in range(0, width, BLOCK):
        j = begin + tl.arange(0, BLOCK).to(tl.int64)
        inside = valid[:, None] & (j < width)[None, :]
        z = tl.load(x_at[:, None] + j[None, :] * xs, mask=inside, other=0)
        z *= _coefficient(pre, pre_at, j, pre_s, inside, PRE, dtype)
        dot0 += tl.sum(z * _coefficient(right0, r0_at, j, r0_s, inside, RIGHT0, dtype), 1)
        if TERMS > 1:
            dot1 += tl.sum(z * _coefficient(right1, r1_at, j, r1_s, inside, RIGHT1, dtype), 1)
    for begin in range(0, width, BLOCK):
        j = begin + tl.arange(0, BLOCK).to(tl.int64)
        inside = valid[:, None] & (j < width)[None, :]
        z = tl.load(x_at[:, None] + j[None, :] * xs, mask=inside, other=0)
        z *= _coefficient(pre, pre_at, j, pre_s, inside, PRE, dtype)
        along = dot0[:, None] * _coefficient(left0, l0_at, j, l0_s, inside, LEFT0, dtype)
        if TERMS > 1:
            along += dot1[:, None] * _coefficient(left1, l1_at, j, l1_s, inside, LEFT1, dtype)
        value = (z - alpha * along) * _coefficient(post, post_at, j, post_s, inside, POST, dtype)
        out = y + k * y_batch + y_at[:, None] + j[None, :] * ys
        tl.store(out, tl.load(out, mask=inside, other=0) + value, mask=inside)


class Rows:
    """The index space of a project in one direction: shape, and strides of target, source, pre, post, left and right twice."""

    def __init__(self, shape, strides):
        *outer, self.width = shape
        self.rows, self.outer, self._cache = math.prod(outer), len(outer), {}
        self._geometry = [s[-1] for s in strides]
        for d in reversed(range(len(outer))):
            self._geometry += [shape[d], *(s[d] for s in strides)]

    def geometry(self, device):
        """As the kernel reads it."""
        return on_device(self._cache, "geometry", self._geometry, device)


def project(y, x, coefficients, number, space: Rows, terms: int) -> None:
    """Add to y (K, ...) the projection of x. coefficients: pre, post, left0, right0, left1, right1, each a tensor or None."""
    if not space.rows or not space.width:
        return
    block = min(next_power(space.width), WIDEST)
    rows = max(1, min(TILE // block, next_power(space.rows)))
    has = [c is not None for c in coefficients]
    _project[(cdiv(space.rows, rows), len(x))](
        y, x, *(x if c is None else c for c in coefficients), number, space.geometry(x.device), y.stride(0), x.stride(0),
        space.rows, space.width, OUTER=space.outer, PRE=has[0], POST=has[1], LEFT0=has[2], RIGHT0=has[3], LEFT1=has[4],
        RIGHT1=has[5], TERMS=terms, ROWS=rows, BLOCK=block,
    )
