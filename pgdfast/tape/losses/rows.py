"""What the nodes above a block of a loss do with its rows: which means are over rows, and what they divide by.

Every row of a block's outputs z carries a number. These are pushed up the tape, exactly, by what is linear in each node: the
moments of a quantity's number tell whether it depends on one row, on some, or on all. Rows are the first dimension of z.
"""

from __future__ import annotations

import math

import torch

from ..rules import RULES
from ..rules.table import plain, signed
from .linear import LINEAR, READERS, Walk

_NOT_ELEMENTWISE = {"TrilBackward0", "TriuBackward0", "GluBackward0"}
_ALSO_ELEMENTWISE = {"LogaddexpBackward0", "XlogyBackward0", "XlogyBackward1", "XlogyBackward2", "FloorBackward0", "ConjBackward0"}
_SAME = {"AddBackward1", "SubBackward1", "CloneBackward0", "AliasBackward0", "ToCopyBackward0", "NegBackward0"}
_SUMS = {"SumBackward0", "SumBackward1", "NansumBackward0"}
_MEANS = {"MeanBackward0", "MeanBackward1"}
_VIEWS = {
    "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0",
    *(f"SqueezeBackward{k}" for k in range(6)),
}
_LOSSES = {
    "MseLossBackward0", "HuberLossBackward0", "SmoothL1LossBackward0", "BinaryCrossEntropyWithLogitsBackward0",
    "BinaryCrossEntropyBackward0", "SoftMarginLossBackward0",
}
_PRODUCTS = {"MmBackward0", "BmmBackward0", "MvBackward0", "AddmmBackward0", "DotBackward0", "VdotBackward0"}
_OVER_A_DIMENSION = {"LogSoftmaxBackward0", "SoftmaxBackward0"}
_REDUCING = {"LogsumexpBackward0", "LinalgVectorNormBackward0", "VarBackward0", "StdBackward0"}
_LARGEST_LABEL = 1021   # labels and their squares are exact in float32


class Unclear(Exception):
    """Why the loss on all rows cannot be told from that on a part. whole: it is known to be no sum over rows."""

    def __init__(self, why: str, whole: bool = False):
        super().__init__(why)
        self.whole = whole


class State:
    """A quantity on the tape as a function of a block's outputs.

    moments: (3, *shape), of the labels of the rows in each entry. weights: what stands at each entry times the quantity
    before all numbers and means. kind, count, factor: as in shares.Share. axis: where there is one row alone, the dimension
    of rows, None where they were summed, -1 where that is not known. weighted: by tensors that are no masks or counts.
    """

    __slots__ = ("axis", "count", "factor", "kind", "moments", "passed", "shape", "weighted", "weights")

    def __init__(self, shape, labels: torch.Tensor):
        self.shape = torch.Size(shape)
        per_row = labels.reshape(-1, *[1] * (len(shape) - 1)) if len(shape) else labels[0]
        self.moments = torch.stack([(per_row**k).expand(self.shape) for k in range(3)])
        self.weights = torch.ones(self.shape, dtype=torch.float64)
        self.kind, self.count, self.factor, self.axis, self.weighted = "sum", 1.0, 1.0, 0 if len(shape) else None, False
        self.passed: list[int] = []   # positions that divide by a number of rows

    def like(self, moments: torch.Tensor, weights: torch.Tensor, axis) -> State:
        """The same normalisation with other entries."""
        new = object.__new__(State)
        new.moments, new.weights, new.axis, new.shape = moments, weights, axis, moments.shape[1:]
        new.kind, new.count, new.factor, new.weighted = self.kind, self.count, self.factor, self.weighted
        new.passed = self.passed
        return new

    def total(self) -> torch.Tensor:
        """(3,), of all entries."""
        return self.moments.reshape(3, -1).sum(1)

    @property
    def one_row(self) -> bool:
        """Does all depend on one and the same row?"""
        return _single(self.total())

    def single(self) -> bool:
        """Does every entry depend on one row alone?"""
        return _single(self.moments)

    def over_all(self) -> bool:
        """Does every entry depend on all rows alike?"""
        total, m = self.total().reshape(3, *[1] * len(self.shape)), self.moments
        gap = (m[1:] * total[0] - total[1:] * m[0]).abs()
        return bool((gap <= 1e-5 * total[1:] * m[0]).all())


def _single(m: torch.Tensor) -> bool:
    return bool(((m[0] * m[2] - m[1] ** 2).abs() <= 1e-5 * m[0] * m[2]).all())


