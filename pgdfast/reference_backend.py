"""The reference as a way to a step: explicit float64 Jacobians and dense solves, in the fast path's terms."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from . import reference
from .linear import half_square, losses_of, split_result
from .networks import OneNetwork
from .solve import CG, Solution, Solutions
from .step.evaluate import Substituted
from .step.rng_replay import MovedGenerators, RandomReplay


class Reference:
    """Explicit float64 Jacobians and dense solves in plain PyTorch (pgdfast.reference)."""

    name = "reference"

    def linearize(self, closure, params: list[torch.Tensor]):
        """An explicit Jacobian."""
        return _ReferenceLinearization(reference.linearize(closure, params), params)

    def networks(self, closure, parameters) -> OneNetwork | ReferenceNetworks:
        """The networks of a closure; of an ensemble by one Jacobian, over all parameters, per member."""
        if not parameters.stacked:
            return OneNetwork(self.linearize(closure, parameters.params), _reference_solve)
        return ReferenceNetworks(closure, parameters)


def _reference_solve(linearization, damping, *, scale, solver, cg: CG, rcond, prior=None, **_) -> Solution | Solutions:
    """The reference's solution in the fast path's terms; always float64, and nothing kept between steps."""
    if not isinstance(damping, (int, float)):
        options = dict(scale=scale, solver=solver, cg=cg, rcond=rcond, prior=prior)
        return Solutions(tuple(damping), tuple([_reference_solve(linearization, mu, **options) for mu in damping]))
    lin = linearization.reference
    options = dict(
        scale=None if scale is None else scale.double(), solver=solver, cg_max_iterations=cg.max_iterations,
        cg_tolerance=cg.tolerance, rcond=rcond,
    )
    found = reference.solve(lin, damping, prior=prior, **options)

    def solve_again(u):
        return reference.solve(replace(lin, residual=u.double()), damping, **options).step

    gain = float(torch.dot(lin.vjp(lin.residual), found.step))
    curvature = float(lin.jvp(found.step).square().sum())
    damped = float((damping * found.step.square() if scale is None else damping * scale * found.step.square()).sum())
    return Solution(
        found.step, found.status, found.iterations, found.solver, "reference", gain, damped,
        linearization, damping if scale is None else damping * scale, found.residual_norm,
        slack=gain - damped - curvature, prior=prior, same_factor=solve_again,
    )


class ReferenceNetworks:
    """An ensemble: every member's Jacobian by a run of the closure of its own."""

    separates = True

    def __init__(self, closure, parameters):
        self._params, self.count, self.num_parameters = parameters.params, parameters.count, sum(parameters.sizes)
        self._columns = self._columns_of_members(parameters.sizes)
        replay = RandomReplay(MovedGenerators(), closure, self._params[0].device)
        with torch.enable_grad():
            self.losses = losses_of(closure(), self.count)
        replay.linearized()
        try:
            self._members = [self._linearized(closure, replay, b, loss) for b, loss in enumerate(self.losses)]
        finally:
            replay.finish()
        first = self._params[0]
        self.loss = torch.tensor(self.losses, dtype=torch.float64, device=first.device).to(first.dtype.to_real())
        self.lin = self
        known = next((m for m in self._members if m is not None), None)
        self.num_residuals = 0 if known is None else known.num_residuals
        self.has_squares_only = known is None or known.has_squares_only

    penalties: dict = {}
    tapeless, tape_bytes, residuals_need_tape, scalar = False, 0, True, False

    def _columns_of_members(self, sizes: list[int]) -> list[torch.Tensor]:
        numbers = torch.arange(self.count * self.num_parameters).split([self.count * size for size in sizes])
        return list(torch.cat([part.view(self.count, -1) for part in numbers], 1).unbind())

    def _linearized(self, closure, replay, b: int, loss: float):
        """Member b's linearization; None where its loss is not finite."""
        if not math.isfinite(loss):
            return None
        replay.rewind()
        found = reference.linearize(lambda: _of_member(self._among_the_finite(closure, b), b, self.count), self._params)
        own = found.jacobian[:, self._columns[b]]
        if int(found.jacobian.count_nonzero()) != int(own.count_nonzero()):
            raise ValueError(
                f"pgdfast.LM: a residual of the closure depends on several of the {self.count} members; every loss or "
                "residual of an ensemble must depend on one member's parameters alone."
            )
        return _ReferenceLinearization(replace(found, jacobian=own), self._params)

    def _among_the_finite(self, closure, b: int):
        """What the closure returns with member b's parameters, as constants, in the place of those of members that are lost.

        Else a lost member's NaN, times a derivative of 0, would be in every row.
        """
        lost = torch.tensor([not math.isfinite(loss) for loss in self.losses], device=self._params[0].device)
        if not lost.any():
            return closure()
        points = [torch.where(lost.view(-1, *[1] * (p.dim() - 1)), p.detach()[b], p) for p in self._params]
        with Substituted(self._params, points):
            return closure()

    def member(self, b: int) -> _ReferenceLinearization:
        """Member b's linearization."""
        return self._members[b]

    def diagonal(self) -> torch.Tensor:
        """Every diag(J_b^T J_b), (B, P); zeros for members whose loss is not finite."""
        zero = torch.zeros(self.num_parameters, dtype=torch.float64, device=self._params[0].device)
        return torch.stack([zero if m is None else m.diagonal() for m in self._members])

    def solve(self, members: list, scale, options, time: int) -> None:
        """Give these step.host.Members their Solution; Solutions where the rule sweeps."""
        for m in members:
            b, rule = m.number, options.rule
            m.solution = _reference_solve(
                self._members[b], rule.dampings(m.state.mu) if rule.sweeps else m.state.mu,
                scale=None if scale is None else scale[b], solver=options.solver, cg=options.cg, rcond=options.rcond,
                prior=m.prior,
            )

    def losses_at(self, result) -> list[float]:
        """All members' losses, as numbers, of what the closure returned at a trial point."""
        return losses_of(result, self.count)

    def residuals_at(self, run) -> list[tuple]:
        """(loss, residual (M,), float64) of every member."""
        pairs = [reference.residual(lambda b=b: _of_member(run(), b, self.count), self._params) for b in range(self.count)]
        return [(float(loss), residual) for loss, residual in pairs]

    def before_trial(self) -> None:
        """Explicit Jacobians do not depend on constants either."""

    def doubt(self) -> None:
        """Explicit Jacobians are made by autograd."""

    def unchanged(self) -> None:
        """Explicit Jacobians do not depend on the parameters' memory."""

    def release(self) -> None:
        """Nothing is held of a tape."""


