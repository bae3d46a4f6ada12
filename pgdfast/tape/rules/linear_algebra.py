"""Products of matrices and vectors: the product rule, with the other factor as the constant."""

from __future__ import annotations

from .table import rule


@rule("MmBackward0", "BmmBackward0", saved="mat2 self")
def matrix_product(op, right, left):
    if op.needs[0]:
        op.matmul(0, right=right)
    if op.needs[1]:
        op.matmul(1, left=left)


@rule("AddmmBackward0", saved="mat1 mat2 alpha beta")
@rule("BaddbmmBackward0", saved="batch1 batch2 alpha beta")
def sum_and_product(op, left, right, alpha, beta):
    # The product goes first: it overwrites its whole output, the broadcast summand then adds to it.
    if op.needs[1]:
        op.matmul(1, right=right, alpha=alpha)
    if op.needs[2]:
        op.matmul(2, left=left, alpha=alpha)
    if op.needs[0]:
        op.add(0, beta)


@rule("MvBackward0", saved="self vec")
def matrix_vector(op, matrix, vector):
    if op.needs[0]:
        op.sum(0, (1,), False, c=vector)
    if op.needs[1]:
        op.matmul(1, left=matrix)


@rule("DotBackward0", saved="self tensor")
def dot(op, left, right):
    if op.needs[0]:
        op.sum(0, (0,), False, c=right)
    if op.needs[1]:
        op.sum(1, (0,), False, c=left)
