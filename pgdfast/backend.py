"""The two ways to a step: the fast path, and the reference that it is checked against."""

from __future__ import annotations

from dataclasses import replace
from operator import is_

import torch

from . import kernels, reference
from .linear import Linearizer
from .solve import CG, Solution, Solutions, solve


class Fast:
    """Tape, plans and kernels."""

    def __init__(self, backend: str):
        self.name = backend
        self._linearizer = None

    def __reduce__(self):
        """Copies start without plans, which belong to the original's parameters."""
        return Fast, (self.name,)

    def linearize(self, closure, params: list[torch.Tensor]):
        """Linearise, keeping plans while the parameters stay the same tensors."""
        current = self._linearizer
        if current is None or len(current.params) != len(params) or not all(map(is_, current.params, params)):
            self._linearizer = current = Linearizer(params, self.name)
        return current(closure)

    def solve(self, linearization, damping, **options) -> Solution | Solutions:
        """A solve for one damping or many, with the options of pgdfast.solve."""
        return solve(linearization, damping, **options)


class Reference:
    """Explicit float64 Jacobians and dense solves in plain PyTorch (pgdfast.reference)."""

    def linearize(self, closure, params: list[torch.Tensor]):
        """An explicit Jacobian."""
        return _ReferenceLinearization(reference.linearize(closure, params), params)

    def solve(self, linearization, damping, *, scale, solver, cg: CG, rcond, prior=None, **_) -> Solution | Solutions:
        """The reference's solution in the fast path's terms; always float64, and nothing kept between steps."""
        if not isinstance(damping, (int, float)):
            options = dict(scale=scale, solver=solver, cg=cg, rcond=rcond, prior=prior)
            return Solutions(tuple(damping), tuple([self.solve(linearization, mu, **options) for mu in damping]))
        lin = linearization.reference
        options = dict(
            scale=None if scale is None else scale.double(), solver=solver, cg_max_iterations=cg.max_iterations,
            cg_tolerance=cg.tolerance, rcond=rcond,
        )
        found = reference.solve(lin, damping, prior=prior, **options)

        def again(u):
            return reference.solve(replace(lin, residual=u.double()), damping, **options).step

        gain = float(torch.dot(lin.vjp(lin.residual), found.step))
        curvature = float(lin.jvp(found.step).square().sum())
        damped = float((damping * found.step.square() if scale is None else damping * scale * found.step.square()).sum())
        return Solution(
            found.step, found.status, found.iterations, found.solver, "reference", gain, damped,
            linearization, damping if scale is None else damping * scale, found.residual_norm,
            slack=gain - damped - curvature, prior=prior, same_factor=again,
        )


class _ReferenceLinearization:
    """A reference linearisation with the few names that LM asks for; penalties are rows of its Jacobian."""

    penalties: dict = {}
    tapeless = False   # trials run as the closure is
    residuals_need_tape = True
    sync_reason = "the reference looks at every number"
    dtype = torch.float64

    def __init__(self, found, params: list[torch.Tensor]):
        self.reference, self._params = found, params
        self.loss = found.loss.detach().to(params[0].dtype)
        self.num_residuals, self.num_parameters = found.num_residuals, found.num_parameters

    def parameters_unchanged(self) -> None:
        """An explicit Jacobian does not depend on the parameters' memory."""

    @property
    def residual(self) -> torch.Tensor:
        """(M,), float64."""
        return self.reference.residual

    @property
    def has_squares_only(self) -> bool:
        """True without cross-entropies."""
        return self.reference.squares_only

    def residual_at(self, run) -> tuple[float, torch.Tensor]:
        """(loss, residual (M,), float64) at the parameters' present values."""
        loss, residual = reference.residual(run, self._params)
        return float(loss), residual

    def release(self) -> None:
        """An explicit Jacobian holds no tape."""

    def widened(self) -> _ReferenceLinearization:
        """Itself: float64 throughout."""
        return self

    def dense(self) -> torch.Tensor:
        """J, (M, P), float64."""
        return self.reference.dense()

    def gram(self) -> torch.Tensor:
        """J J^T, (M, M), float64."""
        return self.reference.gram()

    def gradient(self) -> torch.Tensor:
        """J^T r, (P,)."""
        return self.reference.vjp(self.reference.residual)

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """J v, (M,)."""
        return self.reference.jvp(v)

    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        """J^T u, (P,)."""
        return self.reference.vjp(u)

    def ggn(self, v: torch.Tensor) -> torch.Tensor:
        """J^T J v, (P,)."""
        return self.reference.ggn(v.double())

    def diagonal(self) -> torch.Tensor:
        """diag(J^T J), (P,)."""
        return self.reference.diagonal()


def backend(name: str):
    """The backend of a name, after PGDFAST_BACKEND.

    Raises ValueError or RuntimeError as pgdfast.kernels.requested does.
    """
    name = kernels.requested(name)
    return Reference() if name == "reference" else Fast(name)
