"""Direct solves whose numbers stay on the device: nothing here waits for it, so that a CUDA graph can hold it all."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels.limits import DOUBLE_FACTOR, NARROW_CONDITION, WIDE_FACTOR
from .choice import BY_NAME, choose
from .cholesky import factored_on_device, system
from .options import CG
from .problem import Problem


class Direct(NamedTuple):
    """How steps are solved for: "dual" or "primal", why, and whether float32 problems are summed in float64."""

    method: str
    reason: str
    wide: bool


def direct(lin, mu: float, solver: str, cg: CG, wide: bool) -> Direct:
    """The way to solve problems like this one; waits for the device.

    wide: did earlier steps need float64 sums? Raises ValueError where neither matrix is to be factored.
    """
    method, reason = choose(Problem.of(lin, mu), solver, cg, wide)
    if method not in ("dual", "primal"):
        raise ValueError(
            f"pgdfast.CapturedStep: {method} would solve for the steps of M = {lin.num_residuals} residuals and "
            f"P = {lin.num_parameters} parameters ({reason}), and its iterations ask the host; take ordinary steps, or set "
            "solver='dual' or 'primal' if that fits into memory."
        )
    order = BY_NAME[method].order(lin)
    narrow = lin.dtype == torch.float32 and order <= WIDE_FACTOR
    if narrow and not wide and order > DOUBLE_FACTOR:
        trace = solve_direct(lin, torch.tensor(mu, dtype=torch.float64, device=lin.device), method, False).trace
        wide = float(trace) > NARROW_CONDITION
    return Direct(method, reason, narrow and (wide or order <= DOUBLE_FACTOR))


class Step(NamedTuple):
    """Delta, (P,), and 0-dim tensors: is it usable; g . delta; delta . mu delta; the trace of J D^-1 J^T."""

    step: torch.Tensor
    usable: torch.Tensor
    gain: torch.Tensor
    damped: torch.Tensor
    trace: torch.Tensor


def solve_direct(lin, mu: torch.Tensor, method: str, wide: bool) -> Step:
    """Delta of (mu I + J^T J + C) delta = J^T r + C theta, penalties c/2 ||theta||^2 being C. mu: 0-dim, float64, positive.

    A matrix that has no factor, or a step that is not finite, gives zeros that are not usable. Cost: as "dual" and "primal".
    """
    found = factored_on_device(system(method, Problem.of(lin.widened() if wide else lin, mu)), DOUBLE_FACTOR)
    usable = (found.info == 0) & torch.isfinite(found.gain) & torch.isfinite(found.square)
    return Step(
        torch.where(usable, found.step, 0.0).to(lin.dtype), usable, torch.where(usable, found.gain, 0.0),
        torch.where(usable, mu * found.square, 0.0), found.trace,
    )
