"""Direct solvers: Cholesky of the residual-space (dual) or parameter-space (primal) matrix.

Both are the same solve of (matrix + diag(added)) y = rhs:

    dual      s I + J W J^T,  W = 1/d:  rhs = r - J W q,    delta = W (J^T y + q)
    primal    diag(d) + J^T J:          rhs = J^T r + q,    delta = y

With uniform d = mu the dual equation is multiplied through by mu, so that small mu stays representable: W = 1 and s = mu, else
s = 1. The native core and the CUDA kernels run all of it as one call where rows separate; what stands here is the same in
PyTorch, for scaled problems and other kernels, and for captured steps, whose numbers stay on their device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from ..kernels.limits import (
    DOUBLE_FACTOR,
    NARROW_CONDITION,
    PASS_BYTES,
    PASS_PART,
    REFINE_FIRST,
    REFINE_RATE,
    REFINE_ROUNDS,
    REFINED_ERROR,
    WIDE_FACTOR,
)
from ..kernels.protocol import Outcome, TensorFactor
from .problem import Found, Problem, affords_float64
from .sizes import CHOLESKY, Sizes


class Cholesky:
    """The solver "dual" or "primal".

    A float32 step's relative error is about 1e-8 of the condition number of the damped matrix, which the trace of J D^-1 J^T
    bounds. Beyond NARROW_CONDITION it is refined with float64 products; up to order DOUBLE_FACTOR, where that saves nothing,
    and where the float32 factor is too poor for it, it is summed and factored in float64 (measured: bench/NOTES.md).
    """

    automatic = 1

    def __init__(self, name: str):
        self.name = name

    def order(self, lin) -> int:
        """Of the matrix."""
        return lin.num_residuals if self.name == "dual" else lin.num_parameters

    def refines(self, lin) -> bool:
        """Whether a float32 step is refined before float64 sums are tried."""
        return lin.dtype == torch.float32 and self.order(lin) > DOUBLE_FACTOR

    def solve(self, problem, options, rcond, wide, keep, time) -> Found:
        """The step, in float64 where float32 could not give four digits and the problem is small."""
        lin = problem.linearization
        if not (wide and affords_float64(lin)):
            outcome, again = self.factored(problem)
            if lin.dtype != torch.float32 or (outcome.trace <= NARROW_CONDITION and outcome.status == "solved"):
                return Found(outcome, again)
            better = refined(self.name, problem, outcome) if outcome.status == "solved" and self.refines(lin) else None
            if better is not None or not affords_float64(lin):
                return Found(better or outcome, again)   # what is left to `again` needs few digits
        outcome, again = self.factored(problem.widened())
        return Found(outcome, again, outcome.trace > NARROW_CONDITION)

    def factored(self, problem: Problem) -> tuple[Outcome, Callable | None]:
        """(outcome, again) in the precision of the problem."""
        lin = problem.linearization
        rows, kernels = lin.row_layout(), lin.kernels()   # in this order: they may depend on the rows
        if not kernels.has_direct or (self.name == "dual" and (rows is None or problem.scale is not None)):
            outcome = solved(system(self.name, problem))
        elif self.name == "primal":
            outcome = kernels.primal(problem.r, problem.diagonal(), problem.q)
        elif problem.penalty is None:
            outcome = kernels.dual(problem.r, None, problem.mu, None)
        else:
            outcome = kernels.dual(problem.r, problem.weights_by_parameter(), 1.0, problem.q)
        return outcome, outcome.factor and partial(again, problem, outcome.factor)

    def solve_all(self, problem, mus, options, rcond) -> None:
        """Dampings are solved for one after another; the kernels keep the matrix."""

    def operations(self, s: Sizes) -> float:
        """See Solver."""
        M, P, dampings = s.M, s.P, s.dampings
        if self.name == "dual":
            gram = s.outputs * s.sweep + (M * M * P if s.explicit else s.build)
            factor = CHOLESKY * M**3 / 3 + s.sweep
            # The core keeps its matrix for further dampings, unless a penalty weighs it by each.
            return gram + dampings * factor if not s.explicit and not s.penalized else dampings * (gram + factor)
        if s.local and s.kernels.sums_outputs:
            normal = s.outputs * s.sweep + s.layout.num_rows * P * P
        else:
            normal = s.jacobian + M * P * P
        factor = CHOLESKY * P**3 / 3
        return normal + dampings * factor if s.kernels.fused else dampings * (normal + factor)

    def bytes(self, s: Sizes) -> float:
        """See Solver."""
        M, P, width = s.M, s.P, s.width
        if self.name == "dual" and s.local and not s.scaled:
            packed = width * (M * s.layout.explicit_columns + s.layout.packed)   # a pass takes all, or a part
            matrix = s.factored(M) + max(min(packed, max(PASS_BYTES, width * M * M / PASS_PART)), width * s.layout.largest)
        elif self.name == "dual":
            matrix = s.jacobian_bytes + (width * M * P if s.scaled else 0) + s.dense(M)
        elif s.local and s.kernels.sums_outputs:
            matrix = s.factored(P) + width * s.layout.packed
        else:
            matrix = min(s.jacobian_bytes, s.block_bytes) + (s.factored(P) if s.kernels.fused else s.dense(P))
        return s.steps + matrix + s.sweeps + s.vectors


class System(NamedTuple):
    """(matrix + diag(added)) y = rhs; delta = back(y), g . delta = gain(y, delta)."""

    dual: bool
    matrix: torch.Tensor
    added: torch.Tensor | float
    rhs: torch.Tensor
    back: Callable
    gain: Callable


def system(name: str, problem: Problem) -> System:
    """The dual or primal matrix and right-hand side in PyTorch."""
    lin, r, q = problem.linearization, problem.r, problem.q
    rows, kernels = lin.row_layout(), lin.kernels()
    keeps = kernels.fused and not kernels.has_direct   # the matrix, for further dampings
    if name == "primal":
        g = problem.gradient()
        H = kernels.normal() if keeps or kernels.block_bytes is not None else _normal(lin.dense())
        return System(False, H, problem.diagonal(), g, lambda y: y, lambda y, step: _dot(g, step))
    if problem.uniform:
        K = kernels.gram() if keeps and rows is not None else lin.gram()
        return System(True, K, problem.mu, r, lin.vjp, lambda y, step: _dot(r, r.double() - problem.mu * y.double()))
    if keeps and rows is not None and problem.scale is None and not isinstance(problem.mu, torch.Tensor):
        by_parameter, push = problem.weights_by_parameter().tolist(), lin.jvp
        K, sizes = kernels.gram(by_parameter), [p.numel() for p in lin.params]
        weights = torch.cat([r.new_full((n,), w) for n, w in zip(sizes, by_parameter, strict=True)])
    else:
        weights, J = 1 / problem.diagonal(), lin.dense()
        scaled, push = J * weights.sqrt(), J.mv
        K = scaled @ scaled.T
    if q is None:
        return System(
            True, K, 1.0, r, lambda y: weights * lin.vjp(y), lambda y, step: _dot(r, r.double() - y.double())
        )
    return System(
        True, K, 1.0, r - push(weights * q), lambda y: weights * (lin.vjp(y) + q),
        lambda y, step: _dot(r, r.double() - y.double()) + _dot(q, step),
    )


class OnDevice(NamedTuple):
    """Delta, (P,), and of the solve 0-dim tensors: 0 where there is a factor; g . delta, ||delta||^2, the trace; the factor."""

    step: torch.Tensor
    info: torch.Tensor
    gain: torch.Tensor
    square: torch.Tensor
    trace: torch.Tensor
    factor: TensorFactor


@torch.no_grad()
def factored_on_device(s: System, up_to: int) -> OnDevice:
    """Factor and solve without a look at any number; in float64 up to an order."""
    matrix = s.matrix.to(torch.float64 if len(s.matrix) <= up_to else s.matrix.dtype, copy=True)
    matrix.diagonal().add_(s.added)
    lower, info = torch.linalg.cholesky_ex(matrix)
    y = TensorFactor(lower).solve(s.rhs)
    step = s.back(y)
    trace = (s.matrix.diagonal().double() / s.added).sum()
    factor = TensorFactor(lower, y if s.dual else None)
    return OnDevice(step, info, s.gain(y, step), step.double().square().sum(), trace, factor)


def solved(s: System) -> Outcome:
    """The outcome; its numbers reach the host in one transfer."""
    found = factored_on_device(s, WIDE_FACTOR)
    info, *numbers = torch.stack([found.info.double(), *found[2:5]]).tolist()
    if info != 0:
        return Outcome(torch.zeros_like(found.step), "not_positive_definite", trace=numbers[2])
    return Outcome(found.step, "solved", 0, 0.0, *numbers, 0.0, found.factor)


def again(problem: Problem, factor, u: torch.Tensor) -> torch.Tensor:
    """U -> (diag(d) + J^T J)^-1 J^T u, by the factor of a solve."""
    lin, u = problem.linearization, u.to(problem.r.dtype)
    if not factor.is_dual:
        return factor.solve(lin.vjp(u))
    step = lin.vjp(factor.solve(u))
    return step if problem.uniform else step / problem.diagonal()


def _normal(J: torch.Tensor) -> torch.Tensor:
    return J.T @ J


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.dot(a.double(), b.double())


# --- refinement -------------------------------------------------------------------------------------------------------------


def refined(name: str, problem: Problem, outcome: Outcome) -> Outcome | None:
    """The same solve, refined in float64: residuals by float64 products, corrections by the float32 factor.

    outcome: its float32 result. None where the products are not the kernels' own, or the corrections shrink too slowly: the
    matrix is too ill-conditioned for its float32 factor. Cost: two products and one solve with the factor per round, two rounds
    as a rule.
    Source: Wilkinson (1963); Higham, Accuracy and Stability of Numerical Algorithms (2002), chapter 12.
    """
    lin = problem.linearization
    if not lin.kernels().fused or (name == "dual" and (lin.row_layout() is None or problem.scale is not None)):
        return None
    wide = problem.widened()
    product = wide.linearization.kernels()
    step, gain = (_refined_dual if name == "dual" else _refined_primal)(wide, product, lin.kernels(), outcome)
    return step if step is None else Outcome(
        step, "solved", 0, 0.0, float(gain), float(step.square().sum()), outcome.trace, 0.0, outcome.factor
    )


def _refined_dual(wide: Problem, product, narrow, outcome: Outcome):
    r, q, weights, shift = wide.r, wide.q, None, wide.mu
    if not wide.uniform:
        weights, shift = 1 / wide.diagonal(), 1.0

    def parameters(v):
        return v if weights is None else weights * v

    step, rhs = None, r if q is None else r - product.jvp(parameters(q))

    def residual(y):
        nonlocal step
        step = parameters(product.vjp(y))
        return rhs - product.jvp(step) - shift * y

    y, last = _corrected(outcome.factor, narrow.dtype, outcome.factor.dual_vector.double(), residual)
    if y is None:
        return None, None
    step = step + parameters(narrow.vjp(last).double())
    gain = torch.dot(r, r - shift * y)
    if q is not None:
        step = step + parameters(q)
        gain = gain + torch.dot(q, step)
    return step, gain


def _refined_primal(wide: Problem, product, narrow, outcome: Outcome):
    g, d = wide.gradient(), wide.diagonal()
    step, _ = _corrected(
        outcome.factor, narrow.dtype, outcome.step.double(), lambda x: g - d * x - product.vjp(product.jvp(x))
    )
    return step, None if step is None else torch.dot(g, step)


def _corrected(factor, dtype, x: torch.Tensor, residual):
    """(x, last correction) after rounds of x += F^-1 residual(x), F the factor; (None, None) if that is not worthwhile.

    The error after a round is about the last correction times the rate at which corrections shrink.
    """
    before, least = float(torch.linalg.vector_norm(x)), REFINE_FIRST
    for _ in range(REFINE_ROUNDS):
        correction = factor.solve(residual(x).to(dtype))
        size = float(torch.linalg.vector_norm(correction.double()))
        if not size <= least * before:
            break
        least = REFINE_RATE
        x = x + correction
        rate, before = size / before if before > 0 else 0.0, size
        if size * rate <= REFINED_ERROR * float(torch.linalg.vector_norm(x)):
            return x, correction
    return None, None
