"""A closure linearized at the current parameters."""

from __future__ import annotations

import math
import warnings
from functools import partial
from operator import attrgetter

import torch

from ..kernels.scaled import row_scaled
from ..tape import Tracer, has_complex, real_size, real_views
from .adjoint import Flat
from .announce import depth_of_caller, no_rule
from .double_backward import Widened
from .fallback import Arbiter
from .live import CHANGED, Live
from .plan import UNKNOWN, Plan
from .rows import RowLayout
from .values import values_of

CHANGED_PARAMETERS = "pgdfast: the parameters have changed since this linearization was made; linearize again."
RELEASED = "pgdfast: this linearization was released at the end of its step, and its tape is gone; linearize again."
_announced: set[str] = set()
_version = attrgetter("_version")


class Linearizer:
    """Linearizes closures over fixed parameters, reusing the plan of every structure it has met.

    check: "first", "every" or "never": at which of a structure's tapes products are compared with autograd.
    Raises ValueError for parameters that are lazy conjugates.
    """

    def __init__(self, params, backend: str = "auto", check: str = "first"):
        self.params = list(params)
        self.backend = backend
        self._complex = has_complex(self.params)
        self.tracer = Tracer(self.params)
        self._arbiter = Arbiter(self.params, self.tracer, check)
        self._plans: dict[int, tuple] = {}
        self._searches: dict[tuple, int] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Of residuals and products."""
        return self.tracer.dtype

    @property
    def reals(self) -> list[torch.Tensor]:
        """The parameters' real numbers; made when asked for, since a parameter's memory may be another by then."""
        return real_views(self.params) if self._complex else self.params

    def __call__(self, closure) -> Linearization:
        """Run the closure once and read its tape."""
        if torch.is_grad_enabled():
            return self.read(closure())
        with torch.enable_grad():
            result = closure()
        return self.read(result)

    def read(self, result, allow_sync: bool = True) -> Linearization:
        """The linearization of a closure's result.

        allow_sync: may this wait for a device? If not, nothing there is looked at, the loss included. Raises ValueError for
        results that cannot be linearized and for a loss that is not finite.
        """
        single = isinstance(result, torch.Tensor) and result.numel() == 1
        if single and result.dim():
            result = self.tracer.as_loss(result, allow_sync)
        scalar = single and result.dim() == 0
        if not scalar or result.device != self.params[0].device:
            self._check_device(result)
        trace = self.tracer.trace(result, allow_sync)
        if allow_sync and not math.isfinite(trace.value) and trace.residual.numel():
            raise ValueError(
                f"pgdfast.LM: the loss before the step is {trace.value}; nothing was changed. Check the data and the "
                "parameters for NaN or infinity."
            )
        if trace.program is not None:
            plan = self._plan_of(trace)
            found = Linearization(trace, self.reals if self._complex else self.params, None, plan, self.tracer, scalar)
            if plan.agrees or not allow_sync:
                return found
            again = partial(Linearization, params=self.reals, operator=None, plan=plan, tracer=self.tracer, scalar=scalar)
            found = self._arbiter.judged(plan, found, again, trace, result)
            if found is not None:
                return found
            trace = self._arbiter.trace(result, allow_sync)
        else:
            self._announce(trace)
        operator = self._arbiter.operator(trace, result)
        return Linearization(trace, self.reals, operator, None, self.tracer, scalar)

    def _plan_of(self, trace) -> Plan:
        """The plan of a trace's program, ready for other constants."""
        program, plan = self._plans.get(id(trace.program), (None, None))
        if program is not trace.program:
            if len(self._plans) >= 32:
                self._plans.clear()
            plan = self._new_plan(trace)
            plan.searches = self._searches
            self._plans[id(trace.program)] = trace.program, plan
        if plan.bound is not None:
            plan.release()
        if plan.mixing:
            plan.choices.clear()   # the rows may be others now
        return plan

    def _new_plan(self, trace) -> Plan:
        return Plan(trace.program, trace.residual.device, self.backend)

    def _check_device(self, result) -> None:
        device = self.params[0].device
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, torch.Tensor) and part.device != device:
                raise ValueError(
                    f"pgdfast.LM: the parameters are on {device} and the closure's result on {part.device}; move data and "
                    "model to one device."
                )

    def _announce(self, trace) -> None:
        operation = trace.missing
        if operation not in _announced:
            _announced.add(operation)
            size = sum(map(real_size, self.params))
            warnings.warn(no_rule(operation, trace.residual.numel(), size), stacklevel=depth_of_caller())


