"""CG for many dampings from one Krylov space.

The residuals of (A + sigma_k I) x_k = b, all begun at zero, are multiples zeta_k of that of sigma = 0, so one product with A an
iteration serves every k. With a scale D this takes place in the variables D^1/2 delta; a penalty is part of A.

Source: B. Jegerlehner, hep-lat/9612014; A. Frommer and P. Maass, SIAM J. Sci. Comput. 20 (1999). csrc/cpu/multishift.cpp does
the same with the updates of all x_k gathered into matrix products.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from ..kernels.limits import CHECK_EVERY, SHIFT_DRIFT, SHIFT_EARLY
from ..kernels.protocol import Outcome
from .options import CG
from .problem import Found, Problem


def multishift(problem: Problem, mus: list[float], options: CG, alone) -> list[Found]:
    """CG's step for each of the ascending mus; of `problem` all but its mu counts.

    Each stops where its own residual is small enough, and is then left alone. What they claim is checked at the end: each by
    its true residual, or in the core all by two random combinations of them, and those one by one that these do not clear. A
    shift that misses its claim is finished by CG of its own, from where it is. alone: CG for one damping. Cost per
    iteration: one JVP and one VJP, and 4 K P operations.
    """
    lin = problem.linearization
    kernels = lin.kernels()
    run = kernels.multishift if kernels.has_multishift else partial(_multishift, lin)
    scale = None if problem.scale is None else problem.scale.to(lin.dtype).contiguous()
    steps, rest = run(problem.r, problem.q, mus, scale, problem.penalty, options)
    found = []
    for mu, step, numbers in zip(mus, steps.unbind(), rest, strict=True):
        outcome = Outcome(step, *numbers)
        if outcome.status in ("stagnated", "breakdown") and outcome.iterations < options.max_iterations:
            outcome = _finished(problem.at(mu), outcome, options, alone)
        found.append(Found(outcome, partial(_again, problem, mu, options, alone), False, {}))
    return found


def _finished(problem: Problem, lost: Outcome, options: CG, alone) -> Outcome:
    """The step of a shift whose recurrence was lost, after as many iterations of its own as it has left."""
    left = replace(options, max_iterations=options.max_iterations - lost.iterations, warm_start=True)
    more = alone(problem, left, {"start": lost.step}).outcome
    return more._replace(iterations=lost.iterations + more.iterations)


def _again(problem: Problem, mu: float, options: CG, alone, u: torch.Tensor) -> torch.Tensor:
    """`Solution.solve_with_same_factor` of one shift, by a solve of its own."""
    one = replace(problem, mu=mu, r=u.to(problem.r.dtype), q=None)
    return alone(one, replace(options, warm_start=False)).outcome.step


def _multishift(lin, r, q, mus, scale, penalty, options: CG):
    W = 1.0 if scale is None else scale.rsqrt()
    c = mus[0] if penalty is None else mus[0] + W * W * penalty

    def apply(X):
        """The base's matrix times vectors (P,) or (n, P)."""
        return W * _ggn(lin, W * X) + c * X

    def norms(E):
        """Of residuals (n, P), in the parameters themselves."""
        return torch.linalg.vector_norm(E / W, dim=-1, dtype=torch.float64)

    b = lin.vjp(r)
    b = W * (b if q is None else b + q)
    K, b_norm = len(mus), float(norms(b))
    X = b.new_zeros(K, len(b))
    if b_norm == 0:
        return X, [("solved", 0, 0.0, 0.0, 0.0, 0.0, 0.0)] * K
    target = max(options.tolerance * b_norm, options.absolute)
    sigma = torch.tensor(mus, dtype=torch.float64) - mus[0]
    zeta, ratio = torch.ones(K, dtype=torch.float64), torch.ones(K, dtype=torch.float64)
    status, iterations = ["max_iterations"] * K, [0] * K
    residual, p, P = b, b, b.repeat(K, 1)
    rz, alpha_before, beta, i = float(torch.dot(b, b)), 1.0, 0.0, 0
    active = torch.ones(K, dtype=torch.bool)

    def column(values):
        return values[:, None].to(b.device, b.dtype)

    def freeze(which, as_what):
        for k in which.nonzero().flatten().tolist():
            status[k], iterations[k], active[k] = as_what, i, False

    if b_norm <= target:
        freeze(active, "solved")
    while bool(active.any()) and i < options.max_iterations:
        Ap = apply(p)
        curvature = float(torch.dot(p, Ap))
        if not (curvature > 0 and rz > 0):
            freeze(active, "breakdown")
            break
        alpha, before = rz / curvature, rz
        ratio = 1 / (1 + sigma * alpha + alpha * beta / alpha_before * (1 - ratio))
        zeta = zeta * ratio
        X = X + column(alpha * ratio * active) * P
        residual = residual - alpha * Ap
        norm, rz, i = float(norms(residual)), float(torch.dot(residual, residual)), i + 1
        beta, alpha_before = rz / before, alpha
        freeze(active & (zeta * norm <= SHIFT_EARLY * target), "solved")
        if bool(active.any()) and i % CHECK_EVERY == 0 and not float(norms(b - apply(X[0]))) <= SHIFT_DRIFT * norm:
            freeze(active, "stagnated")
        P = column(zeta) * residual + column(beta * ratio * ratio) * P
        p = residual + beta * p
    for k in range(K):
        iterations[k] = i if active[k] else iterations[k]
    left = b - apply(X) - column(sigma) * X
    reached = norms(left).tolist()
    found = []
    for k, (x, e) in enumerate(zip(X, left, strict=True)):
        missed = status[k] == "solved" and not reached[k] <= target
        delta = (W * x).double()
        gain, square, slack = float(torch.dot(b, x)), float(torch.dot(delta, delta)), float(torch.dot(e, x))
        found.append(("stagnated" if missed else status[k], iterations[k], reached[k] / b_norm, gain, square, 0.0, slack))
    return W * X, found


def _ggn(lin, X):
    """J^T J times vectors (P,) or (n, P)."""
    kernels = lin.kernels()
    if X.dim() == 1 or kernels.batches:
        return kernels.vjp(kernels.jvp(X))
    return torch.stack([kernels.vjp(kernels.jvp(x)) for x in X])
