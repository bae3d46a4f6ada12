"""The damped normal equations (mu D + J^T J) delta = J^T r, by dense algebra or textbook CG."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .linearization import Linearization

SOLVERS = ("auto", "dual", "primal", "cg", "eigh", "lsmr")


@dataclass(frozen=True)
class Solution:
    """What a solve found.

    Attributes:
        step: delta, (P,) float64; the update is theta <- theta - lr * delta. Zeros when the
            factorization failed.
        status: "solved", "max_iterations" (CG ran out), "not_positive_definite" (Cholesky failed)
            or "breakdown" (CG met a direction without curvature, or the step was not finite).
        iterations: CG iterations, 0 for a direct solver.
        residual_norm: ||b - A delta|| / ||b|| with A = mu D + J^T J and b = J^T r; 0 when b is 0.
        predicted_reduction: g . delta - 1/2 ||J delta||^2 with g = J^T r, what the quadratic model
            of the loss falls by for lr = 1.
        solver: the solver really used.

    """

    step: Tensor
    status: str
    iterations: int
    residual_norm: float
    predicted_reduction: float
    solver: str


def solve(
    linearization: Linearization,
    damping: float,
    *,
    scale: Tensor | None = None,
    solver: str = "auto",
    cg_max_iterations: int = 150,
    cg_tolerance: float = 1e-6,
    rcond: float = 1e-8,
    prior: Tensor | None = None,
) -> Solution:
    """Solve (mu D + J^T J) delta = J^T r + mu D p.

    Args:
        linearization: J (M, P) and r (M,), float64.
        damping: mu >= 0. With 0 the direct solvers all mean "eigh": the pseudo-inverse.
        scale: the diagonal of D, (P,), positive; None is the identity. With damping 0, "eigh" finds
            the step of smallest ||D^1/2 delta||, and "cg", where D has left the equations, that of
            smallest ||delta||.
        solver: "dual" (Cholesky of J D^-1 J^T + mu I, M by M), "primal" (Cholesky of
            mu D + J^T J, P by P), "eigh", "cg", "lsmr" (here the least-squares problem that LSMR
            iterates on, by QR of [J D^-1/2; mu^1/2 I]), or "auto": dual if M <= P, else primal.
        cg_max_iterations: the most iterations of CG.
        cg_tolerance: CG stops at ||b - A delta|| <= cg_tolerance ||b||.
        rcond: with damping 0, "eigh" drops eigenvalues of J^T J (in the variables D^1/2 theta) that
            are at most rcond times the largest.
        prior: p, (P,), to which the damping pulls; None is zero. It is solved for delta - p, which
            has r - J p for r; with damping 0 that is the least-squares solution nearest to p.

    Returns:
        The solution. A numerical failure is a status there, never an exception.

    Raises:
        ValueError: an argument is outside what is said above.

    """
    mu = float(damping)
    J, r = linearization.jacobian, linearization.residual
    if not (math.isfinite(mu) and mu >= 0):
        raise ValueError(f"pgdfast.reference.solve: damping must be finite and >= 0, got {mu}")
    if solver not in SOLVERS:
        raise ValueError(
            f"pgdfast.reference.solve: solver must be one of {', '.join(SOLVERS)}; got {solver!r}"
        )
    if rcond < 0 or cg_tolerance < 0 or cg_max_iterations < 0:
        raise ValueError(
            "pgdfast.reference.solve: rcond, cg_tolerance and cg_max_iterations must be >= 0, got "
            f"{rcond}, {cg_tolerance} and {cg_max_iterations}"
        )
    D = J.new_ones(J.shape[1]) if scale is None else scale.to(J)
    if D.shape != (J.shape[1],) or not ((D > 0) & D.isfinite()).all():
        raise ValueError(
            f"pgdfast.reference.solve: scale must be positive, finite and of shape ({J.shape[1]},)"
        )

    p = torch.zeros_like(D) if prior is None else prior.to(J)
    if p.shape != D.shape:
        raise ValueError(f"pgdfast.reference.solve: prior must be of shape ({J.shape[1]},)")

    if solver == "auto":
        solver = "dual" if J.shape[0] <= J.shape[1] else "primal"
    if mu == 0 and solver in ("dual", "primal", "lsmr"):
        solver = "eigh"
    g, r = J.T @ r, r - J @ p
    b, iterations = J.T @ r, 0
    if b.numel() == 0 or not b.any():
        delta, status = torch.zeros_like(b), "solved"
    elif solver == "dual":
        delta, status = _dual(J, r, mu, D)
    elif solver == "primal":
        delta, status = _primal(J, b, mu, D)
    elif solver == "eigh":
        delta, status = _eigh(J, r, mu, D, rcond)
    elif solver == "lsmr":
        delta, status = _least_squares(J, r, mu, D)
    else:
        delta, status, iterations = _cg(J, b, mu, D, cg_max_iterations, cg_tolerance)
    if not delta.isfinite().all():
        delta, status = torch.zeros_like(b), "breakdown"

    error = b - (J.T @ (J @ delta) + mu * D * delta)
    if status not in ("not_positive_definite", "breakdown"):
        delta = delta + p
    J_delta = J @ delta
    return Solution(
        step=delta,
        status=status,
        iterations=iterations,
        residual_norm=(error.norm() / b.norm()).item() if b.any() else 0.0,
        predicted_reduction=(g @ delta - 0.5 * J_delta @ J_delta).item(),
        solver=solver,
    )


def _dual(J: Tensor, r: Tensor, mu: float, D: Tensor) -> tuple[Tensor, str]:
    """Return delta = D^-1 J^T z with (J D^-1 J^T + mu I) z = r."""
    A = (J / D) @ J.T + mu * torch.eye(len(r)).to(J)
    z, status = _cholesky_solve(A, r)
    return (J.T @ z) / D, status


def _primal(J: Tensor, b: Tensor, mu: float, D: Tensor) -> tuple[Tensor, str]:
    """Solve (mu D + J^T J) delta = b."""
    return _cholesky_solve(mu * torch.diag(D) + J.T @ J, b)


def _cholesky_solve(A: Tensor, b: Tensor) -> tuple[Tensor, str]:
    L, failed = torch.linalg.cholesky_ex(A)
    if failed:
        return torch.zeros_like(b), "not_positive_definite"
    return torch.cholesky_solve(b[:, None], L)[:, 0], "solved"


def _eigh(J: Tensor, r: Tensor, mu: float, D: Tensor, rcond: float) -> tuple[Tensor, str]:
    """Return delta = D^-1/2 X^T (X X^T + mu I)^+ r = D^-1/2 (X^T X + mu I)^+ X^T r.

    Here X = J D^-1/2, and ^+ is the pseudo-inverse.
    """
    X = J / D.sqrt()
    dual = X.shape[0] <= X.shape[1]
    eigenvalues, V = torch.linalg.eigh(X @ X.T if dual else X.T @ X)
    eigenvalues = eigenvalues.clamp(min=0)  # rounding may leave -1e-17
    kept = (eigenvalues > rcond * eigenvalues.max()) | (mu > 0)
    inverse = torch.where(kept, 1 / (eigenvalues + mu), 0.0)
    y = X.T @ (V @ (inverse * (V.T @ r))) if dual else V @ (inverse * (V.T @ (X.T @ r)))
    return y / D.sqrt(), "solved"


def _least_squares(J: Tensor, r: Tensor, mu: float, D: Tensor) -> tuple[Tensor, str]:
    """Return delta = D^-1/2 y with y the least-squares solution of [J D^-1/2; mu^1/2 I] y = [r; 0]."""
    P = J.shape[1]
    rows = torch.cat([J / D.sqrt(), math.sqrt(mu) * torch.eye(P).to(J)])
    rhs = torch.cat([r, r.new_zeros(P)])
    return torch.linalg.lstsq(rows, rhs[:, None]).solution[:, 0] / D.sqrt(), "solved"


def _cg(
    J: Tensor, b: Tensor, mu: float, D: Tensor, max_iterations: int, tolerance: float
) -> tuple[Tensor, str, int]:
    """Conjugate gradients on A = mu D + J^T J from zero (Hestenes and Stiefel, 1952)."""
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    rr, target = r @ r, tolerance * b.norm()
    for k in range(max_iterations + 1):
        if r.norm() <= target:
            return x, "solved", k
        if k == max_iterations:
            break
        Ap = J.T @ (J @ p) + mu * D * p
        curvature = p @ Ap
        if not curvature > 0:
            return x, "breakdown", k
        alpha = rr / curvature
        x = x + alpha * p
        r = r - alpha * Ap
        rr, rr_old = r @ r, rr
        p = r + (rr / rr_old) * p
    return x, "max_iterations", max_iterations