class Bound:
    """What a closure's tape has left at one point, and the kernels that are bound to it when asked for."""

    _constants = None
    row_scale: torch.Tensor | None = None

    def __init__(self, trace, params, operator, plan, tracer, constants):
        self.params, self.penalties, self.dtype = params, trace.penalties, trace.residual.dtype
        self.device = params[0].device
        self.has_squares_only, self.tapeless = trace.squares_only, trace.tapeless
        self.choices = operator.learned.choices if plan is None else plan.choices
        self.tape_bytes = 0 if plan is None else plan.kernels.arena_size * self.dtype.itemsize
        self._operator, self._plan, self._tracer, self._missing, self._wide = operator, plan, tracer, trace.missing, None
        self._constants, self._home, self._copies = constants, plan, None   # _home: the plan of both precisions
        self._watched = params
        if plan is not None:
            if plan.live is None:
                plan.live = Live(constants, params)
            if plan.live.places:
                self._watched = [*params, *[constants[k] for k in plan.live.places]]
        self._versions = list(map(_version, self._watched))

    def __del__(self):
        if self._constants is not None and self._plan is not None:
            self._plan.release(self._constants, wide=False)

    def kernels(self, member: int | None = None):
        """The kernels, bound to this linearization's constants; member: of an ensemble that separates, whose.

        Raises RuntimeError where the parameters have changed or the linearization was released.
        """
        if list(map(_version, self._watched)) != self._versions:
            self._refresh()
        constants, plan = self._constants, self._plan
        if constants is None:
            raise RuntimeError(RELEASED)
        if plan is None:
            return self._operator
        if plan.bound is constants and plan.row_scale is self.row_scale and member is None:
            return plan.kernels
        return plan.bind(constants, member, self.row_scale)

    @property
    def constant_bytes(self) -> int:
        """What the tape's saved tensors take that products with J need."""
        if self._plan is None or self._constants is None:
            return 2 * self._operator.arena_size * self.dtype.itemsize if self._operator is not None else 0
        storages = {c.untyped_storage().data_ptr(): c.untyped_storage().nbytes() for c in self._constants if torch.is_tensor(c)}
        return sum(storages.values())

    @property
    def nodes(self) -> int:
        """Operations of the program that products with J run; 0 where autograd runs them."""
        return 0 if self._plan is None else len(self._plan.program.instructions)

    def doubt(self) -> None:
        """Compare the next tape of this structure with autograd, since products with J are not finite."""
        if self._plan is not None and self._plan.agrees:
            self._plan.agrees = None

    @property
    def sync_reason(self) -> str:
        """Why linearizing this closure looks at what tensors hold, at every step; "" where it does not."""
        if self._plan is None:
            return f"there is no tape rule for {self._missing}"
        if self._plan.mixing:
            return "the closure picks rows of what the model computed, and which rows decides how residuals separate"
        if self._plan.hides:
            return "an operation of the closure has no finite derivative where a later one does not take its result"
        return ""

    def widened(self):
        """The same linearization with products in float64, or itself where that is not to be had.

        The coefficients keep the precision in which the closure computed them; sums and solves gain.
        """
        if self.dtype == torch.float64:
            return self
        if self._wide is None:   # one, so that what its plan holds serves further dampings
            wide = object.__new__(type(self))   # a copy, which shares the list of versions
            wide.__dict__.update(self.__dict__)
            wide.residual, wide.dtype = self.residual.double(), torch.float64
            if self._plan is None:
                wide._operator = self._widened_operator()
            else:
                wide._plan = self._plan.wide
                wide.choices = wide._plan.choices
            wide._forget()
            self._wide = wide
        return self._wide

    def _widened_operator(self):
        return Widened(self._operator)   # an ensemble's is not asked

    def _forget(self) -> None:
        """Drop what was computed in another precision."""

    def before_trial(self) -> None:
        """Say that the closure is about to run again, and may write to its constants; see live.py."""
        plan = self._home
        if plan is not None and not plan.live.steady and self._copies is None:
            self._copies = plan.live.copies(self._constants)
            if self._wide is not None:
                self._wide._copies = self._copies

    def _refresh(self) -> None:
        """Let copies take the place of constants that have changed. Raises RuntimeError where there is none of them."""
        count, constants = len(self.params), self._constants
        if list(map(_version, self.params)) != self._versions[:count]:
            raise RuntimeError(CHANGED_PARAMETERS)
        if constants is None:
            return
        changed = self._changed()
        self._home.live.learn(changed)
        if any(k not in (self._copies or ()) for k in changed):
            raise RuntimeError(CHANGED)
        for place, k in enumerate(self._home.live.places, count):
            if k in changed:
                constants[k] = self._watched[place] = self._copies[k]
        self._versions[count:] = map(_version, self._watched[count:])
        self._home.release(constants)

    def _changed(self) -> list[int]:
        """Numbers of the constants that were written to since."""
        count = len(self.params)
        pairs = zip(self._home.live.places, self._watched[count:], self._versions[count:], strict=True)
        return [k for k, c, version in pairs if c._version != version]

    def parameters_unchanged(self) -> None:
        """Declare the parameters to be, bit for bit, those of the linearization (after undoing a trial step)."""
        if self._plan is None:   # autograd goes on reading the tape, and has versions of its own
            torch._C._autograd._unsafe_set_version_counter(tuple(self.params), tuple(self._versions))
        self._versions[: len(self.params)] = map(_version, self.params)   # in place: the widened one shares the list

    def release(self) -> None:
        """Let go of the tape. Products raise RuntimeError from then on; what was computed before stays."""
        constants, wide = self._constants, self._wide
        if self._copies is not None and constants is not None and self._home.live.steady is None:
            self._home.live.learn(self._changed())
        self._constants = self._operator = self._copies = None
        self._watched = self.params
        del self._versions[len(self.params) :]
        if wide is not None:
            wide._constants = wide._operator = wide._copies = None
            wide._watched = wide.params
        if self._plan is not None:
            self._plan.release(constants)


