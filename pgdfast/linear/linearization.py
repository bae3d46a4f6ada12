"""A closure linearised at the current parameters."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import kernels
from ..tape import Tracer
from .double_backward import double_backward
from .rows import row_layout

_announced: set[str] = set()


class Plan:
    """Kernels of one program with its row structure, shared by all linearisations of that structure."""

    __slots__ = (
        "_backend", "_base", "_device", "_mixing", "_rows", "_rows_for", "_wide", "kernels", "member", "owner", "program",
    )

    def __init__(self, program, device, backend, dtype=None, base=None):
        self.program, self._device, self._backend, self._base = program, device, backend, base
        self.kernels = kernels.kernels_for(program, device, backend, dtype)
        self.owner = self.member = self._wide = None   # member: of an ensemble, the one selected
        self._mixing = program.positions_that_mix()
        self._rows = self._rows_for = None

    def rows(self, constants):
        """The row layout, found when first asked for; False if the residuals do not separate.

        Where a gather reads the workspace it depends on the positions, and is found anew when those change.
        """
        if self._rows is not None and not self._mixing:
            return self._rows
        asked = [constants[k] for k in self._mixing]
        if self._rows is None or any(not torch.equal(a, b) for a, b in zip(asked, self._rows_for, strict=True)):
            self._rows = self._base.rows(constants) if self._base else row_layout(self.program, constants) or False
            self._rows_for = [a.clone() for a in asked]
            self.kernels.set_rows(self._rows or None)
        return self._rows

    def release(self) -> None:
        """Let go of the constants of the last linearisation; one that is used again binds them anew."""
        if self.owner is not None:
            self.owner = None
            self.kernels.release()
        if self._wide is not None:
            self._wide.release()

    @property
    def wide(self) -> Plan:
        """The same program in float64, over constants of the program's own dtype."""
        if self._wide is None:
            self._wide = Plan(self.program, self._device, self._backend, torch.float64, self)
        return self._wide


class Linearizer:
    """Linearises closures over fixed parameters, reusing the plan of every structure it has met."""

    def __init__(self, params, backend: str = "auto"):
        self.params = list(params)
        self.backend = backend
        self._tracer = Tracer(self.params)
        self._plans: dict[int, tuple] = {}

    def __call__(self, closure) -> Linearization:
        """Run the closure once and read its tape."""
        if torch.is_grad_enabled():
            return self.read(closure())
        with torch.enable_grad():
            result = closure()
        return self.read(result)

    def read(self, result, waits: bool = True) -> Linearization:
        """The linearisation of a closure's result; without `waits` by no look at what is on the device, the loss included."""
        self._check_device(result)
        trace = self._tracer.trace(result, waits)
        if waits and not math.isfinite(trace.value) and trace.residual.numel():
            raise ValueError(
                f"pgdfast.LM: the loss before the step is {trace.value}; nothing was changed. Check the data and the "
                "parameters for NaN or infinity."
            )
        if trace.program is None:
            self._announce(trace.missing)
            operator = double_backward(trace, self.params, self._tracer.dtype, result)
            return Linearization(trace, self.params, operator, None, self._values_of(result))
        plan = self._plan_of(trace)
        return Linearization(trace, self.params, plan.kernels, plan, self._values_of(result))

    def _plan_of(self, trace) -> Plan:
        """The plan of a trace's program, ready for other constants."""
        program, plan = self._plans.get(id(trace.program), (None, None))
        if program is not trace.program:
            if len(self._plans) >= 32:
                self._plans.clear()
            plan = self._new_plan(trace)
            self._plans[id(trace.program)] = trace.program, plan
        plan.release()
        return plan

    def _new_plan(self, trace) -> Plan:
        return Plan(trace.program, trace.residual.device, self.backend)

    def _values_of(self, result):
        """A function that reads loss and residual, without derivatives, off a later result of the same closure."""
        if isinstance(result, torch.Tensor) and result.dim() == 0:
            def read(result):
                trace = self._tracer.trace(result)
                return trace.value, trace.residual

            return Values(read, needs_tape=True)
        return Values(_values_of_residuals, needs_tape=False)

    def _check_device(self, result) -> None:
        device = self.params[0].device
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, torch.Tensor) and part.device != device:
                raise ValueError(
                    f"pgdfast.LM: the parameters are on {device} and the closure's result on {part.device}; move data and "
                    "model to one device."
                )

    def _announce(self, operation: str) -> None:
        if operation not in _announced:
            _announced.add(operation)
            warnings.warn(
                f"pgdfast: no tape rule for {operation}; this closure takes the slower double-backward form.",
                stacklevel=_depth_of_caller(),
            )