def _of_member(result, b: int, count: int):
    """What a closure of an ensemble returned, as a closure of member b alone would return it."""
    losses, residuals = split_result(result, count)
    if losses is not None:
        return result[b]
    return tuple(part[b : b + 1] for part in (residuals if isinstance(residuals, (tuple, list)) else [residuals]))


class _ReferenceLinearization:
    """A reference linearization with the few names that LM asks for; penalties are rows of its Jacobian."""

    penalties: dict = {}
    tapeless, tape_bytes = False, 0   # trials run as the closure is
    sync_reason = "the reference looks at every number"
    dtype = torch.float64
    residuals_need_tape = True

    def __init__(self, found, params: list[torch.Tensor]):
        self.reference, self._params = found, params
        loss = found.loss.detach() if found.scalar else half_square(found.residual)   # as at trial points, to the bit
        self.loss = loss.to(params[0].dtype.to_real())
        self.num_residuals, self.num_parameters = found.num_residuals, found.num_parameters

    def before_trial(self) -> None:
        """An explicit Jacobian does not depend on constants either."""

    def doubt(self) -> None:
        """An explicit Jacobian is made by autograd."""

    def parameters_unchanged(self) -> None:
        """An explicit Jacobian does not depend on the parameters' memory."""

    def release(self) -> None:
        """Nothing is held of a tape."""

    @property
    def residual(self) -> torch.Tensor:
        """(M,), float64."""
        return self.reference.residual

    @property
    def scalar(self) -> bool:
        """Whether the closure returned the loss itself, in one number."""
        return self.reference.scalar

    @property
    def has_squares_only(self) -> bool:
        """True for sums of squares with constant weights."""
        return self.reference.squares_only

    def residual_at(self, run) -> tuple[float, torch.Tensor]:
        """(loss, residual (M,), float64) at the parameters' present values."""
        loss, residual = reference.residual(run, self._params)
        return float(loss), residual

    def widened(self) -> _ReferenceLinearization:
        """Itself: float64 throughout."""
        return self

    def dense(self) -> torch.Tensor:
        """J, (M, P), float64."""
        return self.reference.dense()

    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        """J^T u, (P,)."""
        return self.reference.vjp(u)

    def gram(self) -> torch.Tensor:
        """J J^T, (M, M), float64."""
        return self.reference.gram()

    def gradient(self) -> torch.Tensor:
        """J^T r, (P,)."""
        return self.reference.vjp(self.reference.residual)

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """J v, (M,)."""
        return self.reference.jvp(v)

    def ggn(self, v: torch.Tensor) -> torch.Tensor:
        """J^T J v, (P,)."""
        return self.reference.ggn(v.double())

    def ggns(self, V: torch.Tensor) -> torch.Tensor:
        """J^T J v for each row of V, (K, P)."""
        return torch.stack([self.ggn(v) for v in V]) if len(V) else V.double()

    def diagonal(self) -> torch.Tensor:
        """diag(J^T J), (P,)."""
        return self.reference.diagonal()