class Products:
    """Products, Gram and dense forms of a linearization by kernels; see protocol.py for their meaning and cost.

    A subclass has params, residual, dtype, device, num_residuals, num_parameters, penalties, kernels() and row_layout().
    """

    _penalty: torch.Tensor | None = None

    @property
    def penalty(self) -> torch.Tensor | None:
        """Diagonal of the quadratic penalty, (P,), or None."""
        if self.penalties and self._penalty is None:
            self._penalty = torch.cat([
                torch.full((p.numel(),), self.penalties.get(k, 0.0), dtype=self.dtype, device=self.device)
                for k, p in enumerate(self.params)
            ])
        return self._penalty

    @property
    def penalty_gradient(self) -> torch.Tensor | None:
        """C theta, (P,), or None."""
        if not self.penalties:
            return None
        return self.penalty * torch.cat([p.detach().reshape(-1).to(self.dtype) for p in self.params])

    def agreed(self, number: float) -> float:
        """The least of what all processes have that share the rows: of one, the number."""
        return number

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """J v: (P,) -> (M,). One forward sweep."""
        return self.kernels().jvp(_vector(v, self.num_parameters, self.dtype, "v", "P"))

    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        """J^T u: (M,) -> (P,). One backward sweep."""
        return self.kernels().vjp(_vector(u, self.num_residuals, self.dtype, "u", "M"))

    def ggn(self, v: torch.Tensor) -> torch.Tensor:
        """(J^T J + penalty) v: (P,) -> (P,)."""
        product = self.vjp(self.jvp(v))
        return product if self.penalty is None else product + self.penalty * v.to(self.dtype)

    def ggns(self, V: torch.Tensor) -> torch.Tensor:
        """(J^T J + penalty) v for each row of V, (K, P)."""
        return torch.stack([self.ggn(v) for v in V])

    def gradient(self) -> torch.Tensor:
        """Gradient of the loss, (P,)."""
        gradient = self.vjp(self.residual)
        return gradient if self.penalty is None else gradient + self.penalty_gradient

    def _formed(self):
        """The kernels, which may depend on the rows, and those."""
        self.kernels()   # raises where there is nothing left to ask
        rows = self.row_layout()
        return self.kernels(), rows

    def dense(self) -> torch.Tensor:
        """J, (M, P). As many backward sweeps as a row has outputs, or M where rows do not separate."""
        return self._formed()[0].dense()

    def gram(self) -> torch.Tensor:
        """J J^T, (M, M), without J where rows separate."""
        kernels, rows = self._formed()
        if kernels.fused and rows is not None:
            return kernels.gram() if kernels.has_direct else kernels.gram().clone()   # those keep theirs
        J = self.dense()
        return J @ J.T

    def diagonal(self) -> torch.Tensor:
        """diag(J^T J + penalty), (P,)."""
        kernels, _ = self._formed()
        d = kernels.diagonal() if kernels.fused or kernels.block_bytes is not None else self.dense().square().sum(0)
        return d if self.penalty is None else d + self.penalty


