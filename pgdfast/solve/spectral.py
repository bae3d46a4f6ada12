"""One eigendecomposition of J J^T or J^T J: the pseudo-inverse, and the step of every damping at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch

from ..kernels import native
from ..kernels.protocol import Outcome
from .problem import Found, OnDemand, Problem, affords_float64
from .sizes import EIGH, Sizes


class Eigh:
    """The solver "eigh"."""

    name, automatic = "eigh", 2

    def solve(self, problem, options, rcond, wide, keep, time) -> Found:
        """The step, by float64 products where the problem is small."""
        return eigh(problem.widened() if affords_float64(problem.linearization) else problem, [problem.mu], rcond)[0]

    def solve_all(self, problem, mus, options, rcond) -> Sequence[Found]:
        """One decomposition serves all dampings."""
        lin = problem.linearization
        return eigh(problem.widened() if affords_float64(lin) else problem, mus, rcond, lin.dtype)

    def operations(self, s: Sizes) -> float:
        """See Solver."""
        M, P, least = s.M, s.P, min(s.M, s.P)
        count = (s.outputs * s.sweep + s.build if M <= P else s.jacobian + M * P * P) + EIGH * least**3 / 3
        return count + (s.dampings - 1) * (s.sweep + 2 * least**2)

    def bytes(self, s: Sizes) -> float:
        """See Solver."""
        M, P, least = s.M, s.P, min(s.M, s.P)
        rows = 0 if M <= P and s.local and not s.scaled else M * P * (8 if s.small else s.width)
        return s.steps + 48 * least**2 + rows + s.sweeps + s.vectors


def eigh(problem: Problem, mus: list[float], rcond: float, dtype: torch.dtype | None = None) -> Sequence[Found]:
    """The step of each of the ascending mus by an eigendecomposition of the smaller of J W J^T and W^1/2 J^T J W^1/2.

    mu > 0: the damped solution. mu = 0: the pseudo-inverse, without the eigenvalues below rcond times the largest; for a
    float32 model the cut is never below what rounding leaves of the matrix. With a scale D the pseudo-inverse is taken in the
    variables D^1/2 delta. Penalties join J as rows. Of `problem` all but its mu counts. dtype: of the steps, the problem's own
    unless given. Cost: the matrix, some 9 n^3 for its eigenvectors, and for each mu 2 n^2 and one VJP.
    """
    lin, scale, r, J = problem.linearization, problem.scale, problem.r, None
    if problem.penalty is None and scale is None and lin.num_residuals <= lin.num_parameters:
        K = lin.gram()
    else:
        J, r = _stacked(problem)
        if scale is not None:
            J = J * _inverse_root(scale, J)
        K = J @ J.T if len(J) <= J.shape[1] else J.T @ J
    K, dual = K.double(), J is None or len(J) <= J.shape[1]
    if not math.isfinite(float(K.sum())) and not bool(torch.isfinite(K).all()):
        none = r.new_zeros(lin.num_parameters, dtype=lin.dtype if dtype is None else dtype)
        return [Found(Outcome(none, "not_positive_definite", trace=math.nan), keep={}) for _ in mus]
    with native.lapack_threads(len(K)):
        values, vectors = torch.linalg.eigh(0.5 * (K + K.T))
    largest = float(values[-1]) if len(values) else 0.0
    cut = max(rcond, 16 * torch.finfo(lin.loss.dtype).eps) * largest
    left_out = int((values <= cut).sum()) if mus[0] == 0 else 0

    def parameters(coordinates):
        """Coordinates along the eigenvectors, (K, n), as steps (K, P)."""
        Y = (coordinates @ vectors.T).to(lin.dtype)
        steps = (_pulled(lin, Y) if J is None else Y @ J) if dual else Y
        return steps if scale is None else steps * _inverse_root(scale, steps)

    def along(u):
        return (u if dual else J.T @ u).double() @ vectors

    weights = (values.clamp_min(0) + torch.tensor(mus, dtype=values.dtype, device=values.device)[:, None]).reciprocal()
    if mus[0] == 0:
        weights[0] = torch.where(values > cut, 1 / values.clamp_min(1e-300), 0.0)
    given = along(r)
    coordinates = weights * given
    if dual and mus[0] == 0 and not lin.has_squares_only:
        # GGN residuals grow without bound at confident samples; J J^T r does not.
        coordinates[0] = weights[0].square() * ((K @ r.double()) @ vectors)
    steps = parameters(coordinates)
    if J is None and lin.has_squares_only:   # ||J^T V c||^2 and r . J J^T V c, where no residual is huge
        squares, gains = coordinates.square() @ values, coordinates @ (values * given)
    else:
        g, wide = problem.gradient().double(), steps.double()
        squares, gains = wide.square().sum(1), wide @ g
    steps = steps if dtype is None else steps.to(dtype)

    def again(k, u):
        u = u.to(r.dtype)
        rows = len(r) - len(u)   # those of the penalties
        return parameters((weights[k] * along(u if rows == 0 else torch.cat([u, u.new_zeros(rows)])))[None])[0]

    gains, squares = gains.tolist(), squares.tolist()

    def found(k):
        outcome = Outcome(steps[k], "solved", 0, 0.0, gains[k], squares[k])
        return Found(outcome, partial(again, k), False, {}, cut=0 if k else left_out)

    return OnDemand([None] * len(mus), found)


def _pulled(lin, Y: torch.Tensor) -> torch.Tensor:
    """The rows of Y through J^T, (K, P)."""
    kernels = lin.kernels()
    return kernels.vjp(Y) if kernels.batches else torch.stack([kernels.vjp(y) for y in Y])


def _inverse_root(scale: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return scale.to(like.dtype).rsqrt()


def _stacked(problem: Problem):
    """J and r with the penalty as further rows sqrt(c) I, sqrt(c) theta."""
    lin = problem.linearization
    J, r = lin.dense(), problem.r
    if problem.penalty is None:
        return J, r
    kept = problem.penalty > 0
    root = problem.penalty[kept].sqrt()
    rows = torch.diag_embed(problem.penalty.sqrt())[kept]
    return torch.cat([J, rows]), torch.cat([r, problem.q[kept] / root])
