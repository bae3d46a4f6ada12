"""How the terms of a loss on parts of its rows combine to those of the loss on all rows.

A term is S / D times constants: S a sum over rows, D what a mean divides by, 1 for a sum. On the rows of all parts it is
(S_1 + S_2 + ...) / (D_1 + D_2 + ...). What D is, the nodes between the loss and the block tell (rows.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..rules import RULES
from ..rules.table import plain
from ..walk import Tape
from .blocks import Form, Route, unrolled
from .rows import Rows, State, Unclear, labels_of

_UNARY = {
    "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0", "TBackward0", "TransposeBackward0",
    "PermuteBackward0", "SelectBackward0", "SliceBackward0", "DiagonalBackward0", "TrilBackward0", "TriuBackward0",
    "SumBackward0", "SumBackward1", "MeanBackward0", "MeanBackward1", "LinalgVectorNormBackward0", "TraceBackward0",
    "AccumulateGrad", "VarBackward0", "StdBackward0", "ProdBackward0", "LogsumexpBackward0", "SoftmaxBackward0",
    "LogSoftmaxBackward0", "ViewAsRealBackward0", *(f"SqueezeBackward{k}" for k in range(6)),
}
_SEVERAL = {
    "MmBackward0", "BmmBackward0", "MvBackward0", "DotBackward0", "StackBackward0", "CatBackward0", "AddmmBackward0",
}
_OFFSETS = {"AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0", "WhereBackward0"}


@dataclass(frozen=True, slots=True)
class Share:
    """What one part's tape tells of one term of the loss.

    size: entries of the block's residual; 0: the part has no rows of it. rows: of its outputs z, their first dimension.
    kind: "sum", "mean", "parameters" (of the parameters alone: it counts once), "divided" (by a number that may count rows or
    may not), "whole" (no sum over rows), "unknown". count: D, also of "divided". factor: product of all other numbers on the
    way, the same in all parts. why: of "whole" and "unknown". guess: what an "unknown" would be, "" where there is no guess.
    fixed: might the term be the same in every part, a constant that parameters are drawn to? normalised: do the term's
    weights sum to 1, or to its count? operation: that the term ends with. value: 1/2 ||r||^2, None where it was not asked for.
    """

    size: int
    rows: int
    kind: str
    count: float = 1.0
    factor: float = 1.0
    why: str = ""
    fixed: bool = False
    normalised: bool = False
    operation: str = ""
    value: float | None = None

    def valued(self, residual: torch.Tensor) -> Share:
        """With the value of this residual."""
        return replace(self, value=0.5 * float(residual.double().square().sum()))


def shares_of(tape: Tape, form: Form, dtype: torch.dtype) -> tuple[tuple[Share, ...], bool]:
    """The shares of a scalar loss's blocks, and whether they are the same for each tape of this structure and these numbers."""
    tolerance = 1e-11 if dtype == torch.float64 else 2e-6
    found, passed, fixed = [], set(), True
    for block, route in zip(form.blocks, form.routes, strict=True):
        share, positions, same = _share(tape, block, route, tolerance)
        found.append(share)
        passed |= positions
        fixed &= same
    beside = [steps for _, chain in form.penalty_routes for steps in unrolled(chain)]
    beside += [
        steps for share, route in zip(found, form.routes, strict=True) if share.kind == "parameters"
        for chain in route.chains for steps in unrolled(chain)
    ]
    if passed & {step for steps in beside for step in steps if isinstance(step, int)}:
        why = "what counts its rows also divides a penalty of the parameters; divide the data's part of the loss alone"
        found = [
            replace(s, kind="unknown", why=why) if s.kind in ("mean", "divided") else s for s in found
        ]
    return tuple(found), fixed


def residual_shares(tape: Tape, residuals: list[torch.Tensor], edges: list, dtype: torch.dtype) -> tuple[Share, ...]:
    """The shares of residual tensors, whose squares are summed."""
    tolerance = 1e-11 if dtype == torch.float64 else 2e-6
    found = []
    for r, edge in zip(residuals, edges, strict=True):
        rows, below = r.shape[0], closed(tape, (edge,)) if edge else ""
        share = Share(r.numel(), rows, "parameters" if below == "parameters" else "sum", fixed=below == "offsets", operation="residuals")
        if edge and r.numel() and share.kind == "sum":
            state = _inner(tape, (edge,), Rows(tape, rows, r.numel(), tolerance), State(r.shape, labels_of(rows)))
            share = replace(share, kind=state.kind, count=state.count, factor=state.factor)
        found.append(share)
    return tuple(found)


