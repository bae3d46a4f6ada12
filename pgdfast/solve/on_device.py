"""Direct solves whose numbers stay on the device: nothing here waits for it, so that a CUDA graph can hold it all."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .choice import NARROW_CONDITION, choose
from .options import CG
from .problem import DOUBLE_FACTOR, WIDE_FACTOR, Problem


class Direct(NamedTuple):
    """How steps are solved for: "dual" or "primal", why, and whether float32 problems are summed in float64."""

    method: str
    reason: str
    wide: bool


class Step(NamedTuple):
    """Delta, (P,), and 0-dim tensors: is it usable; g . delta; delta . mu delta; the trace of J D^-1 J^T."""

    step: torch.Tensor
    usable: torch.Tensor
    gain: torch.Tensor
    damped: torch.Tensor
    trace: torch.Tensor


def direct(lin, mu: float, solver: str, cg: CG, wide: bool) -> Direct:
    """The way to solve problems like this one; waits for the device.

    wide: did earlier steps need float64 sums? Raises ValueError where neither matrix is to be factored.
    """
    method, reason = choose(Problem.of(lin, mu, None), solver, cg, wide)
    M, P = lin.num_residuals, lin.num_parameters
    if method not in ("dual", "primal"):
        raise ValueError(
            f"pgdfast.CapturedStep: {method} would solve for the steps of M = {M} residuals and P = {P} parameters ({reason}), "
            "and its iterations ask the host; take ordinary steps, or set solver='dual' or 'primal' if that fits into memory."
        )
    order = M if method == "dual" else P
    narrow = lin.dtype == torch.float32 and order <= WIDE_FACTOR
    if narrow and not wide and order > DOUBLE_FACTOR:
        wide = float(solve_direct(lin, torch.tensor(mu, dtype=torch.float64, device=lin.device), method, False).trace) > (
            NARROW_CONDITION
        )
    return Direct(method, reason, narrow and (wide or order <= DOUBLE_FACTOR))


def solve_direct(lin, mu: torch.Tensor, method: str, wide: bool) -> Step:
    """Delta of (mu I + J^T J + C) delta = J^T r + C theta, penalties c/2 ||theta||^2 being C. mu: 0-dim, float64, positive.

    A matrix that has no factor, or a step that is not finite, gives zeros that are not usable. Cost: as `dual` and `primal` of
    dense.py.
    """
    full = lin.widened() if wide else lin
    found = (_dual if method == "dual" else _primal)(full, mu)
    step, info, gain, trace = found
    square = step.double().square().sum()
    usable = (info == 0) & torch.isfinite(gain) & torch.isfinite(square)
    step = torch.where(usable, step, 0.0).to(lin.dtype)
    return Step(step, usable, torch.where(usable, gain, 0.0), torch.where(usable, mu * square, 0.0), trace)


def _dual(lin, mu):
    r, penalty = lin.residual, lin.penalty
    if penalty is None:
        K = lin.gram()
        y, info = _solved(K, mu, r)
        return lin.vjp(y), info, _dot(r, r.double() - mu * y.double()), K.diagonal().double().sum() / mu
    J, q, weights = lin.dense(), lin.penalty_gradient, 1 / (mu + penalty)
    K = (J * weights) @ J.mT
    y, info = _solved(K, 1.0, r - J @ (weights * q))
    step = weights * (lin.vjp(y) + q)
    return step, info, _dot(r, r.double() - y.double()) + _dot(q, step), K.diagonal().double().sum()


def _primal(lin, mu):
    J, g, penalty = lin.dense(), lin.gradient(), lin.penalty
    H, d = J.mT @ J, mu if penalty is None else mu + penalty
    step, info = _solved(H, d, g)
    return step, info, _dot(g, step), (H.diagonal().double() / d).sum()


def _solved(matrix: torch.Tensor, diagonal, rhs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """((matrix + diag)^-1 rhs, the device's flag: 0 where there was a factor)."""
    matrix = matrix.to(torch.float64 if len(matrix) <= DOUBLE_FACTOR else matrix.dtype, copy=True)
    matrix.diagonal().add_(diagonal)
    factor, info = torch.linalg.cholesky_ex(matrix)
    return torch.cholesky_solve(rhs.to(factor.dtype).unsqueeze(1), factor).squeeze(1).to(rhs.dtype), info


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.dot(a.double(), b.double())