def labels_of(rows: int) -> torch.Tensor:
    """Numbers of rows that a sum of some cannot hide among."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    return 1.0 + (order % _LARGEST_LABEL).double()


class Rows:
    """Pushes states up a tape. fixed: may the same be said of any tape of this structure with these numbers?"""

    def __init__(self, tape, rows: int, entries: int, tolerance: float):
        self.tape, self.rows, self.entries, self.tolerance = tape, rows, entries, tolerance
        self.fixed = True
        self._squared: set[int] = set()   # nodes that square a norm, whose root they take back

    # --- along a chain ----------------------------------------------------------------------------------------------------

    def along(self, steps: tuple, edges, state: State) -> State:
        """The state at the loss. steps: see blocks.Route. Raises: Unclear."""
        states = dict.fromkeys(edges, state)
        for place in range(len(steps) - 1, -1, -1):
            step = steps[place]
            if step == "coupled":
                raise Unclear("its weight depends on other terms of the loss, or on a quantity that is learned", True)
            if isinstance(step, int):
                above = steps[place - 1] if place else None
                states = {(step, 0): self.up(step, states, above if isinstance(above, int) else None)}
                continue
            for position in sorted(step):
                if any(e in states for e in self.tape.edges[position]):
                    states[position, 0] = self.up(position, states)
            states = {(max(step), 0): states[max(step), 0]}
        (state,) = states.values()
        return state

    def up(self, position: int, states: dict, above: int | None = None) -> State:
        """The state of a node's output; above: the node that it goes to next."""
        tape, kind = self.tape, self.tape.kind(position).removesuffix("_copy")
        inputs = {k: states[e] for k, e in enumerate(tape.edges[position]) if e in states}
        shape = tape.shape(position)
        if position in self._squared:   # takes back the root below it
            return self._broadcast(next(iter(inputs.values())), shape)
        if len(inputs) == 1:
            ((k, state),) = inputs.items()
            if kind in _MEANS:
                return self.mean(position, state)
            if kind in _SUMS:
                return self._sum(position, state)
            if kind in ("MulBackward1", "DivBackward1"):
                number = float(self._field(position, "_saved_other"))
                return self.number(position, state, number if kind[0] == "M" else 1 / number if number else math.inf, kind[0] == "D")
            if kind in ("MulBackward0", "DivBackward0") and sum(map(bool, tape.edges[position])) == 1 and (kind[0] == "M" or k == 0):
                return self._weighted(position, k, state)
            if kind in ("AddBackward0", "SubBackward0", "RsubBackward1"):
                state = self._broadcast(state, shape)
                alpha = float(self._field(position, "_saved_alpha")) if (k == 1) != (kind[0] == "R") else 1.0
                return self.number(position, state, alpha, False)
            if kind in _SAME:
                return self._broadcast(state, shape)
            if kind in _VIEWS:
                return self._view(state, shape)
            if kind == "NllLossBackward0" or kind == "NllLoss2DBackward0":
                return self._nll(position, state)
            if kind == "LinalgVectorNormBackward0" and self._takes_back(position, above):
                self._squared.add(above)
                return self._sum(position, state)
            if kind in LINEAR and kind not in ("DotBackward0", "MulBackward0", "DivBackward0"):
                return self._pushed(position, k, state)
        if not inputs:
            raise Unclear(f"{kind} stands between")
        if kind in ("AddBackward0", "SubBackward0", "StackBackward0", "CatBackward0", "WhereBackward0"):
            return self._joined(position, inputs)
        return self._nonlinear(position, kind, inputs)

    def _field(self, position: int, name: str):
        return getattr(self.tape.nodes[position], name)

    def _takes_back(self, position: int, above: int | None) -> bool:
        if above is None or self._field(position, "_saved_ord") != 2:
            return False
        kind = self.tape.kind(above)
        return (kind == "PowBackward0" and self._field(above, "_saved_exponent") == 2) or (
            kind == "MulBackward0" and all(self.tape.edges[above])
        )

    # --- numbers ----------------------------------------------------------------------------------------------------------

    def number(self, position: int, state: State, c: float, divides: bool) -> State:
        """A quantity times a number, which may be one over a number of rows."""
        new = state.like(state.moments, state.weights, state.axis)
        if c == 0 or abs(c) == 1 or not math.isfinite(c):
            new.factor *= c
            return new
        d = 1 / abs(c)
        weights = float(state.weights.sum().abs())
        counted = self._is(d, weights) or self._is(d, weights * self.rows / self.entries)
        plainly = self._is(d, self.rows) or self._is(d, self.entries)
        exact = plainly or counted or self._is(d, float(state.total()[0]))
        sure = counted and not plainly
        multiple = self.rows > 1 and d > 1 and self._is(d / self.rows, round(d / self.rows))
        back = state.kind != "sum" and abs(c) > 1 and any(self._is(abs(c), n) for n in (self.rows, self.entries, state.count))
        if back or exact or multiple:
            mean = exact and state.kind == "sum" and (sure or (divides and d > 2.5))
            new.kind, new.count = "mean" if mean else "divided", state.count * d
            new.factor *= math.copysign(1, c)
            new.passed = [*state.passed, position]
        else:
            new.factor *= c
        return new

    def _is(self, a: float, b: float) -> bool:
        return b > 0 and abs(a - b) <= self.tolerance * b

    def _weighted(self, position: int, k: int, state: State) -> State:
        """A quantity times, or over, a constant."""
        divides = self.tape.kind(position)[0] == "D"
        other = self._field(position, "_saved_self" if k == 1 else "_saved_other")
        other = plain(other).detach()
        state = self._broadcast(state, self.tape.shape(position))
        if other.numel() > 1:
            self.fixed = False
            if bool((other == other.reshape(-1)[0]).all()):
                other = other.reshape(-1)[0]
        if other.numel() == 1:
            c = other.reshape(())
            c = float(c.real if c.is_complex() else c)
            return self.number(position, state, (1 / c if c else math.inf) if divides else c, divides)
        other = (other.abs() if other.is_complex() else other).double().cpu()
        other = 1 / other if divides else other
        new = state.like(state.moments, state.weights * other, state.axis)
        new.weighted = state.weighted or not bool((other == other.round()).all())
        return new

    def mean(self, position: int, state: State) -> State:
        """The mean over some dimensions."""
        count = state.shape.numel() / max(self.tape.shape(position).numel(), 1)
        return self._mean(position, state, self._sum(position, state), count)

    def _mean(self, position: int, state: State, new: State, count: float) -> State:
        how = self._reduction(position, state, new)
        if how == "within":
            new.factor /= count
            return new
        new.passed = [*state.passed, position]
        new.kind = "mean" if how == "over" and state.kind == "sum" else "divided"
        new.count = state.count * count
        return new

    def _reduction(self, position: int, state: State, new: State) -> str:
        """How a reduction takes rows together: within rows, over all of them, or in "parts"."""
        if self.rows == 1:
            if new.axis == -1:
                raise Unclear(f"this part has one row, for which {self.tape.name(position)} does not tell what it is over")
            return "within" if state.axis is None or new.axis is not None else "over"
        if state.one_row:
            raise Unclear("it picks one row by its place")
        if state.over_all() and not state.single():
            return "within"
        if not state.single():
            return "parts"
        return "within" if new.single() else "over" if new.over_all() else "parts"

    def _nll(self, position: int, state: State) -> State:
        dim = min(1, len(state.shape) - 1)
        new = state.like(state.moments.sum(dim + 1), state.weights.sum(dim), None if dim == 0 else state.axis)
        reduction = self._field(position, "_saved_reduction")
        if reduction == 0:
            return new
        total = new.like(_total(new.moments, 3), new.weights.sum(), None)
        if reduction == 1:
            total.kind, total.count = "mean", float(self._field(position, "_saved_total_weight"))
            total.passed = [*state.passed, position]
        return total

    # --- linear operations ------------------------------------------------------------------------------------------------

    def _sum(self, position: int, state: State) -> State:
        dims = getattr(self.tape.nodes[position], "_saved_dim", None)
        keep = dims is not None and bool(self._field(position, "_saved_keepdim"))
        return self._over(state, dims, keep, self.tape.shape(position))

    def _over(self, state: State, dims, keep: bool, shape) -> State:
        n = len(state.shape)
        dims = sorted({d % n for d in map(signed, dims or range(n))}) if n else []
        moments = state.moments.sum([d + 1 for d in dims], keep) if dims else state.moments
        weights = state.weights.sum(dims, keep) if dims else state.weights
        axis = state.axis
        if axis is not None:
            axis = None if axis in dims or len(dims) == n else axis if axis == -1 or keep else axis - sum(d < axis for d in dims)
        return state.like(moments.reshape(3, *shape), weights.reshape(shape), axis)

    def _broadcast(self, state: State, shape) -> State:
        if state.shape == shape:
            return state
        added = len(shape) - len(state.shape)
        moments = state.moments.reshape(3, *[1] * added, *state.shape).expand(3, *shape)
        axis = state.axis if state.axis in (None, -1) else state.axis + added
        return state.like(moments, state.weights.expand(shape), axis)

    @staticmethod
    def _view(state: State, shape) -> State:
        axis = state.axis
        if axis not in (None, -1) and tuple(shape[: axis + 1]) != tuple(state.shape[: axis + 1]):
            axis = 0 if axis == 0 and len(shape) == 1 else -1
        return state.like(state.moments.reshape(3, *shape), state.weights.reshape(shape), axis)

    def _pushed(self, position: int, k: int, state: State) -> State:
        """Through any other linear operation: what the transpose of its backward does."""
        tape, node, edges = self.tape, self.tape.nodes[position], self.tape.edges[position]
        if any(isinstance(t, torch.Tensor) and t.numel() > 1 for t in _saved(node)):
            self.fixed = False
        metadata = node._input_metadata[0]
        with torch.enable_grad():
            v = torch.zeros(tape.shape(position), dtype=metadata.dtype, device=metadata.device, requires_grad=True)
            pulled = READERS[tape.kind(position)](Walk(tape, True), position, node, edges, v)
            found = [w for *edge, w in pulled if tuple(edge) == edges[k]]
        if not found or not all(isinstance(w, torch.Tensor) and w.requires_grad for w in found):
            raise Unclear(f"{tape.name(position)} does not tell what it does with rows")
        total = sum(found[1:], start=found[0])

        def push(x):
            (out,) = torch.autograd.grad(total, v, x.to(total).expand_as(total), retain_graph=True)
            return (out.real if out.is_complex() else out).double().cpu()

        moments, weights = torch.stack([push(m) for m in state.moments]), push(state.weights)
        new = state.like(moments, weights, self._moved(position, state))
        if tape.kind(position).startswith(("Slice", "Select")) and self.rows > 1:
            before, after = state.total(), new.total()
            if bool(after[0] > 0) and bool(((after[1:] * before[0] - before[1:] * after[0]).abs() > 1e-5 * before[1:] * after[0]).any()):
                raise Unclear("it picks rows by their place")
        return new

    def _moved(self, position: int, state: State):
        """The dimension of rows after a linear operation."""
        kind, axis = self.tape.kind(position), state.axis
        if axis in (None, -1):
            return axis
        if kind == "TBackward0":
            return len(state.shape) - 1 - axis if len(state.shape) > 1 else axis
        if kind == "PermuteBackward0":
            return [signed(d) % len(state.shape) for d in self._field(position, "_saved_dims")].index(axis)
        if kind == "TransposeBackward0":
            pair = [signed(self._field(position, f"_saved_dim{k}")) % len(state.shape) for k in (0, 1)]
            return pair[1 - pair.index(axis)] if axis in pair else axis
        if kind == "SelectBackward0":
            dim = signed(self._field(position, "_saved_dim")) % len(state.shape)
            return -1 if dim == axis else axis - (dim < axis)
        return axis if self.tape.shape(position) == state.shape else -1

    # --- other operations -------------------------------------------------------------------------------------------------

    def _joined(self, position: int, inputs: dict) -> State:
        """A sum, or a choice, of several quantities."""
        parts = list(inputs.values())
        first = parts[0]
        if any((s.kind, s.count) != (first.kind, first.count) for s in parts):
            raise Unclear("it adds up a sum and a mean, or means over different numbers, of one quantity")
        if self.tape.kind(position)[0] in "AS" and self.tape.kind(position)[1] in "du":   # Add, Sub
            pushed = [self._broadcast(s, self.tape.shape(position)) for s in parts]
        elif self.tape.kind(position)[0] == "W":
            self.fixed = False
            pushed = [self._broadcast(s, self.tape.shape(position)) for s in parts]
        else:
            pushed = [self._pushed(position, k, s) for k, s in inputs.items()]
        new = pushed[0].like(sum(s.moments for s in pushed), sum(s.weights for s in pushed), pushed[0].axis)
        factors = {s.factor for s in parts}
        new.factor, new.weighted = sum(factors), any(s.weighted for s in parts)
        new.passed = [p for s in parts for p in s.passed]
        return new

    def _nonlinear(self, position: int, kind: str, inputs: dict) -> State:
        shape = self.tape.shape(position)
        if kind in _LOSSES:
            state = self._flat(position, inputs, torch.broadcast_shapes(*[s.shape for s in inputs.values()]))
            reduction = self._field(position, "_saved_reduction")
            if reduction == 0:
                return state
            total = state.like(_total(state.moments, 3), state.weights.sum(), None)
            return self._mean(position, state, total, state.shape.numel()) if reduction == 1 else total
        if kind in _PRODUCTS:
            return self._product(position, kind, inputs, shape)
        if kind in _OVER_A_DIMENSION:
            state = self._flat(position, inputs, shape)
            dim = (signed(self._field(position, "_saved_dim")),)
            return self._broadcast_back(self._group(position, state, dim, True), shape)
        if kind in _REDUCING:
            state = self._flat(position, inputs, next(iter(inputs.values())).shape)
            keep = bool(getattr(self.tape.nodes[position], "_saved_keepdim", False))
            if kind.startswith("Linalg") and self._field(position, "_saved_ord") == 1:
                return self._over(state, self._field(position, "_saved_dim"), keep, shape)
            return self._group(position, state, self._field(position, "_saved_dim"), keep, shape)
        if kind == "DistBackward0":
            state = self._flat(position, inputs, torch.broadcast_shapes(*[s.shape for s in inputs.values()]))
            return self._group(position, state, None, False, shape)
        found = RULES.get(kind)
        elementwise = kind in _ALSO_ELEMENTWISE or (
            found is not None and found.apply.__module__.endswith(".elementwise") and kind not in _NOT_ELEMENTWISE
        )
        if not elementwise:
            raise Unclear(f"{self.tape.name(position)} does not tell what it does with rows")
        return self._flat(position, inputs, shape)

    def _broadcast_back(self, state: State, shape) -> State:
        return state.like(state.moments.expand(3, *shape), state.weights.expand(shape), state.axis)

    def _flat(self, position: int, inputs: dict, shape) -> State:
        """The state of a function of each entry, which may not be one of several rows."""
        for state in inputs.values():
            if state.axis is None if self.rows == 1 else not state.single():
                raise Unclear(
                    f"{self.tape.name(position)} is applied to what was summed over rows, so that it is no sum over rows", True
                )
            if self.rows == 1 and state.axis == -1:
                raise Unclear(f"this part has one row, for which {self.tape.name(position)} does not tell what it is applied to")
        pushed = [self._broadcast(s, shape) for s in inputs.values()]
        new = pushed[0].like(sum(s.moments for s in pushed), torch.ones(shape, dtype=torch.float64), pushed[0].axis)
        if not (new.single() or self.rows == 1):
            raise Unclear(f"{self.tape.name(position)} takes different rows together", True)
        new.kind, new.count, new.factor = "sum", 1.0, math.prod(s.factor / s.count for s in pushed)
        return new

    def _group(self, position: int, state: State, dims, keep: bool, shape=None) -> State:
        """Of a function of several entries, which may not be of several rows."""
        n = len(state.shape)
        dims = sorted({d % n for d in map(signed, dims or range(n))}) if n else []
        if shape is None:
            shape = [1 if d in dims else size for d, size in enumerate(state.shape)]
        new = self._over(state, dims, keep, shape)
        if (self.rows == 1 and new.axis is None and state.axis is not None) or not new.single():
            raise Unclear(f"{self.tape.name(position)} takes all rows together, and is no sum over rows", True)
        new.weights = torch.ones(new.shape, dtype=torch.float64)
        return new

    def _product(self, position: int, kind: str, inputs: dict, shape) -> State:
        """Products of matrices, of one quantity with a constant or of two with each other."""
        edges = self.tape.edges[position]
        used = {k: s for k, s in inputs.items() if not (kind == "AddmmBackward0" and k == 0)}
        for state in used.values():
            if not (self.rows == 1 or state.single()):
                raise Unclear(f"{self.tape.name(position)} is applied to what was summed over rows", True)
        if shape.numel() == 1:   # r^T r
            state = next(iter(used.values()))
            new = state.like(_total(state.moments, 3).reshape(3, *shape), state.weights.sum().reshape(shape), None)
            if len(used) == 1 and sum(map(bool, edges)) == 1:
                raise Unclear(f"{self.tape.name(position)} does not tell what it does with rows")
            return new
        if self.rows == 1:
            raise Unclear(f"this part has one row, for which {self.tape.name(position)} does not tell what it is over")
        moments = 0.0
        for k, state in used.items():
            first = k == (1 if kind == "AddmmBackward0" else 0)
            if first:
                summed = state.moments.sum(-1, keepdim=len(shape) == len(state.shape))
            else:
                summed = state.moments.sum(-2 if len(state.shape) > 1 else -1, keepdim=len(shape) == len(state.shape))
            moments = moments + summed.expand(3, *shape)
        first = next(iter(used.values()))
        new = first.like(moments, torch.ones(shape, dtype=torch.float64), -1)
        if not new.single():
            raise Unclear(f"{self.tape.name(position)} takes different rows together", True)
        return new


def _saved(node):
    return (getattr(node, name) for name in dir(node) if name.startswith("_saved_"))


def _total(moments: torch.Tensor, n: int) -> torch.Tensor:
    return moments.reshape(n, -1).sum(1)
