"""Preconditioners of CG: z = inverse * x + V^T (c * (V x)), an inverse diagonal and what a sketch adds to it."""

from __future__ import annotations

import torch

from .options import CG, Nystrom
from .problem import Problem


def preconditioner(problem: Problem, options: CG, sketch: dict | None):
    """(inverse, V, c), each None or a tensor, of shapes (P,), (rank, P), (rank,); sketch: what `nystrom` made."""
    if options.preconditioner == "jacobi":
        diagonal = problem.linearization.diagonal() + problem.damping_diagonal
        return torch.where(diagonal > 0, 1 / diagonal, 1.0).to(problem.linearization.dtype), None, None
    if sketch is None:
        return None if problem.scale is None else 1 / problem.scale.to(problem.linearization.dtype), None, None
    dtype = problem.linearization.dtype
    V, values, inverse = sketch["rows"], torch.tensor(sketch["values"], dtype=torch.float64), sketch["inverse"]
    # On the sketched directions the preconditioned matrix is that of the smallest value; below rounding z . x may turn
    # negative.
    ratio = (values[-1] + problem.mu) / (values + problem.mu)
    c = ratio.clamp_min(64 * torch.finfo(V.dtype).eps) - 1
    return None if inverse is None else inverse.to(dtype), V.to(dtype).contiguous(), c.to(V.device, dtype)


def nystrom(problem: Problem, options: Nystrom) -> dict | None:
    """The Nystrom approximation U diag(values) U^T of D^-1/2 (J^T J + penalty) D^-1/2; None where there is nothing to sketch.

    rows: U^T D^-1/2, (rank, P), in the parameters' dtype; values: descending; inverse: D^-1 or None. Cost: rank products
    with J^T J and 6 rank^2 P operations.

    Source: Frangella, Tropp and Udell (2023), algorithm 2.1.
    """
    lin = problem.linearization
    rank = min(options.rank, lin.num_parameters)
    random = torch.Generator().manual_seed(options.seed)
    omega = torch.randn(lin.num_parameters, rank, generator=random, dtype=lin.dtype).to(lin.device)
    omega = torch.linalg.qr(omega)[0]
    root = None if problem.scale is None else problem.scale.to(lin.dtype).rsqrt()

    def scaled(x):
        return x if root is None else root * x

    Y = scaled(lin.ggns(scaled(omega.T))).T.contiguous()
    size = float(torch.linalg.matrix_norm(Y))
    if not 0 < size < float("inf"):
        return None
    shift = lin.num_parameters**0.5 * torch.finfo(lin.dtype).eps * size
    Y += shift * omega
    small = (omega.T @ Y).double()
    factor, info = torch.linalg.cholesky_ex(0.5 * (small + small.T))
    if int(info) != 0:
        return None
    del omega
    # Y factor^-T = Q R; the singular values of R in float64, the vectors in the problem's own precision: P is large.
    Y = torch.linalg.solve_triangular(factor.T.to(lin.dtype), Y, upper=True, left=False)
    Q, R = torch.linalg.qr(Y)
    turn, singular, _ = torch.linalg.svd(R.double())
    U = (Q @ turn.to(lin.dtype)).T
    values = (singular.square() - shift).clamp_min(0)
    values = values.clamp_min(float(values[0]) * torch.finfo(lin.dtype).eps)
    dtype = lin.params[0].dtype
    rows = U if root is None else U * root
    return {
        "rows": rows.to(dtype).contiguous(), "values": values.tolist(),
        "inverse": None if root is None else root.square().to(dtype),
    }
