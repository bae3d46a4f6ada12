"""The Gram matrix of one weight from its factors, without a Jacobian and without a temporary of K's size.

    K[i, j] += sum over pairs of uses (s, t) of (A_s[i] . A_t[j]) * (weight B_s[i] . B_t[j] + shift)

A: cotangents Y and B: constants C of a use's rows, or, where a weight is used along and against its rows, the factors of
its high and of its low dimension. Tiles of the upper half alone; both products and the sum over uses stay in registers, and
K is read and written once. SHARED: B_s[i] . B_t[j] was found once for all residuals of a row and is looked up.
Source: per-layer factors of J J^T, csrc/cpu/gram.cpp. Products are IEEE float32 (no TF32: a second-order solve does not
forgive it), float64 for float64.
"""

import triton
import triton.language as tl

from .launch import cdiv

TILE = {4: 64, 8: 32}   # by bytes of an element
DEPTH = 16


@triton.jit
def _product(a, i, first_i, last_i, start_i, j, first_j, last_j, start_j, depth, T: tl.constexpr, DEPTH: tl.constexpr):
    """a[rows i of one use] a[rows j of another]^T, zero for rows that a use does not have."""
    acc = tl.zeros([T, T], a.dtype.element_ty)
    here, there = (i >= first_i) & (i < last_i), (j >= first_j) & (j < last_j)
    left, right = (start_i + i - first_i) * depth, (start_j + j - first_j) * depth
    for begin in range(0, depth, DEPTH):
        l = begin + tl.arange(0, DEPTH)  # noqa: E741
        x = tl.load(a + left[:, None] + l[None, :], mask=here[:, None] & (l < depth)[None, :], other=0)
        y = tl.load(a + right[None, :] + l[:, None], mask=there[None, :] & (l < depth)[:, None], other=0)
        acc = tl.dot(x, y, acc, input_precision="ieee", out_dtype=a.dtype.element_ty)
    return acc


@triton.jit
def _gram(
    K, A, B, owner, ranges, numbers, M, uses, a_depth, b_depth, shared_rows,
    SHARED: tl.constexpr, T: tl.constexpr, DEPTH: tl.constexpr,
):
    block_i, block_j = tl.program_id(0), tl.program_id(1)
    if block_j >= block_i:
        i = block_i.to(tl.int64) * T + tl.arange(0, T)
        j = block_j.to(tl.int64) * T + tl.arange(0, T)
        weight, shift = tl.load(numbers).to(K.dtype.element_ty), tl.load(numbers + 1).to(K.dtype.element_ty)
        acc = tl.zeros([T, T], K.dtype.element_ty)
        for s in range(uses):
            first_i, last_i, start_i = tl.load(ranges + 3 * s), tl.load(ranges + 3 * s + 1), tl.load(ranges + 3 * s + 2)
            if (first_i < (block_i + 1) * T) & (last_i > block_i * T):
                for t in range(uses):
                    first_j, last_j, start_j = tl.load(ranges + 3 * t), tl.load(ranges + 3 * t + 1), tl.load(ranges + 3 * t + 2)
                    if (first_j < (block_j + 1) * T) & (last_j > block_j * T):
                        left = _product(A, i, first_i, last_i, start_i, j, first_j, last_j, start_j, a_depth, T, DEPTH)
                        if SHARED:
                            here, there = (i >= first_i) & (i < last_i), (j >= first_j) & (j < last_j)
                            row = tl.load(owner + start_i + i - first_i, mask=here, other=0)
                            column = tl.load(owner + start_j + j - first_j, mask=there, other=0)
                            at = B + row[:, None] * shared_rows + column[None, :]
                            right = tl.load(at, mask=here[:, None] & there[None, :], other=0)
                        else:
                            right = _product(B, i, first_i, last_i, start_i, j, first_j, last_j, start_j, b_depth, T, DEPTH)
                        acc += left * (weight * right + shift)
        at = K + i[:, None] * M + j[None, :]
        inside = (i < M)[:, None] & (j < M)[None, :]
        tl.store(at, tl.load(at, mask=inside, other=0) + acc, mask=inside)


def gram(K, A, B, owner, ranges, numbers, uses: int) -> None:
    """Add one weight to the upper tiles of K (M, M).

    A (T, a) and B (T, b): the factors of all uses, one after another, T residuals in all; ranges (uses, 3), int64: first
    and last residual of a use and where it starts in A. owner: None, or (T,) int64, the row of each residual, and B then
    holds the products of those rows (R, R). numbers: weight, shift.
    """
    tile = TILE[K.element_size()]
    blocks = cdiv(len(K), tile)
    _gram[(blocks, blocks)](
        K, A, B, ranges if owner is None else owner, ranges, numbers, len(K), uses, A.shape[1], B.shape[1], B.shape[1],
        SHARED=owner is not None, T=tile, DEPTH=DEPTH,
    )