@dataclass(frozen=True, slots=True)
class Values:
    """How to read (loss, residual) off what a closure returned at other parameters; a scalar loss needs its tape for that."""

    read: Callable
    needs_tape: bool


def _values_of_residuals(result):
    parts = result if isinstance(result, (tuple, list)) else [result]
    residual = torch.cat([part.detach().reshape(-1) for part in parts])
    return 0.5 * float(residual.double().square().sum()), residual


class Linearization:
    """The least-squares problem of a closure at the current parameters.

    Near them the loss is 1/2 ||residual - J delta||^2 up to a constant, plus c/2 ||theta - delta||^2 for quadratic
    penalties found in the loss. `delta` is subtracted from the parameters.

    Attributes: loss (0-dim tensor); residual (M,), scaled so that J^T residual (+ penalty) is the loss's gradient;
    num_residuals M; num_parameters P; penalty (P,) diagonal c or None. Vectors are flat, in the order of `params`.
    Products raise RuntimeError once the parameters have changed.
    """

    def __init__(self, trace, params, operator, plan, values=None, dtype=None):
        self.loss = trace.loss
        self.residual = trace.residual if dtype is None else trace.residual.to(dtype)
        self.params = params
        self.num_residuals = trace.residual.numel()
        self.num_parameters = operator.num_parameters
        self.dtype = self.residual.dtype
        self.device = params[0].device
        self.penalties = trace.penalties
        self._operator, self._plan, self._constants = operator, plan, trace.constants
        self._trace, self._values, self._wide = trace, values, None
        self._versions: list[int] = []
        self.parameters_unchanged()

    @property
    def has_squares_only(self) -> bool:
        """True without cross-entropies."""
        return self._trace.squares_only

    @property
    def tapeless(self) -> bool:
        """True where the closure computes the same without gradients, bit for bit."""
        return self._trace.tapeless

    @property
    def tape_bytes(self) -> int:
        """About what the closure's activations take; 0 where it is not known."""
        return 0 if self._plan is None else self._operator.arena_size * self.dtype.itemsize

    def release(self) -> None:
        """Let go of the tape."""
        if self._plan is not None:
            self._plan.release()

    @property
    def needs_host(self) -> str:
        """Why linearising this closure looks at what tensors hold, at every step; "" where it does not."""
        if self._plan is None:
            return f"there is no tape rule for {self._trace.missing}"
        if self._plan.program.positions_that_mix():
            return "the closure picks rows of what the model computed, and which rows decides how residuals separate"
        return ""

    @property
    def residuals_need_tape(self) -> bool:
        """True where `residual_at` reads a scalar loss, whose residual stands on its tape."""
        return self._values.needs_tape

    def residual_at(self, run) -> tuple[float, torch.Tensor]:
        """(loss, residual (M,)) at the parameters' present values; what the quadratic penalties add is in the loss alone.

        run: calls the closure, with its tape where `residuals_need_tape`. Raises ValueError where M is another.
        """
        loss, residual = self._values.read(run())
        if residual.numel() != self.num_residuals:
            raise ValueError(
                f"pgdfast.LM: the closure returned {self.num_residuals} residuals before the step and {residual.numel()} at a "
                "trial point; with acceleration their number must not change within a step."
            )
        return loss, residual.to(self.dtype)

    def widened(self) -> Linearization:
        """The same linearisation with products in float64, or itself where that is not to be had.

        The coefficients keep the precision in which the closure computed them; sums and solves gain.
        """
        if self.dtype == torch.float64 or self._plan is None:
            return self
        if self._wide is None:   # one, so that what its plan holds serves further dampings
            plan = self._plan.wide
            self._wide = Linearization(self._trace, self.params, plan.kernels, plan, self._values, torch.float64)
            self._wide._versions = self._versions
        return self._wide

    def parameters_unchanged(self) -> None:
        """Declare the parameters to be, bit for bit, those of the linearisation (after undoing a trial step)."""
        if self._plan is None and self._versions:   # the tape goes on being read by autograd, which has versions of its own
            wind_back(self.params, self._versions)
        self._versions[:] = [p._version for p in self.params]   # in place: the widened one shares the list

    @property
    def operator(self):
        """The kernels, bound to this linearisation's constants."""
        if [p._version for p in self.params] != self._versions:
            raise RuntimeError(
                "pgdfast: the parameters have changed since this linearisation was made; linearise again."
            )
        if self._plan is not None and self._plan.owner is not self:
            self._operator.bind(self._constants)
            self._plan.owner = self
        return self._operator

    @property
    def rows(self):
        """The row layout of the residuals, or None."""
        return self._plan.rows(self._constants) or None if self._plan is not None else None

    @property
    def penalty(self) -> torch.Tensor | None:
        """Diagonal of the quadratic penalty, (P,), or None."""
        if not self.penalties:
            return None
        return torch.cat([
            torch.full((p.numel(),), self.penalties.get(k, 0.0), dtype=self.dtype, device=self.device)
            for k, p in enumerate(self.params)
        ])

    @property
    def penalty_gradient(self) -> torch.Tensor | None:
        """C theta, (P,), or None."""
        penalty = self.penalty
        if penalty is None:
            return None
        return penalty * torch.cat([p.detach().reshape(-1).to(self.dtype) for p in self.params])

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """J v: (P,) -> (M,). One forward sweep."""
        return self.operator.jvp(_vector(v, self.num_parameters, self.dtype, "v", "P"))

    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        """J^T u: (M,) -> (P,). One backward sweep."""
        return self.operator.vjp(_vector(u, self.num_residuals, self.dtype, "u", "M"))

    def ggn(self, v: torch.Tensor) -> torch.Tensor:
        """(J^T J + penalty) v: (P,) -> (P,)."""
        product = self.vjp(self.jvp(v))
        return product if self.penalty is None else product + self.penalty * v.to(self.dtype)

    def gradient(self) -> torch.Tensor:
        """Gradient of the loss, (P,)."""
        gradient = self.vjp(self.residual)
        return gradient if self.penalty is None else gradient + self.penalty_gradient

    def dense(self) -> torch.Tensor:
        """J, (M, P). As many backward sweeps as a row has outputs, or M where rows do not separate."""
        operator, _ = self.operator, self.rows
        return operator.dense()

    def gram(self) -> torch.Tensor:
        """J J^T, (M, M), without J where rows separate."""
        operator = self.operator
        if operator.fused and self.rows is not None:
            return operator.gram()
        J = self.dense()
        return J @ J.T

    def diagonal(self) -> torch.Tensor:
        """diag(J^T J + penalty), (P,)."""
        operator, _ = self.operator, self.rows
        d = operator.diagonal() if operator.fused else self.dense().square().sum(0)
        return d if self.penalty is None else d + self.penalty


