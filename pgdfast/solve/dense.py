"""Direct solvers: Cholesky of the residual-space (dual) or parameter-space (primal) matrix.

The native core runs dual and primal as one call where it can; what stands here is the same algebra in PyTorch, for scaled
problems and other devices.
"""

from __future__ import annotations

import torch

from .problem import WIDE_FACTOR, Found, Problem

# Refinement: rounds at most, the relative error to be reached, and the first correction's relative size beyond which so many
# rounds would be needed that summing and factoring in float64 is quicker (measured on PINNs, whose products are dear).
_ROUNDS, _REFINED, _WORTHWHILE = 6, 1e-7, 3e-3


def dual(problem: Problem) -> Found:
    """Delta = W (J^T y + q), (I + J W J^T) y = r - J W q, W = 1/d. Cost: one Gram matrix, M^3/3, one VJP.

    With uniform d = mu the equation is multiplied through by mu, so that small mu stays representable.
    """
    lin, r = problem.linearization, problem.r
    operator = lin.operator
    if operator.fused and lin.rows is not None and problem.scale is None:
        if problem.uniform:
            found = operator.dual(r, None, problem.mu, None)
        else:
            found = operator.dual(r, problem.buffer_weights(), 1.0, problem.q)
        factor = found.factor
        return Found(*found[:8], again=factor and _again(problem, factor.solve), factor=factor)
    J = lin.dense()
    if problem.uniform:
        K, shift, weights = J @ J.T, problem.mu, None
        rhs = r
    else:
        weights, shift = 1 / problem.diagonal(), 1.0
        scaled = J * weights.sqrt()
        K = scaled @ scaled.T
        rhs = r if problem.q is None else r - J @ (weights * problem.q)
    solve = _cholesky(K, shift)
    if solve is None:
        return Found.failed(lin)
    y = solve(rhs)
    step = lin.vjp(y)
    if weights is not None:
        step = weights * (step if problem.q is None else step + problem.q)
    gain = float(torch.dot(r.double(), r.double() - shift * y.double()))
    if problem.q is not None:
        gain += float(torch.dot(problem.q.double(), step.double()))
    trace = float(K.diagonal().sum()) / shift
    return Found(step, "solved", gain=gain, square=_square(step), trace=trace, again=_again(problem, solve))


def primal(problem: Problem) -> Found:
    """Cholesky of diag(d) + J^T J. Cost: J, M P^2, P^3/3."""
    lin = problem.linearization
    _ = lin.rows   # Jacobian rows are cheaper once the row structure is known
    if lin.operator.fused:
        found = lin.operator.primal(problem.r, problem.diagonal(), problem.q)
        factor = found.factor
        return Found(*found[:8], again=factor and (lambda u: factor.solve(lin.vjp(u))), factor=factor)
    J = lin.dense()
    g = problem.gradient()
    H, d = J.T @ J, problem.diagonal()
    solve = _cholesky(H, d)
    if solve is None:
        return Found.failed(lin)
    step = solve(g)
    gain = float(torch.dot(g.double(), step.double()))
    trace = float((H.diagonal() / d).sum())
    return Found(step, "solved", gain=gain, square=_square(step), trace=trace, again=lambda u: solve(lin.vjp(u)))


def _again(problem: Problem, solve):
    """U -> W J^T (s I + J W J^T)^-1 u, given the dual matrix's solve."""

    def again(u):
        step = problem.linearization.vjp(solve(u))
        return step if problem.uniform else step / problem.diagonal()

    return again


def refined(name: str, problem: Problem, found: Found) -> Found | None:
    """The same solve, refined in float64: residuals by float64 products, corrections by the float32 factor that is held.

    name: "dual" or "primal"; found: its float32 result. None where the core holds no such factor, or the corrections shrink too
    slowly: the matrix is too ill-conditioned for its float32 factor. Cost: two products and one solve with the factor per
    round, two rounds as a rule.
    Source: Wilkinson (1963); Higham, Accuracy and Stability of Numerical Algorithms (2002), chapter 12.
    """
    lin = problem.linearization
    if not lin.operator.fused or (name == "dual" and (lin.rows is None or problem.scale is not None)):
        return None
    core, wide = lin.operator, problem.widened()
    product = wide.linearization.operator
    refine = _refined_dual if name == "dual" else _refined_primal
    better = refine(problem, wide, core, product, found)
    return better and better._replace(again=lambda u: found.again(u.to(core.dtype)))   # a correction needs few digits


def _refined_dual(problem, wide, core, product, found):
    r = wide.r
    weights, shift = None, problem.mu
    if not problem.uniform:
        weights, shift = 1 / wide.diagonal(), 1.0
    step, shift_r = None, r if wide.q is None else r - product.jvp(weights * wide.q)
    y = found.factor.dual_vector.double()

    def parameters(v):
        return v if weights is None else weights * v

    def residual(y):
        nonlocal step
        step = parameters(product.vjp(y))
        return shift_r - product.jvp(step) - shift * y

    y, last = _corrected(found.factor, core.dtype, y, residual)
    if y is None:
        return None
    step = step + parameters(core.vjp(last).double())
    gain = float(torch.dot(r, r - shift * y))
    if wide.q is not None:
        step = step + weights * wide.q
        gain += float(torch.dot(wide.q, step))
    return Found(step, "solved", gain=gain, square=_square(step), trace=found.trace)


def _refined_primal(problem, wide, core, product, found):
    g, d = wide.gradient(), wide.diagonal()
    step, _ = _corrected(found.factor, core.dtype, found.step.double(), lambda x: g - d * x - product.vjp(product.jvp(x)))
    if step is None:
        return None
    return Found(step, "solved", gain=float(torch.dot(g, step)), square=_square(step), trace=found.trace)


def _corrected(factor, dtype, x: torch.Tensor, residual):
    """(x, last correction) after rounds of x += F^-1 residual(x), F the factor; (None, None) if that is not worthwhile.

    The error after a round is about the last correction times the rate at which corrections shrink.
    """
    before, least = float(torch.linalg.vector_norm(x)), _WORTHWHILE
    for _ in range(_ROUNDS):
        correction = factor.solve(residual(x).to(dtype))
        size = float(torch.linalg.vector_norm(correction.double()))
        if not size <= least * before:
            break
        least = 0.1
        x = x + correction
        rate, before = size / before if before > 0 else 0.0, size
        if size * rate <= _REFINED * float(torch.linalg.vector_norm(x)):
            return x, correction
    return None, None


def _cholesky(matrix: torch.Tensor, diagonal):
    """Rhs -> solution of (matrix + diag) x = rhs, by a float64 factor while that is cheap; None where there is none."""
    matrix = matrix.double() if len(matrix) <= WIDE_FACTOR else matrix
    matrix = matrix.clone()
    matrix.diagonal().add_(diagonal)
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        return None
    return lambda rhs: torch.cholesky_solve(rhs.to(factor.dtype).unsqueeze(1), factor).squeeze(1).to(rhs.dtype)


def _square(step: torch.Tensor) -> float:
    return float(step.double().square().sum())
