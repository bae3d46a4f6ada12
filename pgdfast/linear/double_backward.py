"""The Jacobian of any differentiable closure by PyTorch's autograd, without reading its tape.

J^T u is a backward pass. g(u) = J^T u is kept as a graph of u, so J v = d <g(u), v> / du, about two more. J itself comes by
rows, or by columns where these are fewer, many in one batched pass; where a backward pass has no derivative, J v takes J.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.autograd.graph import GradientEdge

from ..kernels.errors import out_of_memory
from ..kernels.protocol import Traits
from ..tape import real_gradient, real_size, shaped_as
from .adjoint import Flat, disagreement, tolerance_of

# What autograd says where a backward pass cannot be differentiated, and where a tensor that it needs was written over.
_NO_SECOND_DERIVATIVE = re.compile("derivative for .* is not implemented|differentiate twice|not differentiable")
_OVERWRITTEN = "modified by an inplace operation"
CHANGED = (
    "pgdfast: the closure has changed a tensor in place that its own tape still needs, between two products with its "
    "Jacobian; the parameters are left unchanged. Write it out of place (w = 0.9 * w + ..., not w.mul_(0.9)), or change it "
    "between steps."
)
_COLUMN = 2.0               # backward passes that a product with J takes
# Rows or columns of J in one batched pass: as many as a cache holds of their intermediate results, or a few if memory does.
_CACHE_BYTES, _FEW, _FEW_BYTES, _LARGEST = 4 << 20, 8, 256 << 20, 256
_PART_BYTES = 64 << 20      # of J in another type
_KEPT_BYTES = 512 << 20     # a larger J is not kept where J^T J will do
# Operations of a large matrix product that take as long as one node of a backward pass, beside its numbers, and as a number.
_NODE, _NUMBER = 2.5e5, 30.0


@dataclass(slots=True)
class Learned:
    """What is known of all tapes of one structure.

    checked: were the products compared with autograd's gradient? matrix_free: are there products J v without J? batched: do
    batches of "rows" and "columns" work? compared: was a J compared with single products? choices: see SolvableLinearization.
    """

    checked: bool = False
    matrix_free: bool = True
    batched: dict = field(default_factory=lambda: {"rows": True, "columns": True})
    compared: bool = False
    choices: dict = field(default_factory=dict)


def double_backward(trace, params, dtype, result, learned: Learned, check: str = "first", count: int = 1) -> DoubleBackward:
    """The products of a trace without a program.

    result: what the closure returned, of an ensemble of `count` the sum of its losses. The products are compared with
    autograd's gradient as `check` says; at every tape where code of the user's takes part in the backward.
    Raises ValueError where a hook or a torch.autograd.Function does not act on gradients as a Jacobian does.
    """
    operator, foreign = DoubleBackward(trace, params, dtype, learned), trace.structure.foreign
    if not (foreign or check == "every" or (check == "first" and not learned.checked)):
        return operator
    if foreign and trace.residual.numel():
        _check_linear(operator, trace)
    found = disagreement(Flat(operator.jvp_by_tape, operator.vjp, count), trace, params, result, learned.matrix_free)
    if found is not None:
        learned.matrix_free &= not found.adjoint
        if found.parameters:
            raise ValueError(_hooked(trace) if foreign else _misread(found.parameters, params))
    learned.checked = True
    return operator


class DoubleBackward(Traits):
    """J and J^T as backward passes; the outputs' scaling is that of the loss's blocks.

    Traits but for the sizes belong to the structure. `rows_per_sweep`: of J, in one batched pass.
    """

    name = "double-backward"
    batches = True
    block_bytes = _KEPT_BYTES

    def __init__(self, trace, params, dtype, learned: Learned):
        self._blocks, self._params, self.dtype, self.learned = trace.blocks, params, dtype, learned
        self._tolerance = tolerance_of(trace)
        self._shapes = [block.residual.shape for block in trace.blocks]
        self._sizes = [shape.numel() for shape in self._shapes]
        self._numbers = [real_size(p) for p in params]
        M, P = sum(self._sizes), sum(self._numbers)
        self.num_residuals, self.num_parameters = M, P
        structure = trace.structure
        numbers, nodes = structure.num_outputs(), _NODE * len(structure.wanted)
        self.arena_size = numbers + M + P   # what PyTorch makes beside its graph
        work = _NUMBER * numbers + structure.product_flops()
        self.flops = nodes + work
        bytes_of_one = (self.arena_size + M + P) * dtype.itemsize
        fitting = max(_CACHE_BYTES // max(bytes_of_one, 1), min(_FEW, _FEW_BYTES // max(bytes_of_one, 1)))
        self.rows_per_sweep = max(1, min(_LARGEST, max(M, P), fitting))
        which, passes, cost = ("columns", P, _COLUMN) if self._by_columns else ("rows", M, 1.0)
        calls = math.ceil(passes / self.rows_per_sweep) if learned.batched[which] else passes
        self.jacobian_flops = cost * (calls * 3 * nodes + passes * work)   # batches cost a node some Python
        # Each output with its sign: mse_loss of two dependent tensors has two.
        self._outputs, self._owner = [], []
        for k, block_edges in enumerate(trace.edges):
            for i, edge in enumerate(block_edges):
                if edge is not None:
                    self._outputs.append(GradientEdge(*edge))
                    self._owner.append((k, 1.0 if i == 0 else -1.0))
        self._probe = self._jacobian = self._normal = None

    @property
    def matrix_free(self) -> bool:
        """See Traits."""
        return self.learned.matrix_free

    @property
    def _by_columns(self) -> bool:
        """Whether J has so few columns that they are cheaper than its rows."""
        return self.learned.matrix_free and _COLUMN * self.num_parameters <= self.num_residuals

    # --- products -----------------------------------------------------------------------------------------------------------

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """J v, (P,) -> (M,), or (K, P) -> (K, M)."""
        if self._jacobian is None and self.learned.matrix_free:
            pushed = self.jvp_by_tape(v)
            if pushed is not None:
                return pushed
        return v @ self.dense().T

    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        """J^T u, (M,) -> (P,), or (K, M) -> (K, P)."""
        if self._jacobian is not None:
            return u @ self._jacobian
        if u.dim() == 1:
            return self._pulled(u)
        return torch.cat([self._many(self._pulled, rows, "rows") for rows in u.split(self.rows_per_sweep)])

    def jvp_by_tape(self, v: torch.Tensor) -> torch.Tensor | None:
        """J v by two backward passes; None, from now on for all tapes of the structure, where one has no derivative."""
        try:
            if v.dim() == 1:
                return self._pushed(v)
            return torch.cat([self._many(self._pushed, rows, "columns") for rows in v.split(self.rows_per_sweep)])
        except RuntimeError as error:   # NotImplementedError is one
            if not _NO_SECOND_DERIVATIVE.search(str(error)):
                raise
            self.learned.matrix_free = False
            return None

    def _pulled(self, u: torch.Tensor, block: int | None = None) -> torch.Tensor:
        """J^T u; for a batch (K, M), too. block: u has that one's residuals alone."""
        lead = u.shape[:-1]
        chosen = range(len(self._blocks)) if block is None else [block]
        parts = u.split([self._sizes[k] for k in chosen], -1)
        scaled = {
            k: _each(_scale_transposed, self._blocks[k], part.reshape((*lead, *self._shapes[k])), len(lead))
            for k, part in zip(chosen, parts, strict=True)
        }
        asked = [(output, k, sign) for output, (k, sign) in zip(self._outputs, self._owner, strict=True) if k in scaled]
        pulled = [None] * len(self._params)
        if asked:
            cotangents = [(sign * scaled[k]).to(self._blocks[k].residual.dtype) for _, k, sign in asked]
            pulled = _grad([output for output, _, _ in asked], self._params, cotangents, bool(lead))
        return torch.cat([
            u.new_zeros(*lead, size) if g is None else real_gradient(_strided(g)).reshape((*lead, size)).to(self.dtype)
            for g, size in zip(pulled, self._numbers, strict=True)
        ], -1)

    def _pushed(self, v: torch.Tensor) -> torch.Tensor:
        """J v; for a batch (K, P), too."""
        lead = v.shape[:-1]
        pulled, cotangents = self._pullback()
        parts = v.split(self._numbers, -1)
        pairs = [
            (g, shaped_as(p, part).to(g.dtype))
            for g, part, p in zip(pulled, parts, self._params, strict=True)
            if g is not None and g.requires_grad
        ]
        pushed = [None] * len(cotangents)
        if pairs:
            graphs, vectors = zip(*pairs, strict=True)
            pushed = _grad(graphs, cotangents, vectors, bool(lead))
        totals = [torch.zeros((*lead, *s), dtype=self.dtype, device=v.device) for s in self._shapes]
        for (k, sign), tangent in zip(self._owner, pushed, strict=True):
            if tangent is not None:
                totals[k] += sign * tangent.to(self.dtype)
        scaled = [
            _each(_scale, b, t, len(lead)).reshape((*lead, size))
            for b, t, size in zip(self._blocks, totals, self._sizes, strict=True)
        ]
        return torch.cat(scaled, -1) if scaled else v.new_empty(*lead, 0)

    def _pullback(self):
        # Cotangents of one carry the graph of u -> J^T u, whose value is never used; at zero some have no derivative.
        if self._probe is None:
            with torch.enable_grad():
                self._cotangents = [
                    torch.ones(self._shapes[k], dtype=self._blocks[k].residual.dtype, device=self._blocks[k].residual.device,
                                requires_grad=True)
                    for k, _ in self._owner
                ]
                pulled = torch.autograd.grad(
                    self._outputs, self._params, self._cotangents, create_graph=True, allow_unused=True
                )
                self._probe = [None if g is None else _strided(g) for g in pulled]
        return self._probe, self._cotangents

    def _many(self, product, rows: torch.Tensor, which: str) -> torch.Tensor:
        """product(row) for each of the rows: in one pass where every node on the tape takes batches."""
        batched = self.learned.batched
        if batched[which] and len(rows) > 1:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")   # of nodes that are run one by one
                    return product(rows)
            except MemoryError:
                raise
            except Exception as error:   # noqa: BLE001 - whatever code of the user's makes of a batch; alone it raises again
                batched[which] = out_of_memory(error)
        return torch.stack([product(row) for row in rows])

    # --- the Jacobian -------------------------------------------------------------------------------------------------------

    def dense(self) -> torch.Tensor:
        """J, (M, P), kept from now on."""
        if self._jacobian is None:
            J = self._columns() if self._by_columns else None
            if J is None:
                J = torch.empty(self.num_residuals, self.num_parameters, dtype=self.dtype, device=self._params[0].device)
                for first, rows in self._rows():
                    J[first : first + len(rows)] = rows
            if not self.learned.compared and J.numel():
                J = self._compared(J)
            self._jacobian = J
        return self._jacobian

    def normal(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """J^T J, (P, P), summed in `dtype`; a J that is too large to keep passes in blocks of rows, for the first sum alone."""
        dtype = dtype or self.dtype
        if self._normal is not None and self._normal.dtype == dtype:
            return self._normal
        H = torch.zeros(self.num_parameters, self.num_parameters, dtype=dtype, device=self._params[0].device)
        for _, rows in self.row_blocks(dtype):
            H.addmm_(rows.T, rows)
        self._normal = H
        return H

    def diagonal(self) -> torch.Tensor:
        """diag(J^T J), (P,), with no more of J at once than J^T J takes."""
        d = torch.zeros(self.num_parameters, dtype=self.dtype, device=self._params[0].device)
        for _, rows in self.row_blocks(self.dtype):
            d += rows.square().sum(0)
        return d

    def row_blocks(self, dtype: torch.dtype | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """(number of the first, rows of J) in blocks, of a J that is kept unless it is too large."""
        dtype = dtype or self.dtype
        size = self.num_residuals * self.num_parameters * self.dtype.itemsize
        if self._jacobian is None and not self._by_columns and size > _KEPT_BYTES:
            return ((first, rows.to(dtype)) for first, rows in self._rows())
        return _parts(self.dense(), dtype)

    def _rows(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(number of the first, rows of J) in blocks."""
        first = 0
        for k, size in enumerate(self._sizes):
            for start in range(0, size, self.rows_per_sweep):
                units = torch.zeros(min(self.rows_per_sweep, size - start), size, dtype=self.dtype,
                                    device=self._params[0].device)
                units.diagonal(start).fill_(1)
                yield first + start, self._many(lambda u, k=k: self._pulled(u, k), units, "rows")
            first += size

    def _columns(self) -> torch.Tensor | None:
        """J by its columns; None where a backward pass has no derivative."""
        P, columns = self.num_parameters, []
        try:
            for start in range(0, P, self.rows_per_sweep):
                units = torch.zeros(min(self.rows_per_sweep, P - start), P, dtype=self.dtype, device=self._params[0].device)
                units.diagonal(start).fill_(1)
                columns.append(self._many(self._pushed, units, "columns"))
        except RuntimeError as error:
            if not _NO_SECOND_DERIVATIVE.search(str(error)):
                raise
            self.learned.matrix_free = False
            return None
        return torch.cat(columns).T.contiguous()

    def _compared(self, J: torch.Tensor) -> torch.Tensor:
        """J, made anew one row at a time where it is not that of single backward passes. Costs one of them."""
        u = torch.randn(len(J), generator=torch.Generator().manual_seed(1)).to(J)
        alone, pulled = self._pulled(u), u @ J
        same = bool((alone - pulled).norm() <= self._tolerance * (alone.norm() + pulled.norm()))
        if not same and bool(alone.isfinite().all()):
            self.learned.batched["rows"] = False
            J = torch.cat([rows for _, rows in self._rows()])
        self.learned.compared = True
        return J


class Widened(Traits):
    """The same J, as autograd has it, with sums in float64."""

    name = "double-backward"
    block_bytes = _KEPT_BYTES
    dtype = torch.float64

    def __init__(self, base: DoubleBackward):
        self._base = base
        self.num_residuals, self.num_parameters = base.num_residuals, base.num_parameters
        self.flops, self.arena_size, self.rows_per_sweep = base.flops, base.arena_size, base.rows_per_sweep
        self.jacobian_flops, self.matrix_free = base.jacobian_flops, False

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """J v, (M,)."""
        return torch.cat([part @ v for _, part in _parts(self._base.dense(), v.dtype)])

    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        """J^T u, (P,)."""
        parts = _parts(self._base.dense(), u.dtype)
        return sum((u[first : first + len(part)] @ part for first, part in parts), u.new_zeros(self.num_parameters))

    def dense(self) -> torch.Tensor:
        """J, (M, P), a copy."""
        return self._base.dense().double()

    def row_blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(number of the first, rows of J) in blocks."""
        return self._base.row_blocks(self.dtype)

    def normal(self) -> torch.Tensor:
        """J^T J, (P, P)."""
        return self._base.normal(torch.float64)

    def diagonal(self) -> torch.Tensor:
        """diag(J^T J), (P,)."""
        return sum((part.square().sum(0) for _, part in _parts(self._base.dense(), torch.float64)))


def _parts(J: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
    """(number of the first, rows of J in another type) in blocks."""
    count = len(J) if J.dtype == dtype else max(1, _PART_BYTES // (dtype.itemsize * max(J.shape[1], 1)))
    return ((first, J[first : first + count].to(dtype)) for first in range(0, max(len(J), 1), max(count, 1)))


def _grad(outputs, inputs, cotangents, batched: bool):
    try:
        return torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
    except RuntimeError as error:
        if _OVERWRITTEN in str(error):
            raise RuntimeError(CHANGED) from error
        raise


def _strided(g: torch.Tensor) -> torch.Tensor:
    return g if g.layout is torch.strided else g.to_dense()


def _each(function, block, t: torch.Tensor, lead: int) -> torch.Tensor:
    """function(block, t) for t, or for each of a batch."""
    return torch.vmap(lambda one: function(block, one))(t) if lead else function(block, t)


def _check_linear(operator: DoubleBackward, trace) -> None:
    """Raise ValueError unless u -> J^T u is linear, where it is finite."""
    u, tolerance = trace.residual, tolerance_of(trace)
    w = torch.randn(u.numel(), generator=torch.Generator().manual_seed(0)).to(u) * u.norm() / u.numel() ** 0.5
    pulled, other, both = operator.vjp(u), operator.vjp(w), operator.vjp(2 * u + w)
    finite = pulled.isfinite() & other.isfinite()
    gap = torch.where(finite, both - 2 * pulled - other, 0.0)
    pulled, other = (torch.where(finite, t, 0.0) for t in (pulled, other))
    if not gap.norm() <= tolerance * (2 * pulled.norm() + other.norm()):
        raise ValueError(
            f"pgdfast.LM: the backward of the closure's tape ({trace.missing}) is not linear in the gradient, so that there is "
            "no Jacobian to step with; leave the hook or Function out under LM (norm_constraint bounds the length of steps)."
        )


def _hooked(trace) -> str:
    return (
        f"pgdfast.LM: a hook ({trace.missing}) changes the gradient where a least-squares step cannot follow, in the loss's "
        "own operations or at a parameter with a penalty; put the factor into the loss instead."
    )


def _misread(wrong: list[int], params) -> str:
    named = ", ".join(f"{k} of shape {tuple(params[k].shape)}" for k in wrong[:3]) + (", ..." if len(wrong) > 3 else "")
    return (
        "pgdfast.LM: the closure's loss was misread: its gradient as a sum of squares is not autograd's, at parameter "
        f"{named}. The parameters are unchanged. This is a fault of pgdfast: please report the closure; until it is mended "
        "return the residuals instead of the loss."
    )


def _scale(block, t: torch.Tensor) -> torch.Tensor:
    """S^T t for one block."""
    return block.scale(t)


def _scale_transposed(block, u: torch.Tensor) -> torch.Tensor:
    """S u for one block."""
    return block.scale_transposed(u)
