"""A closure of B stacked networks linearised: B least-squares problems from one tape."""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakValueDictionary

import torch

from .. import kernels
from ..kernels.protocol import Traits
from ..tape import members
from .double_backward import DoubleBackward
from .linearization import Linearization, Linearizer, Plan, wind_back


class EnsembleLinearizer(Linearizer):
    """Linearises closures of ensembles over fixed parameters, each of them B tensors stacked on a first dimension."""

    def __init__(self, params, count: int, backend: str = "auto"):
        check_stacked(params, count)
        super().__init__(params, backend)
        self.count = count
        self._orders: dict[tuple, torch.Tensor] = {}

    def read(self, result) -> EnsembleLinearization:
        """The linearisation of what the closure returned, B losses or residuals with the members first."""
        self._check_device(result)
        losses, total = split_result(result, self.count)
        trace = self._tracer.trace(total)
        if trace.program is None:
            self._announce(trace.missing)
            operator = DoubleBackward(trace.blocks, trace.edges, self.params, self._tracer.dtype)
            shapes = [block.residual.shape for block in trace.blocks]
            return EnsembleLinearization(self, trace, losses, operator, None, self._order(operator, shapes))
        plan = self._plan_of(trace)
        if plan.members is not None:
            return EnsembleLinearization(self, trace, losses, None, plan, plan.order)
        plan.kernels.bind(trace.constants)
        order = self._order(plan.kernels, trace.program.residual_shapes)
        return EnsembleLinearization(self, trace, losses, plan.kernels, plan, order)

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
                v = v.to(self._tracer.dtype) * ((number >> bit) % 2 == value)[:, None]
                u = operator.jvp(scattered_parameters(v.to(self.params[0].device), self.params)).cpu()
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

    def __init__(self, program, cut, device, backend, dtype=None, base=None):
        self.members = cut
        super().__init__(program if cut is None else cut.program, device, backend, dtype, base)
        self.order = None
        if cut is not None:
            self.kernels.set_members(cut.count, cut.shifts, cut.spans)
            order = members.order_of(cut)
            self.order = order if order is None else order.to(device)

    @property
    def wide(self) -> _EnsemblePlan:
        """The same in float64."""
        if self._wide is None:
            self._wide = _EnsemblePlan(self.program, self.members, self._device, self._backend, torch.float64, self)
        return self._wide


class EnsembleLinearization:
    """B least-squares problems of one shape at the current parameters.

    Attributes: count B; loss (B,); residual (B, M); num_residuals M and num_parameters P of one member. `member(b)` is the
    Linearization of one; vectors of a member are flat, in the order of `params`.
    """

    def __init__(self, linearizer, trace, losses, operator, plan, order):
        self.count, self.params, self.dtype = linearizer.count, linearizer.params, trace.residual.dtype
        self.device, self.penalties = self.params[0].device, trace.penalties
        self.residual = gathered(trace.residual, order, self.count)
        self.loss = 0.5 * self.residual.square().sum(1) if losses is None else losses
        self.num_residuals = self.residual.shape[1]
        self.num_parameters = sum(p.numel() for p in self.params) // self.count
        self.tapeless, self.has_squares_only = trace.tapeless, trace.squares_only
        self._trace, self._operator, self._plan, self._order = trace, operator, plan, order
        self._linearizer = linearizer
        self.sources = None if plan is None or plan.members is None else plan.members.sources
        self._members = WeakValueDictionary()   # a member holds the ensemble: no cycle, or tapes would wait for the collector
        self._losses: list[float] | None = None
        self._dense: torch.Tensor | None = None
        self._versions: list[int] = []
        self.parameters_unchanged()

    @property
    def losses(self) -> list[float]:
        """The losses as numbers."""
        if self._losses is None:
            self._losses = self.loss.tolist()
        return self._losses

    @property
    def separates(self) -> bool:
        """Whether the kernels know the members apart: then each is a problem of its own size."""
        return self.sources is not None

    @property
    def constants(self) -> list:
        """Of the members' program, those of all members in one."""
        return [self._trace.constants[k] for k in self.sources]

    def parameters_unchanged(self) -> None:
        """Declare the parameters to be, bit for bit, those of the linearisation (after undoing a trial step)."""
        if self._plan is None and self._versions:
            wind_back(self.params, self._versions)
        self._versions[:] = [p._version for p in self.params]

    def check_versions(self) -> None:
        """Raise RuntimeError where the parameters have changed."""
        if [p._version for p in self.params] != self._versions:
            raise RuntimeError("pgdfast: the parameters have changed since this linearisation was made; linearise again.")

    def bound(self, plan):
        """The kernels of a plan over members, bound to this linearisation's constants."""
        self.check_versions()
        if plan.owner is not self:
            plan.kernels.bind(self.constants)
            plan.owner, plan.member = self, 0
        return plan.kernels

    def plan(self, wide: bool = False):
        """The plan over members; wide: in float64."""
        return self._plan.wide if wide else self._plan

    def member(self, b: int) -> Member:
        """The linearisation of member b."""
        member = self._members.get(b)
        if member is None:
            member = self._members[b] = Member(self, b)
        return member

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """J_b v_b for all members: (B, P) -> (B, M)."""
        if self.separates:
            return torch.stack([self.member(b).jvp(row) for b, row in enumerate(v)])
        return gathered(self._whole().jvp(scattered_parameters(v, self.params)), self._order, self.count)

    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        """J_b^T u_b for all members: (B, M) -> (B, P)."""
        if self.separates:
            return torch.stack([self.member(b).vjp(row) for b, row in enumerate(u)])
        return gathered_parameters(self._whole().vjp(scattered(u, self._order)), self.params)

    def dense(self) -> torch.Tensor:
        """Every J_b, (B, M, P); where the kernels do not know members apart by M sweeps that serve them all."""
        if self._dense is None:
            if self.separates:
                self._dense = torch.stack([self.member(b).dense() for b in range(self.count)])
            else:
                self._dense = self.residual.new_empty(self.count, self.num_residuals, self.num_parameters)
                for i in range(self.num_residuals):
                    unit = torch.zeros_like(self.residual)
                    unit[:, i] = 1
                    self._dense[:, i] = self.vjp(unit)
        return self._dense

    def diagonal(self) -> torch.Tensor:
        """Every diag(J_b^T J_b + penalty), (B, P)."""
        return torch.stack([self.member(b).diagonal() for b in range(self.count)])

    def _whole(self):
        self.check_versions()
        if self._plan is not None and self._plan.owner is not self:
            self._operator.bind(self._trace.constants)
            self._plan.owner = self
        return self._operator