class Linearization(Bound, Products):
    """The least-squares problem of a closure at the current parameters.

    Near them the loss is 1/2 ||residual - J delta||^2 up to a constant, plus c/2 ||theta - delta||^2 for quadratic
    penalties found in the loss. `delta` is subtracted from the parameters.

    Attributes: loss (0-dim tensor); residual (M,), scaled so that J^T residual (+ penalty) is the loss's gradient;
    num_residuals M; num_parameters P; penalty (P,) diagonal c or None. Vectors are flat, in the order of `params`, which of
    complex parameters are views (*, 2) of their real and imaginary parts.
    Products raise RuntimeError once the parameters have changed. The tape is held until `release`, or as long as this is.
    """

    def __init__(self, trace, params, operator, plan, tracer, scalar: bool):
        super().__init__(trace, params, operator, plan, tracer, trace.constants)
        self.loss, self.residual, self.residuals_need_tape = trace.loss, trace.residual, scalar
        self.num_residuals, self.num_parameters = trace.residual.numel(), (operator or plan.kernels).num_parameters
        self.scalar, self._plain = scalar, None   # _plain: the residual and the operator without a row scale

    def scale_rows(self, row_scale: torch.Tensor) -> None:
        """Multiply residual and rows of J with these factors, (M,), from now on, in place of those of an earlier call.

        Kernels are bound with them anew; the loss stays. Raises ValueError where there is not one factor per residual.
        """
        if row_scale.shape != self.residual.shape:
            raise ValueError(
                f"pgdfast: row_scale has shape {tuple(row_scale.shape)}; it must have one factor for each of the "
                f"{self.num_residuals} residuals."
            )
        if self._plain is None:
            self._plain = self.residual, self._operator
        residual, operator = self._plain
        self.row_scale, self._wide = row_scale.detach(), None
        self.residual = residual * self.row_scale.to(residual.dtype)
        if operator is not None:
            self._operator = row_scaled(operator, self.row_scale)

    def widened(self):
        """See Bound; the row scale keeps the digits that it was given."""
        new, wide = self._wide is None, super().widened()
        if new and wide is not self and self.row_scale is not None:
            wide.residual, wide._plain = self._plain[0].double() * self.row_scale.double(), None
        return wide

    def _widened_operator(self):
        if self._plain is None:
            return super()._widened_operator()
        return row_scaled(Widened(self._plain[1]), self.row_scale)

    def release(self) -> None:
        """See Bound."""
        if self._plain is not None:
            self._plain = self._plain[0], None
        super().release()

    def flat(self) -> Flat:
        """The products, to be compared with autograd's."""
        return Flat(self.jvp, self.vjp)

    def row_layout(self) -> RowLayout | None:
        """The row layout of the residuals, or None where they do not separate."""
        plan = self._plan
        if plan is None:
            return None
        if not plan.mixing and plan.layout is not UNKNOWN:
            return plan.layout
        self.kernels()   # raises where the constants are gone
        return plan.row_layout(self._constants)

    @property
    def coupling(self) -> str:
        """Why the residuals do not separate into rows, so that J takes a product for each, and what to do; "" where they do."""
        if self._plan is None:
            return ""
        self.kernels()
        return self._plan.coupling(self._constants)

    def residual_at(self, run) -> tuple[float, torch.Tensor]:
        """(loss, residual (M,)) at the parameters' present values; what the quadratic penalties add is in the loss alone.

        run: calls the closure, with its tape where `residuals_need_tape`. Raises ValueError where M is another.
        """
        loss, residual = values_of(run(), self._tracer, self.residuals_need_tape)
        if residual.numel() != self.num_residuals:
            raise ValueError(
                f"pgdfast.LM: the closure returned {self.num_residuals} residuals before the step and {residual.numel()} at a "
                "trial point; with acceleration their number must not change within a step."
            )
        residual = residual.to(self.dtype)
        return loss, residual if self.row_scale is None else residual * self.row_scale.to(self.dtype)

    def _forget(self) -> None:
        self._penalty = None


def _vector(x: torch.Tensor, size: int, dtype, name: str, letter: str) -> torch.Tensor:
    if x.shape != (size,):
        raise ValueError(f"pgdfast: {name} has shape {tuple(x.shape)}; it must be flat with {letter} = {size} entries.")
    return x.detach().to(dtype).resolve_neg().contiguous()
