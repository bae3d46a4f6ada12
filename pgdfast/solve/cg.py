"""Conjugate gradients on the damped normal equations, matrix-free."""

from __future__ import annotations

import torch

from .options import CG
from .problem import Found, Problem


def cg(problem: Problem, options: CG) -> Found:
    """CG from zero on (diag(d) + J^T J) delta = g, preconditioned by the scale D where there is one.

    Cost per iteration: one JVP and one VJP. Stops at ||b - A x|| <= tolerance ||b||, judged by the true residual, which is
    recomputed every 50 iterations and whenever the recurrence claims to have arrived; CG restarts from it where the two
    differ, until that no longer helps.
    """
    lin = problem.linearization
    operator, d = lin.operator, problem.diagonal()
    inverse = None if problem.scale is None else 1 / problem.scale.to(lin.dtype)
    if operator.fused:
        return Found(*operator.cg(lin.residual, d, problem.q, inverse, options.max_iterations, options.tolerance))
    return _cg(lin, d, problem.q, inverse, options)


def _cg(lin, d, q, inverse, options: CG):
    def apply(x):
        return lin.vjp(lin.jvp(x)) + d * x

    b = lin.vjp(lin.residual)
    b = b if q is None else b + q
    x = torch.zeros_like(b)
    residual = b.clone()
    b_norm = norm = float(torch.linalg.vector_norm(b))
    if b_norm == 0:
        return Found(x, "solved", 0, 0.0)
    z = residual if inverse is None else inverse * residual
    p, rz = z.clone(), float(torch.dot(residual, z))
    status, iterations, last_claim = "max_iterations", 0, b_norm
    while iterations < options.max_iterations:
        Ap = apply(p)
        curvature = float(torch.dot(p, Ap))
        if not curvature > 0:
            status = "solved" if norm <= options.tolerance * b_norm else "breakdown"
            break
        step = rz / curvature
        x += step * p
        residual = residual - step * Ap
        iterations += 1
        norm = float(torch.linalg.vector_norm(residual))
        claim, restart = norm <= options.tolerance * b_norm, False
        if claim or iterations % 50 == 0:
            recurrence, residual = norm, b - apply(x)
            norm = float(torch.linalg.vector_norm(residual))
            if norm <= options.tolerance * b_norm:
                status = "solved"
                break
            restart = claim or norm > 1.1 * recurrence
            if restart and norm > 0.5 * last_claim:
                status = "stagnated"
                break
            last_claim = norm if restart else last_claim
        z = residual if inverse is None else inverse * residual
        following = float(torch.dot(residual, z))
        p = z if restart else z + (following / rz) * p
        rz = following
    return Found(x, status, iterations, norm / b_norm, float(torch.dot(b, x)), float(torch.dot(x, x)))