def wind_back(params: list[torch.Tensor], versions: list[int]) -> None:
    """Give parameters whose values have returned, bit for bit, the versions back that a tape saw."""
    torch._C._autograd._unsafe_set_version_counter(tuple(params), tuple(versions))


def _depth_of_caller() -> int:
    """The stacklevel, for a warning in the calling function, of the first frame outside pgdfast and torch."""
    own = (os.path.dirname(os.path.dirname(__file__)), os.path.dirname(torch.__file__))
    frame, depth = sys._getframe(1), 1
    while frame is not None and frame.f_code.co_filename.startswith(own):
        frame, depth = frame.f_back, depth + 1
    return depth


def _vector(x: torch.Tensor, size: int, dtype, name: str, letter: str) -> torch.Tensor:
    if x.shape != (size,):
        raise ValueError(f"pgdfast: {name} has shape {tuple(x.shape)}; it must be flat with {letter} = {size} entries.")
    return x.detach().to(dtype).resolve_neg().contiguous()


def linearize(closure, params, *, backend: str = "auto") -> Linearization:
    """Linearise a closure at the current parameters.

    closure: callable that returns a loss or residuals, as for LM.step. params: tensors with requires_grad, whose
    concatenation is the flat parameter vector. backend: as for LM. Cost: one run of the closure.
    Raises ValueError for results that cannot be linearised and for a non-finite loss.
    """
    params = [p for p in params if p.requires_grad]
    if not params:
        raise ValueError("pgdfast.linearize: no parameter requires a gradient.")
    name = kernels.requested(backend)
    if name == "reference":
        raise ValueError("pgdfast.linearize: for the reference call pgdfast.reference.linearize(closure, params).")
    return Linearizer(params, name)(closure)
