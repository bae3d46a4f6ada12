"""How the terms of a loss on parts of its rows combine to those of the loss on all rows.

A term is S / D times constants: S a sum over rows, D what a mean divides by, 1 for a sum. On the rows of all parts it is
(S_1 + S_2 + ...) / (D_1 + D_2 + ...). What D is, the nodes between the loss and the block tell (rows.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..rules.table import plain
from ..walk import Tape
from .blocks import COUPLED, Form, Route, unrolled
from .names import written
from .outputs import is_elementwise, is_scaling, transposed
from .rows import Rows
from .states import State, Unclear, kind_of_all

_PICKING = {
    "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0", "TBackward0", "TransposeBackward0",
    "PermuteBackward0", "SelectBackward0", "SliceBackward0", "NegBackward0", *(f"SqueezeBackward{k}" for k in range(6)),
}
_UNARY = _PICKING | {
    "DiagonalBackward0", "TrilBackward0", "TriuBackward0",
    "SumBackward0", "SumBackward1", "MeanBackward0", "MeanBackward1", "LinalgVectorNormBackward0", "TraceBackward0",
    "AccumulateGrad", "VarBackward0", "StdBackward0", "ProdBackward0", "LogsumexpBackward0", "SoftmaxBackward0",
    "LogSoftmaxBackward0", "ViewAsRealBackward0",
}
_SEVERAL = {
    "MmBackward0", "BmmBackward0", "MvBackward0", "DotBackward0", "StackBackward0", "CatBackward0", "AddmmBackward0",
}
_BATCH_NORMS = {"NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0"}
_OFFSETS = {"AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0", "WhereBackward0"}


@dataclass(frozen=True, slots=True)
class Share:
    """What one part's tape tells of one term of the loss.

    Args:
        size: entries of the block's residual; 0: the part has no rows of it.
        rows: of its outputs z, their first dimension.
        kind: "sum"; "mean"; "likely" (divided by a number that is that of the rows); "divided" (by one that may count rows or
            may not); "parameters" (of the parameters alone: counts once); "whole" (no sum over rows); "unknown".
        count: D, 1 for a sum.
        factor: product of all other numbers on the way, the same in all parts.
        why: of "whole" and "unknown".
        fixed: may it be one term that does not belong to the parts, parameters drawn to constants?
        normalised: do the weights of its entries sum to 1, or to their number?
        mark: a number that weights and masks of sums over rows leave, the same in all parts.
        loose: is there a weight of one row that may belong to the factor?
        operation: that it ends with.
        value: 1/2 ||r||^2, None where it was not asked for.
    """

    size: int
    rows: int
    kind: str
    count: float = 1.0
    factor: float = 1.0
    why: str = ""
    fixed: bool = False
    normalised: bool = False
    mark: float = 0.0
    loose: bool = False
    operation: str = ""
    value: float | None = None

    def valued(self, residual: torch.Tensor) -> Share:
        """With the value of this residual."""
        return replace(self, value=0.5 * float(residual.double().square().sum()))


def known_shares(tape: Tape, key: tuple) -> tuple[Share, ...] | None:
    """The shares of an earlier tape, of the same structure and with the same numbers; key: the edges of the results."""
    known = tape.structure.shares.get(key)
    if known is None:
        return None
    shares, ways, numbers = known
    same = ways == tape.structure.losses and all(
        _number_at(tape.nodes[position], name) == value for position, name, value in numbers
    )
    return shares if same else None


def _remember(tape: Tape, key: tuple, shares: tuple, seen: set[int]) -> None:
    numbers = [
        (position, name, _number_at(tape.nodes[position], name))
        for position in sorted(seen) if tape.leaf[position] < 0
        for name in dir(tape.nodes[position]) if name.startswith("_saved_")
    ]
    tape.structure.shares[key] = shares, dict(tape.structure.losses), numbers


def _number_at(node, name: str):
    """A saved number, or the shape of a saved tensor."""
    value = getattr(node, name)
    if not isinstance(value, torch.Tensor):
        return [t.shape if isinstance(t, torch.Tensor) else t for t in value] if isinstance(value, (tuple, list)) else value
    return (value.item(),) if value.dim() == 0 else value.shape


def shares_of(tape: Tape, key: tuple, form: Form, dtype: torch.dtype) -> tuple[Share, ...]:
    """The shares of a scalar loss's blocks."""
    tolerance = 1e-11 if dtype == torch.float64 else 2e-6
    found, passed, fixed, seen = [], set(), not form.entries, set(form.consumed)
    for block, route in zip(form.blocks, form.routes, strict=True):
        share, positions, same = _share(tape, block, route, tolerance, seen)
        found.append(share)
        passed |= positions
        fixed &= same
    beside = [steps for _, chain in form.penalty_routes for steps in unrolled(chain)]
    beside += [
        steps for share, route in zip(found, form.routes, strict=True) if share.kind == "parameters"
        for chain in route.chains for steps in unrolled(chain)
    ]
    steps = {step for steps in beside for step in steps if isinstance(step, int)}
    if passed & steps or any(_divisor(tape, step) in (s.rows, s.size) for step in steps for s in found if s.rows > 1):
        why = "what counts its rows may also divide a penalty of the parameters; divide what depends on rows alone"
        found = [
            replace(s, kind="unknown", why=why) if s.kind in ("mean", "likely", "divided") else s for s in found
        ]
    shares = tuple(found)
    if fixed:
        _remember(tape, key, shares, seen)
    return shares


