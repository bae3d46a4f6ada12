"""Functions of matrices: products with constant matrices where the derivative is one, else local Jacobians."""

from __future__ import annotations

import torch

from .local import local
from .table import rule


def _identity(like: torch.Tensor) -> torch.Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand(like.shape)


@rule("LinalgInvExBackward0", saved="inverse")
def inverse(op, x):
    """DX = -X dA X."""
    op.temporary("right", x.shape)
    op.matmul(0, right=x, alpha=-1, out="right")
    op.matmul("right", left=x)


@rule("LinalgSolveExBackward0", saved="A left result")
def solve(op, a, left, x):
    """A X = B: dX = A^-1 (dB - dA X); X A = B: dX = (dB - X dA) A^-1. Of vectors B where X has a dimension less than A."""
    _solved(op, 0, 1, a, torch.linalg.inv(a), x, left, None)


@rule("LinalgSolveTriangularBackward0", saved="left result self unitriangular upper")
def solve_triangular(op, left, x, a, unit, upper):
    """The same, of the triangle of A, without its diagonal where that is taken for ones."""
    a = a.triu() if upper else a.tril()
    inner = torch.ones(a.shape[-2:], dtype=torch.bool, device=a.device)
    inner = inner.triu(int(unit)) if upper else inner.tril(-int(unit))
    if unit:
        a = a * inner + _identity(a)
    inverse = torch.linalg.solve_triangular(a, _identity(a), upper=upper, unitriangular=unit)
    _solved(op, 0, 1, a, inverse, x, left, inner)


def _solved(op, of_a: int, of_b: int, a, inverse, x, left: bool, mask):
    vector = x.dim() == a.dim() - 1
    x = x.unsqueeze(-1) if vector else x
    batch = torch.broadcast_shapes(x.shape[:-2], a.shape[:-2])
    full = (*batch, *x.shape[-2:])
    op.temporary("change", full)
    if op.needs[of_a]:
        matrix = of_a
        if mask is not None:
            op.temporary("triangle", a.shape)
            op.scale(of_a, mask, out="triangle")
            matrix = "triangle"
        op.view(matrix, lambda t: t.expand(*batch, *t.shape[-2:]), out="matrix")
        if left:
            op.matmul("matrix", right=x.expand(full), alpha=-1, out="change")
        else:
            op.matmul("matrix", left=x.expand(full), alpha=-1, out="change")
    if op.needs[of_b]:
        op.view(of_b, lambda t: (t.unsqueeze(-1) if vector else t).expand(full), out="side")
        op.add("side", out="change")
    inverse = inverse.expand(*batch, *inverse.shape[-2:])
    op.temporary("solution", full)
    if left:
        op.matmul("change", left=inverse, out="solution")
    else:
        op.matmul("change", right=inverse, out="solution")
    op.view("solution", lambda y: y.squeeze(-1) if vector else y, out=0)


@rule("LinalgCholeskyExBackward0", saved="L upper")
@rule("CholeskyBackward0", saved="result upper")
def cholesky(op, factor, upper):
    """A = L L^T: dL = L phi(L^-1 dA L^-T), phi half the diagonal and all below; autograd takes the symmetric part of dA."""
    low = factor.mT if upper else factor
    inverse = torch.linalg.solve_triangular(low, _identity(low), upper=False)
    phi = torch.ones(low.shape[-2:], dtype=low.dtype, device=low.device).tril() - 0.5 * _identity(low[..., :, :]).reshape(
        -1, *low.shape[-2:])[0]
    for name in ("symmetric", "left", "both", "lower", "factor"):
        op.temporary(name, low.shape)
    op.add(0, 0.5, out="symmetric")
    op.view(0, lambda x: x.mT, out="transposed")
    op.add("transposed", 0.5, out="symmetric")
    op.matmul("symmetric", left=inverse, out="left")
    op.matmul("left", right=inverse.mT, out="both")
    op.scale("both", phi, out="lower")
    op.matmul("lower", left=low, out="factor")
    op.view("factor", lambda y: y.mT if upper else y, out=0)


# --- by local Jacobians -----------------------------------------------------------------------------------------------------

MATRICES = """
    CholeskyInverseBackward0 CholeskySolveBackward0 LinalgDetBackward0 LinalgEighBackward0 LinalgLuBackward0
    LinalgLuFactorExBackward0 LinalgMatrixExpBackward0 LinalgPinvBackward0 LinalgQrBackward0 LinalgSlogdetBackward0
    LinalgSvdBackward0 LuUnpackBackward0 TriangularSolveBackward0
"""


@rule(*MATRICES.split(), own=True, used=True)
def matrices(op, backward, used):
    """Of matrices in the last two dimensions: a matrix each, a vector or a number, told by the dimensions of the gradient."""
    for out in used:
        own = len(backward.outputs[out].shape)
        full = next((g.dim() for g in backward(backward.ones(out), out) if g is not None), None)
        if full is None:   # the sign of a determinant
            op.nothing(out)
            continue
        local(op, backward, {i: (-2, -1) for i in range(len(op.needs))}, out, range(full - 2, own))


@rule("LinalgHouseholderProductBackward0", "OrmqrBackward0", own=True)
def reflections(op, backward):
    local(op, backward, {0: (-2, -1), 1: (-1,), **({2: (-2, -1)} if len(op.needs) > 2 else {})}, 0, (-2, -1))


@rule("LinalgLuSolveBackward0", own=True)
def lu_solve(op, backward):
    local(op, backward, {i: (-2, -1) for i in range(len(op.needs))}, 0, (-2, -1))


@rule("LinalgLstsqBackward0", saved="b self", own=True, used=True)
def least_squares(op, b, a, backward, used):
    side = (-2, -1) if b.dim() == a.dim() else (-1,)
    for out in used:
        local(op, backward, {0: (-2, -1), 1: side}, out, side if out == 0 else (-1,))
