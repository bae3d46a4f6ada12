"""y[i] (+)= alpha c[i] x[i] over a strided index space, for K tangents at once.

Its adjoint exchanges x and y. Where the target's strides repeat elements (a bias's gradient) those indices are summed:

    y[j] += alpha sum_r c[j, r] x[j, r]

in tiles along r whose partial sums are added in a fixed order. Source: the instructions of pgdfast/tape/program.py;
csrc/cpu/sweep.cpp is the same. Sums are float32 for float32, float64 for float64.
"""

import triton
import triton.language as tl

from .launch import Space, cdiv

BLOCK = 1024
KEPT, SUMMED = 32, 32   # a tile of the reducing form
SPLITS = 64             # parts at most into which a sum is cut


@triton.jit
def _muladd(
    y, x, c, number, geometry, y_batch, x_batch, total, last, ys, xs, cs,
    OUTER: tl.constexpr, HAS_C: tl.constexpr, OVERWRITE: tl.constexpr, BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < total
    rest = i // last if OUTER > 0 else i * 0
    i = i % last if OUTER > 0 else i
    y_at, x_at, c_at = i * ys, i * xs, i * cs
    for d in tl.static_range(OUTER):
        size = tl.load(geometry + 4 * d)
        at = rest % size
        rest = rest // size
        y_at += at * tl.load(geometry + 4 * d + 1)
        x_at += at * tl.load(geometry + 4 * d + 2)
        c_at += at * tl.load(geometry + 4 * d + 3)
    k = tl.program_id(1).to(tl.int64)
    alpha = tl.load(number).to(x.dtype.element_ty)
    value = alpha * tl.load(x + k * x_batch + x_at, mask=inside, other=0)
    if HAS_C:
        value *= tl.load(c + c_at, mask=inside, other=0)
    y_at = y + k * y_batch + y_at
    if not OVERWRITE:
        value += tl.load(y_at, mask=inside, other=0)
    tl.store(y_at, value, mask=inside)


@triton.jit
def _muladd_sum(
    partial, x, c, number, geometry, x_batch, targets, summed, part,
    KEPT_DIMS: tl.constexpr, SUMMED_DIMS: tl.constexpr, HAS_C: tl.constexpr, KEPT: tl.constexpr, SUMMED: tl.constexpr,
):
    j = tl.program_id(0).to(tl.int64) * KEPT + tl.arange(0, KEPT)
    inside = j < targets
    rest = j
    x_kept, c_kept = j * 0, j * 0
    for d in tl.static_range(KEPT_DIMS):
        size = tl.load(geometry + 3 * d)
        at = rest % size
        rest = rest // size
        x_kept += at * tl.load(geometry + 3 * d + 1)
        c_kept += at * tl.load(geometry + 3 * d + 2)
    split, k = tl.program_id(1), tl.program_id(2).to(tl.int64)
    acc = tl.zeros([KEPT, SUMMED], x.dtype.element_ty)
    start = split * part
    stop = tl.minimum(start + part, summed)
    for begin in range(start, stop, SUMMED):
        r = begin + tl.arange(0, SUMMED).to(tl.int64)
        valid = inside[:, None] & (r < stop)[None, :]
        rest = r
        x_at, c_at = r * 0, r * 0
        for d in tl.static_range(SUMMED_DIMS):
            size = tl.load(geometry + 3 * (KEPT_DIMS + d))
            at = rest % size
            rest = rest // size
            x_at += at * tl.load(geometry + 3 * (KEPT_DIMS + d) + 1)
            c_at += at * tl.load(geometry + 3 * (KEPT_DIMS + d) + 2)
        value = tl.load(x + k * x_batch + x_kept[:, None] + x_at[None, :], mask=valid, other=0)
        if HAS_C:
            value *= tl.load(c + c_kept[:, None] + c_at[None, :], mask=valid, other=0)
        acc += value
    alpha = tl.load(number).to(x.dtype.element_ty)
    at = (k * tl.num_programs(1) + split) * targets + j
    tl.store(partial + at, alpha * tl.sum(acc, 1), mask=inside)


@triton.jit
def _add_partials(y, partial, geometry, y_batch, targets, splits, DIMS: tl.constexpr, BLOCK: tl.constexpr):
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = j < targets
    k = tl.program_id(1).to(tl.int64)
    rest = j
    y_at = j * 0
    for d in tl.static_range(DIMS):
        size = tl.load(geometry + 2 * d)
        at = rest % size
        rest = rest // size
        y_at += at * tl.load(geometry + 2 * d + 1)
    y_at = y + k * y_batch + y_at
    value = tl.load(y_at, mask=inside, other=0)
    for s in range(splits):
        value += tl.load(partial + (k * splits + s) * targets + j, mask=inside, other=0)
    tl.store(y_at, value, mask=inside)


def muladd(y, x, c, number, space: Space, overwrite: bool = False) -> None:
    """Add to y (K, size) the image of x (K, size); c: a tensor or None; number: alpha, float64, on the device.

    space: shape and strides of y, x, c, as `Space` prepares them; overwrite: y holds nothing yet.
    """
    constant = x if c is None else c
    if not space.sums:
        if space.total:
            _muladd[(cdiv(space.total, BLOCK), len(x))](
                y, x, constant, number, space.geometry(x.device), y.stride(0), x.stride(0), space.total, *space.last,
                OUTER=space.outer, HAS_C=c is not None, OVERWRITE=overwrite, BLOCK=BLOCK,
            )
        return
    if not space.kept or not space.summed:
        return
    blocks = cdiv(space.kept, KEPT)
    splits = max(1, min(SPLITS // blocks, cdiv(space.summed, 4 * SUMMED)))
    part = cdiv(cdiv(space.summed, splits), SUMMED) * SUMMED
    splits = cdiv(space.summed, part)
    partial = x.new_empty(len(x), splits, space.kept)
    _muladd_sum[(blocks, splits, len(x))](
        partial, x, constant, number, space.geometry(x.device), x.stride(0), space.kept, space.summed, part,
        KEPT_DIMS=space.kept_dims, SUMMED_DIMS=space.summed_dims, HAS_C=c is not None, KEPT=KEPT, SUMMED=SUMMED,
    )
    _add_partials[(cdiv(space.kept, BLOCK), len(x))](
        y, partial, space.target(x.device), y.stride(0), space.kept, splits, DIMS=space.kept_dims, BLOCK=BLOCK,
    )