def _divisor(tape: Tape, position: int) -> float:
    """What a node divides by, 0 where it divides by no number."""
    kind = tape.kind(position)
    if kind == "DivBackward1" or (kind == "DivBackward0" and is_scaling(tape, position)):
        other = tape.nodes[position]._saved_other
        return float(other) if not isinstance(other, torch.Tensor) or other.numel() == 1 else 0.0
    return 0.0


def residual_shares(tape: Tape, residuals: list[torch.Tensor], edges: tuple, dtype: torch.dtype) -> tuple[Share, ...]:
    """The shares of residual tensors, whose squares are summed."""
    tolerance = 1e-11 if dtype == torch.float64 else 2e-6
    found, seen = [], set()
    for r, edge in zip(residuals, edges, strict=True):
        below = closed(tape, (edge,), seen) if edge else ""
        share = Share(r.numel(), r.shape[0], "sum", fixed=below == "offsets", operation="residuals")
        if below == "parameters":
            share = replace(share, kind="parameters")
        elif edge and r.numel():
            reader = Rows(tape, edge, r.shape, tolerance, seen)
            state = _inner(tape, (edge,), reader, reader.start, seen)
            share = replace(share, rows=reader.rows, kind=state.kind, count=state.count, factor=state.factor)
        found.append(share)
    shares = tuple(found)
    _remember(tape, edges, shares, seen)
    return shares


def with_statistics(tape: Tape, shares: tuple[Share, ...]) -> tuple[Share, ...]:
    """The shares, of a tape whose batch norms may take their statistics over the rows of a part."""
    if _BATCH_NORMS.isdisjoint(tape.structure.kinds):
        return shares
    for position, kind in enumerate(tape.structure.kinds):
        if kind in _BATCH_NORMS and tape.active[position] and tape.nodes[position]._saved_training:
            if tape.nodes[position]._saved_input.shape[0] != 1:   # else one of instances
                why = "batch norm in training mode takes its mean and variance over the rows of a part; call model.eval()"
                return tuple([s if s.kind == "parameters" else replace(s, kind="whole", why=why) for s in shares])
    return shares


