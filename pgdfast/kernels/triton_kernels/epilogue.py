"""What follows the product of a layer, in one pass: the bias's tangent and the activation's coefficient.

    forward   z[r, j] (+)= beta c[r, j] (y[r, j] + alpha b[j])     y holds the products with weight and input
    adjoint   y[r, j] (+)= beta c[r, j] z[r, j],    b[j] += alpha sum_r y[r, j]

for K tangents at once. Source: design of the linear program, pgdfast/tape/program.py: a bias's muladd followed by the
coefficient's. Column sums are made of partial sums in a fixed order; float32 for float32, float64 for float64.
"""

import triton
import triton.language as tl

from .launch import cdiv

BLOCK = 1024
ROWS, COLUMNS = 64, 32
SPLITS = 64


@triton.jit
def _forward(
    z, y, b, c, numbers, z_batch, y_batch, b_batch, rows, columns, c_step,
    HAS_C: tl.constexpr, KEEP_Y: tl.constexpr, OVERWRITE: tl.constexpr, BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < rows * columns
    k = tl.program_id(1).to(tl.int64)
    alpha, beta = tl.load(numbers).to(y.dtype.element_ty), tl.load(numbers + 1).to(y.dtype.element_ty)
    at = y + k * y_batch + i
    value = tl.load(at, mask=inside, other=0) + alpha * tl.load(b + k * b_batch + i % columns, mask=inside, other=0)
    if KEEP_Y:
        tl.store(at, value, mask=inside)
    value *= beta
    if HAS_C:
        value *= tl.load(c + i * c_step, mask=inside, other=0)
    at = z + k * z_batch + i
    if not OVERWRITE:
        value += tl.load(at, mask=inside, other=0)
    tl.store(at, value, mask=inside)


@triton.jit
def _adjoint(
    y, partial, z, c, numbers, y_batch, z_batch, rows, columns, part, c_step,
    HAS_C: tl.constexpr, OVERWRITE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    j = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    split, k = tl.program_id(1), tl.program_id(2).to(tl.int64)
    alpha, beta = tl.load(numbers).to(y.dtype.element_ty), tl.load(numbers + 1).to(y.dtype.element_ty)
    acc = tl.zeros([ROWS, COLUMNS], y.dtype.element_ty)
    start = split * part
    stop = tl.minimum(start + part, rows)
    for begin in range(start, stop, ROWS):
        r = begin + tl.arange(0, ROWS).to(tl.int64)
        inside = (r < stop)[:, None] & (j < columns)[None, :]
        i = r[:, None] * columns + j[None, :]
        value = beta * tl.load(z + k * z_batch + i, mask=inside, other=0)
        if HAS_C:
            value *= tl.load(c + i * c_step, mask=inside, other=0)
        at = y + k * y_batch + i
        if not OVERWRITE:
            value += tl.load(at, mask=inside, other=0)
        tl.store(at, value, mask=inside)
        acc += value
    at = (k * tl.num_programs(1) + split) * columns + j
    tl.store(partial + at, alpha * tl.sum(acc, 0), mask=j < columns)


def forward(z, y, b, c, numbers, rows: int, columns: int, keep_y: bool, overwrite: bool) -> None:
    """Forward. y, z: windows (K, rows * columns), b: (K, columns), c: (rows, columns), one element or None.

    numbers: alpha, beta. keep_y: y is read again. overwrite: z holds nothing yet.
    """
    _forward[(cdiv(rows * columns, BLOCK), len(y))](
        z, y, b, y if c is None else c, numbers, z.stride(0), y.stride(0), b.stride(0), rows, columns, _step(c),
        HAS_C=c is not None, KEEP_Y=keep_y, OVERWRITE=overwrite, BLOCK=BLOCK,
    )


def adjoint(y, b, z, c, numbers, rows: int, columns: int, overwrite: bool) -> None:
    """The adjoint, with the same windows; overwrite: y holds nothing yet."""
    blocks = cdiv(columns, COLUMNS)
    splits = max(1, min(SPLITS // blocks, cdiv(rows, 2 * ROWS)))
    part = cdiv(cdiv(rows, splits), ROWS) * ROWS
    splits = cdiv(rows, part)
    partial = y.new_empty(len(y), splits, columns)
    _adjoint[(blocks, splits, len(y))](
        y, partial, z, y if c is None else c, numbers, y.stride(0), z.stride(0), rows, columns, part, _step(c),
        HAS_C=c is not None, OVERWRITE=overwrite, ROWS=ROWS, COLUMNS=COLUMNS,
    )
    b.add_(partial.sum(1) if splits > 1 else partial[:, 0])


def _step(c) -> int:
    return 0 if c is None or c.numel() == 1 else 1
