"""Products of matrices and vectors: the product rule, with the other factor as the constant.

A factor on the left may be sparse: rows of the other one, gathered and weighted, are added up.
"""

from __future__ import annotations

import torch

from ..program import UnsupportedStructure
from .table import Keyed, rule


def _times(op, i, left, alpha=1.0, matrix=True):
    """Out += alpha * left @ in_i, a matrix or a vector."""
    if not isinstance(left, Keyed):
        op.matmul(i, left=left, alpha=alpha)
        return
    columns, entries = left.value
    op.temporary("taken", columns.shape, behind=(i, 1))
    op.gather(i, columns, 1, out="taken")
    op.sum("taken", (1,), False, c=entries[:, :, None] if matrix else entries, alpha=alpha)


def _by(op, i, right, alpha=1.0):
    """Out += alpha * in_i @ right."""
    if isinstance(right, Keyed):
        raise UnsupportedStructure("a product with a sparse matrix on the right")
    op.matmul(i, right=right, alpha=alpha)


@rule("MmBackward0", "BmmBackward0", saved="mat2 self", sparse=True)
def matrix_product(op, right, left):
    if op.needs[0]:
        _by(op, 0, right)
    if op.needs[1]:
        _times(op, 1, left)


@rule("AddmmBackward0", "SparseAddmmBackward0", saved="mat1 mat2 alpha beta", sparse=True)
@rule("BaddbmmBackward0", saved="batch1 batch2 alpha beta")
def sum_and_product(op, left, right, alpha, beta):
    # The product goes first: it overwrites its whole output, the broadcast summand then adds to it.
    if op.needs[1]:
        _by(op, 1, right, alpha)
    if op.needs[2]:
        _times(op, 2, left, alpha)
    if op.needs[0]:
        op.add(0, beta)


@rule("MvBackward0", saved="self vec", sparse=True)
def matrix_vector(op, matrix, vector):
    if op.needs[0]:
        op.sum(0, (1,), False, c=vector)
    if op.needs[1]:
        _times(op, 1, matrix, matrix=False)


@rule("AddmvBackward0", saved="alpha beta mat vec")
def sum_and_matrix_vector(op, alpha, beta, matrix, vector):
    if op.needs[1]:
        op.sum(1, (1,), False, c=vector, alpha=alpha)
    if op.needs[2]:
        op.matmul(2, left=matrix, alpha=alpha)
    if op.needs[0]:
        op.add(0, beta)


@rule("AddrBackward0", saved="alpha beta vec1 vec2")
def sum_and_outer(op, alpha, beta, left, right):
    if op.needs[0]:
        op.add(0, beta)
    if op.needs[1]:
        op.view(1, lambda x: x[:, None], out="column")
        op.scale("column", alpha * right)
    if op.needs[2]:
        op.scale(2, alpha * left[:, None])


@rule("AddbmmBackward0", saved="alpha batch1 batch2 beta", shape=True)
def sum_of_products(op, alpha, left, right, beta, shape, device):
    for i in (1, 2):
        if op.needs[i]:
            count = len(right if i == 1 else left)
            op.temporary(f"products {i}", (count, *shape))
            if i == 1:
                op.matmul(1, right=right, alpha=alpha, out="products 1")
            else:
                op.matmul(2, left=left, alpha=alpha, out="products 2")
            op.sum(f"products {i}", (0,), False)
    if op.needs[0]:
        op.add(0, beta)


@rule("DotBackward0", saved="self tensor")
@rule("VdotBackward0", saved="self other")
def dot(op, left, right):
    if op.needs[0]:
        op.sum(0, (0,), False, c=right)
    if op.needs[1]:
        op.sum(1, (0,), False, c=left)


@rule("TrilinearBackward0", saved="expand1 expand2 expand3 i1 i2 i3 sumdim", shape=True)
def bilinear(op, expand1, expand2, expand3, x, weight, y, summed, shape, device):
    """Sum over i, j of x[b, i] weight[o, i, j] y[b, j]; the tape holds those of the three that others' derivatives need."""
    if ([*expand1], [*expand2], [*expand3], [*summed]) != ([1, 3], [0], [1, 2], [2, 3]):
        raise UnsupportedStructure("a trilinear form that is not nn.Bilinear's")
    op.temporary("result", shape)
    if op.needs[1]:
        op.reshape(1, (shape[1], x.shape[1] * y.shape[1]), out="weight")
        op.view("weight", lambda t: t.mT, out="weight")
        op.matmul("weight", left=(x[:, :, None] * y[:, None, :]).flatten(1), out="result")
    for i, matrix, other in ((0, "oij,bj->bio", y), (2, "oij,bi->bjo", x)):
        if op.needs[i]:
            op.view(i, lambda t: t[:, None], out="row")
            op.view("result", lambda t: t[:, None], out="products")
            op.matmul("row", right=torch.einsum(matrix, weight, other), out="products")
    op.view("result", lambda t: t)