def _share(tape: Tape, block, route: Route, tolerance: float, seen: set[int]) -> tuple[Share, set[int], bool]:
    """(share, nodes that divide by numbers of rows, does it follow from numbers alone); seen: nodes that were looked at."""
    shape = tape.shape(*block.edges[0]) if len(block.edges) == 1 or block.handles else block.residual.shape
    ways = [steps for chain in route.chains for steps in unrolled(chain)]
    named = [step if isinstance(step, int) else max(step) for step in ways[0] if step != COUPLED]
    share = Share(block.residual.numel(), 0, "sum", operation=written(tape.name(named[-1])) if named else "")
    if not share.size:
        return share, set(), True
    below = closed(tape, block.edges, seen)
    coupled = any(COUPLED in steps for steps in ways)
    if below == "parameters" and not coupled:
        return replace(share, kind="parameters"), set(), True
    reader = Rows(tape, block.edges[0], shape, tolerance, seen)
    share = replace(share, rows=reader.rows, fixed=below == "offsets")
    try:
        if not len(shape) and not coupled:
            raise Unclear("it is a function of one number, to which all rows of a part contribute", True)
        states = [
            _inner(tape, block.edges, reader, reader.along(steps, block.edges), seen, block.squares) for steps in ways
        ]
        kind = kind_of_all(states)
        dim = transposed(tape, block.edges[0], seen) if len(shape) > 1 else 0
        if dim:
            other = Rows(tape, block.edges[0], shape, tolerance, seen, dim)
            for steps, state in zip(ways, states, strict=True):
                turned = other.along(steps, block.edges)
                if (turned.kind, turned.count, turned.factor) != (state.kind, state.count, state.factor):
                    raise Unclear("its outputs are transposed, so that their first dimension may not be that of rows")
    except Unclear as error:
        return replace(share, kind="whole" if error.whole else "unknown", why=str(error)), set(), reader.fixed
    first = states[0]
    weights, entries = float(first.weights.sum()), float(first.moments.reshape(3, -1)[0].sum())
    near = [1.0, shape.numel() / reader.rows] if first.kind == "sum" else [entries]
    normalised = first.weighted and any(abs(weights - n) <= tolerance * n for n in near)
    share = replace(
        share, kind=kind, count=first.count, factor=sum({s.factor for s in states}), normalised=normalised,
        mark=sum(s.mark for s in states), loose=any(s.loose for s in states),
    )
    return share, {p for s in states for p in s.passed}, reader.fixed


def _inner(tape: Tape, edges, reader: Rows, state: State, seen: set[int], squares: bool = True) -> State:
    """Numbers that multiply a block's outputs themselves; outside of squares they must be the same in all parts."""
    if len(edges) > 1:
        return state
    (position, _), c, divides = edges[0], 1.0, False
    while tape.leaf[position] < 0:
        seen.add(position)
        kind, node, inputs = tape.kind(position), tape.nodes[position], tape.edges[position]
        if kind in ("MulBackward1", "DivBackward1"):
            number = float(node._saved_other)
        elif is_scaling(tape, position):
            other = plain(node._saved_other if inputs[0] else node._saved_self).detach()
            if other.numel() != 1 or other.is_complex():
                break
            number = float(other)
        elif kind in _PICKING:
            number = 1.0
        else:
            break
        divides |= kind[0] == "D"
        c *= number if kind[0] == "M" else 1 / number if number else math.inf
        position = next(e for e in inputs if e)[0]
    if c == 1 and not divides:
        return state
    if not squares:
        if any(reader.number(position, reader.start, n, divides, multiples=False).kind != "sum" for n in (c, c * c)):
            raise Unclear("a number that may count rows divides its outputs within a function that is no square")
        state = state.like(state.moments, state.weights, state.axis)
        state.factor *= c
        return state
    state = reader.number(position, state, c * c, divides, multiples=False)
    state.kind = "divided" if state.kind == "likely" else state.kind
    return state


def closed(tape: Tape, edges, seen: set[int]) -> str:
    """Are quantities functions of parameters alone? "parameters"; "offsets" where constants are added or multiplied; or ""."""
    stack, met, found = [e[0] for e in edges if e], set(), "parameters"
    while stack:
        position = stack.pop()
        if position in met:
            continue
        met.add(position)
        seen.add(position)
        if tape.leaf[position] >= 0:
            continue
        kind, inputs = tape.kind(position), tape.edges[position]
        if kind in _UNARY:
            pass
        elif kind in _OFFSETS and not all(inputs):
            other = kind[:3] in ("Mul", "Div") and plain(
                tape.nodes[position]._saved_other if inputs[0] else tape.nodes[position]._saved_self
            )
            if other is False or other.numel() != 1:
                below = next((tape.shape(*e) for e in inputs if e), None)
                if below != tape.shape(position):   # a parameter that was repeated for every row
                    return ""
                found = "offsets"
        elif not (kind in _SEVERAL or is_elementwise(kind)) or not all(inputs):
            return ""
        stack += [e[0] for e in inputs if e]
    return found