def _share(tape: Tape, block, route: Route, tolerance: float) -> tuple[Share, set[int], bool]:
    shape = tape.shape(*block.edges[0]) if len(block.edges) == 1 or block.handles else block.residual.shape
    size, rows = block.residual.numel(), shape[0] if len(shape) else 1
    ways = [steps for chain in route.chains for steps in unrolled(chain)]
    operation = next((tape.name(step if isinstance(step, int) else max(step)) for step in reversed(ways[0]) if step != "coupled"), "")
    share = Share(size, rows, "sum", operation=operation)
    if not size:
        return share, set(), True
    below = closed(tape, block.edges)
    coupled = any("coupled" in steps for steps in ways)
    if below == "parameters" and not coupled:
        return replace(share, kind="parameters"), set(), True
    share = replace(share, fixed=below == "offsets")
    reader = Rows(tape, rows, shape.numel(), tolerance)
    try:
        if not len(shape) and not coupled:
            raise Unclear("it is a function of one number, which all rows of a part share", True)
        start = State(shape, labels_of(rows))
        states = [_inner(tape, block.edges, reader, reader.along(steps, block.edges, start), block.squares) for steps in ways]
    except Unclear as error:
        return replace(share, kind="whole" if error.whole else "unknown", why=str(error)), set(), reader.fixed
    first = states[0]
    if any((s.kind, s.count) != (first.kind, first.count) for s in states):
        why = "it adds up a sum and a mean, or means over different numbers, of one quantity"
        return replace(share, kind="unknown", why=why), set(), reader.fixed
    weights, entries = float(first.weights.sum()), float(first.moments.reshape(3, -1)[0].sum())
    near = [1.0, shape.numel() / rows] if first.kind == "sum" else [entries]
    normalised = first.weighted and any(abs(weights - n) <= tolerance * n for n in near)
    share = replace(
        share, kind=first.kind, count=first.count, factor=sum({s.factor for s in states}), normalised=normalised
    )
    return share, {p for s in states for p in s.passed}, reader.fixed


def _inner(tape: Tape, edges, reader: Rows, state: State, squares: bool = True) -> State:
    """Numbers that multiply the outputs of squares themselves."""
    if not squares or len(edges) > 1:
        return state
    (position, _), c = edges[0], 1.0
    while tape.leaf[position] < 0:
        kind, node, inputs = tape.kind(position), tape.nodes[position], tape.edges[position]
        if kind in ("MulBackward1", "DivBackward1"):
            number = float(node._saved_other)
            c = c * number if kind[0] == "M" else c / number if number else c
        elif kind in ("MulBackward0", "DivBackward0") and sum(map(bool, inputs)) == 1 and (kind[0] == "M" or inputs[0]):
            other = plain(node._saved_other if inputs[0] else node._saved_self).detach()
            if other.numel() != 1 or other.is_complex():
                break
            c = c * float(other) if kind[0] == "M" else c / float(other) if float(other) else c
        elif kind not in _UNARY - {"AccumulateGrad"} or kind[:3] in ("Sum", "Mea", "Lin", "Var", "Std", "Pro", "Log", "Sof", "Tra"):
            break
        position = next(e for e in inputs if e)[0]
    return reader.number(position, state, c * c, False)


def closed(tape: Tape, edges) -> str:
    """Are quantities functions of parameters alone? "parameters"; "offsets" where constants are added or multiplied; or ""."""
    stack, met, found = [e[0] for e in edges if e], set(), "parameters"
    while stack:
        position = stack.pop()
        if position in met:
            continue
        met.add(position)
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
        elif not (kind in _SEVERAL or _elementwise(kind)) or not all(inputs):
            return ""
        stack += [e[0] for e in inputs if e]
    return found


def _elementwise(kind: str) -> bool:
    rule = RULES.get(kind)
    return rule is not None and rule.apply.__module__.endswith(".elementwise")