class Member(Linearization):
    """One member of an ensemble, with all that a Linearization has."""

    def __init__(self, ensemble: EnsembleLinearization, b: int, plan=None, dtype=None):
        self._ensemble, self._b = ensemble, b
        trace = replace(ensemble._trace, loss=ensemble.loss[b], value=ensemble.losses[b], residual=ensemble.residual[b])
        plan = plan if plan is not None or not ensemble.separates else ensemble.plan()
        params = [p.detach()[b] for p in ensemble.params]
        operator = plan.kernels if ensemble.separates else _OneOfAll(ensemble, b)
        super().__init__(trace, params, operator, plan if ensemble.separates else None, None, dtype)

    @property
    def operator(self):
        """The kernels, bound to this member's constants."""
        if self._plan is None:
            return self._operator
        kernels = self._ensemble.bound(self._plan)
        if self._plan.member != self._b:
            kernels.select(self._b)
            self._plan.member = self._b
        return kernels

    @property
    def rows(self):
        """The row layout of the residuals, or None; all members have the same."""
        return self._plan.rows(self._ensemble.constants) or None if self._plan is not None else None

    def widened(self) -> Member:
        """The same with products in float64, or itself where that is not to be had."""
        if self.dtype == torch.float64 or self._plan is None:
            return self
        return Member(self._ensemble, self._b, self._plan.wide, torch.float64)


class _OneOfAll(Traits):
    """A member's products by sweeps over all members, B times too much work, or by its J once that is known."""

    name = "one of all"

    def __init__(self, ensemble: EnsembleLinearization, b: int):
        self._ensemble, self._b = ensemble, b
        self.num_residuals, self.num_parameters = ensemble.num_residuals, ensemble.num_parameters
        whole = ensemble._operator
        self.flops, self.arena_size = whole.flops, whole.arena_size

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """J v, (M,)."""
        if self._ensemble._dense is not None:
            return self._ensemble._dense[self._b] @ v
        all_v = v.new_zeros(self._ensemble.count, len(v))
        all_v[self._b] = v
        return self._ensemble.jvp(all_v)[self._b]

    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        """J^T u, (P,)."""
        if self._ensemble._dense is not None:
            return u @ self._ensemble._dense[self._b]
        all_u = u.new_zeros(self._ensemble.count, len(u))
        all_u[self._b] = u
        return self._ensemble.vjp(all_u)[self._b]

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
    parts = list(residuals) if isinstance(residuals, (tuple, list)) else [residuals]
    return sum(0.5 * part.detach().double().reshape(count, -1).square().sum(1) for part in parts).tolist()


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


__all__ = [
    "EnsembleLinearization", "EnsembleLinearizer", "check_stacked", "gathered_parameters", "losses_of",
    "scattered_parameters", "split_result",
]
