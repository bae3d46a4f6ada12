"""A closure of B stacked networks linearized: B least-squares problems from one tape."""

from __future__ import annotations

from functools import partial
from weakref import WeakValueDictionary

import torch

from .. import kernels
from ..kernels.protocol import Traits
from ..tape import members
from .adjoint import Flat
from .linearization import Bound, Linearizer, Products
from .plan import Plan
from .values import flat_residuals


class EnsembleLinearizer(Linearizer):
    """Linearizes closures of ensembles over fixed parameters, each of them B tensors stacked on a first dimension."""

    def __init__(self, params, count: int, backend: str = "auto", check: str = "first"):
        check_stacked(params, count)
        super().__init__(params, backend, check)
        self.count = count
        self._orders: dict[tuple, torch.Tensor] = {}

    def read(self, result) -> EnsembleLinearization:
        """The linearization of what the closure returned, B losses or residuals with the members first."""
        self._check_device(result)
        losses, total = split_result(result, self.count)
        found = self._read(losses, total)
        if losses is None:   # summed as at trial points, so that a step of no length changes no bit
            found.sums = half_squares(total, self.count)
            found.loss = found.sums.to(found.dtype)
        return found

    def _read(self, losses, total) -> EnsembleLinearization:
        trace = self.tracer.trace(total)
        if trace.program is not None:
            plan = self._plan_of(trace)
            order = plan.order
            if plan.members is None:
                order = self._order(plan.bind(trace.constants), trace.program.residual_shapes)
            found = EnsembleLinearization(self, trace, losses, None, plan, order)
            if not plan.agrees:
                again = partial(EnsembleLinearization, self, losses=losses, operator=None, plan=plan, order=order)
                found = self._arbiter.judged(plan, found, again, trace, total)
            if found is not None:
                return found
            trace = self._arbiter.trace(total)
        else:
            self._announce(trace)
        operator = self._arbiter.operator(trace, total, self.count)
        order = self._order(operator, [block.residual.shape for block in trace.blocks])
        return EnsembleLinearization(self, trace, losses, operator, None, order)

    def _new_plan(self, trace) -> _EnsemblePlan:
        device = trace.residual.device
        together = kernels.serves_members(device, trace.program.dtype, self.backend)
        cut = members.cut(trace.program, self.count) if together else None
        return _EnsemblePlan(trace.program, cut, device, self.backend)

    def _order(self, operator, shapes) -> torch.Tensor:
        """Where the members' residuals stand among all of these shapes, (B M,), found by trying: no strides say it.

        Raises ValueError where a residual depends on several members or they do not have equally many.
        """
        key = tuple(shapes)
        if key in self._orders:
            return self._orders[key]
        labels, certain = self._labels(operator)
        order = self._sorted(labels, shapes)
        if certain:
            if len(self._orders) >= 64:
                self._orders.clear()
            self._orders[key] = order
        return order

    def _labels(self, operator) -> tuple[torch.Tensor, bool]:
        """The member on whose parameters each residual depends, (B M,), -1 where on none; whether all products were finite."""
        generator = torch.Generator().manual_seed(0)
        number = torch.arange(self.count)
        labels = torch.zeros(operator.num_residuals, dtype=torch.int64)
        reached = torch.zeros(operator.num_residuals, dtype=torch.bool)
        certain = True
        for bit in range(max(1, (self.count - 1).bit_length())):
            found = []
            for value in (0, 1):
                v = torch.randn(self.count, operator.num_parameters // self.count, generator=generator)
                v = v.to(self.tracer.dtype) * ((number >> bit) % 2 == value)[:, None]
                u = operator.jvp(scattered_parameters(v.to(self.params[0].device), self.reals)).cpu()
                found.append((u != 0) & torch.isfinite(u))
                certain &= bool(torch.isfinite(u).all())
            if bool((found[0] & found[1]).any()):
                raise ValueError(
                    f"pgdfast.LM: a residual of the closure depends on several of the {self.count} members; every loss or "
                    "residual of an ensemble must depend on one member's parameters alone."
                )
            labels += found[1].to(torch.int64) << bit
            reached |= found[0] | found[1]
        return torch.where(reached, labels, -1), certain

    def _sorted(self, labels: torch.Tensor, shapes) -> torch.Tensor:
        parts = []
        for part, shape in zip(labels.split([shape.numel() for shape in shapes]), shapes, strict=True):
            known = part[part >= 0].unique()
            if len(known) == 1 and self.count > 1:
                part = known.expand(len(part))   # a block of one member's
            elif len(known) == 0 or (part < 0).any():   # residuals that no parameter reaches now: by their place
                part = self._by_place(part, shape)
            parts.append(part)
        labels = torch.cat(parts) if parts else labels
        counts = torch.bincount(labels, minlength=self.count).tolist()
        if len(set(counts)) > 1:
            raise ValueError(
                f"pgdfast.LM: the members of the ensemble have {', '.join(map(str, counts))} residuals; all need equally many. "
                "Train members with data of different sizes apart, or fill up with residuals of weight 0."
            )
        order = torch.argsort(labels, stable=True)
        return order.to(self.params[0].device)

    def _by_place(self, part: torch.Tensor, shape) -> torch.Tensor:
        form = members.forms_by_shape([shape], self.count)
        if form is not None:
            outer, inner = form[0]
            placed = torch.arange(self.count).view(1, -1, 1).expand(outer, -1, inner).reshape(-1)
            if bool(((part < 0) | (part == placed)).all()):
                return placed
        raise ValueError(
            f"pgdfast.LM: it cannot be told which of the {self.count} members the closure's residuals of shape {tuple(shape)} "
            f"belong to; return them with the members first, ({self.count}, ...)."
        )


class _EnsemblePlan(Plan):
    """Kernels of one member's program where the program separates, else of all members together."""

    __slots__ = ("members", "order")
    chains = False

    def __init__(self, program, cut, device, backend, dtype=None, base=None):
        self.members = cut
        super().__init__(program if cut is None else cut.program, device, backend, dtype, base)
        self.order = None
        if cut is not None:
            self.kernels.set_members(cut.count, cut.shifts, cut.spans)
            order = members.order_of(cut)
            self.order = order if order is None else order.to(device)

    def _widened(self) -> _EnsemblePlan:
        return _EnsemblePlan(self.program, self.members, self._device, self._backend, torch.float64, self)


class EnsembleLinearization(Bound):
    """B least-squares problems of one shape at the current parameters.

    Attributes: count B; loss (B,); residual (B, M); num_residuals M and num_parameters P of one member; separates: whether the
    kernels know the members apart, so that each is a problem of its own size. `member(b)` is the linearization of one; vectors
    of a member are flat, in the order of `params`.
    """

    def __init__(self, linearizer, trace, losses, operator, plan, order):
        self.scalar, self.separates = False, plan is not None and plan.members is not None
        constants = [trace.constants[k] for k in plan.members.sources] if self.separates else trace.constants
        super().__init__(trace, linearizer.reals, operator, plan, linearizer.tracer, constants)
        self.count, self._order, self.residuals_need_tape = linearizer.count, order, losses is not None
        self.residual = gathered(trace.residual, order, self.count)
        self.loss = 0.5 * self.residual.square().sum(1) if losses is None else losses
        self.num_residuals = self.residual.shape[1]
        self.num_parameters = sum(p.numel() for p in self.params) // self.count
        self.tape_bytes *= self.count if self.separates else 1
        self._losses, self.sums = None, self.loss   # sums: the losses in all the digits there are
        self._forget()

    def flat(self) -> Flat:
        """The products in the order of the whole program."""
        def jvp(v):
            return scattered(self.jvp(gathered_parameters(v, self.params)), self._order)

        def vjp(u):
            return scattered_parameters(self.vjp(gathered(u, self._order, self.count)), self.params)

        return Flat(jvp, vjp, self.count)

    def _forget(self) -> None:
        self._dense = None
        self._members = WeakValueDictionary()   # a member holds the ensemble: no cycle, or tapes would wait for the collector

    @property
    def losses(self) -> list[float]:
        """The losses as numbers."""
        if self._losses is None:
            self._losses = self.sums.tolist()
        return self._losses

    def widened(self):
        """See Bound. Without a program every J_b, as autograd has it, in float64."""
        wide = super().widened()
        if wide is not self and self._plan is None and wide._dense is None:
            wide._dense = self.dense().double()
        return wide

    def row_layout(self):
        """The row layout of one member's residuals, None where they or the members do not separate."""
        return self._plan.row_layout(self._constants) if self.separates else None

    @property
    def coupling(self) -> str:
        """Why one member's residuals do not separate into rows; "" where they do, or where nobody has asked."""
        return self._plan.coupling(self._constants) if self.separates else ""

    def residual_at(self, run) -> tuple[list[float], torch.Tensor]:
        """(losses, residual (B, M)) at the parameters' present values; see Linearization.residual_at."""
        result = run()
        losses, total = split_result(result, self.count)
        residual = flat_residuals(total) if losses is None else self._tracer.trace(total).residual
        if residual.numel() != self.count * self.num_residuals:
            raise ValueError(
                f"pgdfast.LM: the closure returned {self.num_residuals} residuals per member before the step and "
                f"{residual.numel() / self.count:g} at a trial point; with acceleration their number must not change "
                "within a step."
            )
        residual = gathered(residual, self._order, self.count).to(self.dtype)
        return losses_of(result, self.count) if losses is None else losses.tolist(), residual

    def member(self, b: int) -> Member:
        """The linearization of member b."""
        member = self._members.get(b)
        if member is None:
            member = self._members[b] = Member(self, b)
        return member

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """J_b v_b for all members: (B, P) -> (B, M)."""
        if self.separates:
            return torch.stack([self.member(b).jvp(row) for b, row in enumerate(v)])
        if self._dense is not None:
            return (self._dense @ v[:, :, None])[:, :, 0]
        return gathered(self.kernels().jvp(scattered_parameters(v, self.params)), self._order, self.count)

    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        """J_b^T u_b for all members: (B, M) -> (B, P)."""
        if self.separates:
            return torch.stack([self.member(b).vjp(row) for b, row in enumerate(u)])
        if self._dense is not None:
            return (u[:, None] @ self._dense)[:, 0]
        return gathered_parameters(self.kernels().vjp(scattered(u, self._order)), self.params)

    def dense(self) -> torch.Tensor:
        """Every J_b, (B, M, P); where the kernels do not know members apart by M sweeps that serve them all, once."""
        if self.separates:
            return torch.stack([self.member(b).dense() for b in range(self.count)])
        if self._dense is None:
            J = self.residual.new_empty(self.count, self.num_residuals, self.num_parameters)
            kernels = self.kernels()
            size = kernels.rows_per_sweep if kernels.batches else 1
            for first in range(0, self.num_residuals, size):
                rows = J[:, first : first + size].transpose(0, 1)   # (K, B, P)
                units = torch.zeros(len(rows), *self.residual.shape, dtype=self.dtype, device=self.device)
                units[range(len(rows)), :, range(first, first + len(rows))] = 1
                cotangents = torch.stack([scattered(unit, self._order) for unit in units])
                pulled = kernels.vjp(cotangents) if kernels.batches else kernels.vjp(cotangents[0])[None]
                for row, flat in zip(rows, pulled, strict=True):
                    row.copy_(gathered_parameters(flat, self.params))
            self._dense = J
        return self._dense

    def diagonal(self) -> torch.Tensor:
        """Every diag(J_b^T J_b + penalty), (B, P)."""
        return torch.stack([self.member(b).diagonal() for b in range(self.count)])


class Member(Products):
    """One member of an ensemble, with all that a linearization has."""

    def __init__(self, ensemble: EnsembleLinearization, b: int):
        self._ensemble, self._b = ensemble, b
        self.loss, self.residual, self.dtype = ensemble.loss[b], ensemble.residual[b], ensemble.dtype
        self.device, self.penalties, self.choices = ensemble.device, ensemble.penalties, ensemble.choices
        self.params = [p.detach()[b] for p in ensemble.params]
        self.num_residuals, self.num_parameters = ensemble.num_residuals, ensemble.num_parameters
        self.has_squares_only, self.tapeless = ensemble.has_squares_only, ensemble.tapeless
        self.residuals_need_tape, self.sync_reason = ensemble.residuals_need_tape, ensemble.sync_reason
        self.tape_bytes, self.scalar = ensemble.tape_bytes, False
        self._alone = None if ensemble.separates else _OneOfAll(ensemble, b)

    def kernels(self):
        """The kernels, bound to this member's constants."""
        return self._alone or self._ensemble.kernels(self._b)

    def row_layout(self):
        """The row layout of the residuals, or None; all members have the same."""
        return self._ensemble.row_layout()

    @property
    def coupling(self) -> str:
        """Why the residuals do not separate into rows."""
        return self._ensemble.coupling

    def widened(self) -> Member:
        """The same with products in float64, or itself where that is not to be had."""
        wide = self._ensemble.widened()
        return self if wide is self._ensemble else wide.member(self._b)

    def residual_at(self, run) -> tuple[float, torch.Tensor]:
        """(loss, residual (M,)) where `run` calls the whole ensemble's closure."""
        losses, residual = self._ensemble.residual_at(run)
        return losses[self._b], residual[self._b]

    def before_trial(self) -> None:
        """See EnsembleLinearization."""
        self._ensemble.before_trial()

    def doubt(self) -> None:
        """See EnsembleLinearization."""
        self._ensemble.doubt()

    def parameters_unchanged(self) -> None:
        """See EnsembleLinearization."""
        self._ensemble.parameters_unchanged()

    def release(self) -> None:
        """Let go of the tape, which is the ensemble's."""
        self._ensemble.release()


class _OneOfAll(Traits):
    """A member's products by sweeps over all members, B times too much work, or by its J once that is known."""

    name = "one of all"

    def __init__(self, ensemble: EnsembleLinearization, b: int):
        self._ensemble, self._b = ensemble, b
        self.num_residuals, self.num_parameters = ensemble.num_residuals, ensemble.num_parameters
        whole = ensemble._operator or ensemble._plan.kernels
        self.flops, self.arena_size, self.matrix_free = whole.flops, whole.arena_size, whole.matrix_free
        if whole.jacobian_flops is not None:
            self.jacobian_flops = whole.jacobian_flops / ensemble.count   # a sweep serves all

    def _one(self, product, dense, x: torch.Tensor) -> torch.Tensor:
        if self._ensemble._dense is not None:
            return dense(self._ensemble._dense[self._b], x)
        everyone = x.new_zeros(self._ensemble.count, len(x))
        everyone[self._b] = x
        return product(everyone)[self._b]

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """J v, (M,)."""
        return self._one(self._ensemble.jvp, torch.mv, v)

    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        """J^T u, (P,)."""
        return self._one(self._ensemble.vjp, lambda J, u: u @ J, u)

    def dense(self) -> torch.Tensor:
        """J, (M, P)."""
        return self._ensemble.dense()[self._b]


def check_stacked(params, count: int) -> None:
    """Raise ValueError unless every parameter has a first dimension of `count`."""
    for k, p in enumerate(params):
        if p.dim() == 0 or len(p) != count:
            raise ValueError(
                f"pgdfast.LM: parameter {k} of an ensemble of {count} has shape {tuple(p.shape)}; every parameter needs the "
                f"members on its first dimension, ({count}, ...). torch.func.stack_module_state or pgdfast.functional_ensemble "
                "stack them."
            )


def split_result(result, count: int):
    """(losses (B,) or None, what to trace) of a closure's result.

    Raises ValueError for anything but B losses or residuals whose first dimension is B.
    """
    tensors = list(result) if isinstance(result, (tuple, list)) else [result]
    alone = isinstance(result, torch.Tensor)
    if not tensors or not all(isinstance(t, torch.Tensor) and t.dim() > 0 and len(t) == count for t in tensors):
        shapes = ", ".join(str(tuple(t.shape)) if isinstance(t, torch.Tensor) else type(t).__name__ for t in tensors)
        raise ValueError(
            f"pgdfast.LM: the closure of an ensemble of {count} returned {shapes or 'nothing'}; it must return {count} losses, "
            f"shape ({count},), or residuals of shape ({count}, ...), one row per member."
        )
    if alone and result.dim() == 1:
        return result.detach(), result.sum()
    return None, result


def losses_of(result, count: int) -> list[float]:
    """The members' losses, as numbers, of a closure's result."""
    losses, residuals = split_result(result, count)
    if losses is not None:
        return losses.tolist()
    return half_squares(residuals, count).tolist()


def half_squares(residuals, count: int) -> torch.Tensor:
    """1/2 ||r_b||^2 of residual tensors with the members first, (B,), float64, detached."""
    parts = residuals if isinstance(residuals, (tuple, list)) else [residuals]
    return sum(0.5 * part.detach().double().reshape(count, -1).square().sum(1) for part in parts)


def gathered(flat: torch.Tensor, order: torch.Tensor | None, count: int) -> torch.Tensor:
    """Residuals in the order of the whole program as (B, M)."""
    return (flat if order is None else flat[order]).view(count, -1)


def scattered(rows: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """The inverse of `gathered`."""
    flat = rows.reshape(-1)
    return flat if order is None else torch.empty_like(flat).index_copy_(0, order, flat)


def gathered_parameters(flat: torch.Tensor, params) -> torch.Tensor:
    """A flat vector over stacked parameters as (B, P)."""
    count = len(params[0])
    return torch.cat([part.view(count, -1) for part in flat.split([p.numel() for p in params])], 1)


def scattered_parameters(rows: torch.Tensor, params) -> torch.Tensor:
    """The inverse of `gathered_parameters`."""
    count = len(params[0])
    return torch.cat([part.reshape(-1) for part in rows.split([p.numel() // count for p in params], 1)])

