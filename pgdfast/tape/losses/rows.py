"""What the nodes above a block of a loss do with its rows: which means are over rows, and what they divide by.

Every row of a block's outputs z carries a number. These are pushed up the tape, exactly, by what is linear in each node: the
moments of a quantity's number tell whether it depends on one row, on some, or on all. Rows are the first dimension of z.
"""

from __future__ import annotations

import math

import torch

from ..rules.table import plain, signed
from .linear import LINEAR, READERS, Walk
from .names import written
from .outputs import VIEWS, is_elementwise, is_scaling, lengths, origin
from .states import State, Unclear, alike, kind_of_all, labels_of

_SAME = {"AddBackward1", "SubBackward1", "CloneBackward0", "AliasBackward0", "ToCopyBackward0", "NegBackward0"}
_SUMS = {"SumBackward0", "SumBackward1", "NansumBackward0"}
_MEANS = {"MeanBackward0", "MeanBackward1"}
_LOSSES = {
    "MseLossBackward0", "HuberLossBackward0", "SmoothL1LossBackward0", "BinaryCrossEntropyWithLogitsBackward0",
    "BinaryCrossEntropyBackward0", "SoftMarginLossBackward0",
}
_CHOOSING = {"WhereBackward0", "MaskedFillBackward0", "MaskedSelectBackward0", "IndexBackward0"}
_PRODUCTS = {"MmBackward0", "BmmBackward0", "MvBackward0", "AddmmBackward0", "DotBackward0", "VdotBackward0"}
_OVER_A_DIMENSION = {"LogSoftmaxBackward0", "SoftmaxBackward0"}
_REDUCING = {"LogsumexpBackward0", "LinalgVectorNormBackward0", "VarBackward0", "StdBackward0"}


class Rows:
    """Pushes states up a tape.

    start: the state of a block's outputs, of this shape, at an edge. rows: how many they have. turned: the dimension of rows,
    should they be the first one of what was transposed. tolerance: of numbers, relative. fixed: does the same hold for any
    tape of this structure with these numbers? seen: takes in the positions of nodes below the block that were looked at.
    """

    def __init__(self, tape, edge, shape, tolerance: float, seen: set[int], turned: int = 0):
        self.tape, self.tolerance, self.fixed = tape, tolerance, True
        base, dim = (shape, turned) if turned else origin(tape, edge, shape, seen)
        self.rows, self.entries = base[dim] if base else 1, shape.numel()
        # what a mean may divide by
        self._numbers = [self.rows, self.entries, *shape[:1], *lengths(tape, edge, seen)]
        labels = labels_of(self.rows).reshape([-1, *[1] * (len(base) - 1 - dim)] if base else []).expand(base)
        kept = base == shape or len(shape) == 1 or base[:1] == shape[:1]
        self.start = State(labels.reshape(shape), dim if kept else -1)
        self._totals: list[float] = []    # weights of a cross-entropy's labels: label smoothing divides by them, too
        self._squared: set[int] = set()   # nodes that square a norm, whose root they take back

    # --- along a chain ----------------------------------------------------------------------------------------------------

    def along(self, steps: tuple, edges) -> State:
        """The state at the loss. steps: see blocks.Route. Raises: Unclear."""
        states = dict.fromkeys(edges, self.start)
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
        if kind in _CHOOSING and any(s.kind in ("likely", "divided") for s in inputs.values()):
            raise Unclear(f"a number that may count rows divides what {self._written(position)} chooses from")
        if len(inputs) == 1:
            ((k, state),) = inputs.items()
            if kind in _MEANS:
                return self.mean(position, state)
            if kind in _SUMS:
                return self._sum(position, state)
            if kind in ("MulBackward1", "DivBackward1"):
                number = float(self._field(position, "_saved_other"))
                return self._scaled(position, state, number, kind[0] == "D")
            if kind in ("DotBackward0", "VdotBackward0") and not all(tape.edges[position]):
                return self._over(self._weighted(position, k, state), None, False, shape)
            if is_scaling(tape, position):
                return self._weighted(position, k, state)
            if kind in ("AddBackward0", "SubBackward0", "RsubBackward1"):
                state = self._broadcast(state, shape)
                alpha = float(self._field(position, "_saved_alpha")) if (k == 1) != (kind[0] == "R") else 1.0
                return state if alpha == 1 else self.number(position, state, alpha, False)
            if kind in _SAME:
                return self._broadcast(state, shape)
            if kind in VIEWS:
                return self._view(state, shape)
            if kind == "NllLossBackward0" or kind == "NllLoss2DBackward0":
                return self._nll(position, state)
            if kind == "LinalgVectorNormBackward0" and self._takes_back(position, above):
                self._squared.add(above)
                return self._sum(position, state)
            if kind in LINEAR and kind not in ("MulBackward0", "DivBackward0"):
                return self._pushed(position, k, state)
        if not inputs:
            raise Unclear(f"{kind} stands between")
        if kind in ("AddBackward0", "SubBackward0", "StackBackward0", "CatBackward0", "WhereBackward0"):
            return self._joined(position, inputs)
        return self._nonlinear(position, kind, inputs)

    def _written(self, position: int) -> str:
        return written(self.tape.name(position))

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

    def number(self, position: int, state: State, c: float, divides: bool, multiples: bool = True) -> State:
        """A quantity times a number, which may be one over a number of rows, or, of a mean, that number.

        multiples: may it be one over a multiple, too?
        """
        new = state.like(state.moments, state.weights, state.axis)
        d, kind = 1 / abs(c) if c and math.isfinite(c) else 0.0, None
        if d and state.kind == "sum":
            weights, entries = float(state.weights.sum().abs()), float(state.total()[0])
            plainly = self._among(d, [*self._numbers, entries])
            counted = self._among(d, [weights, weights * self.rows / self.entries])
            # by the sum of a mask of what was summed within rows, or that was repeated within them
            inner = (*state.within, *[self.start.shape[k:].numel() for k in range(1, len(self.start.shape))])
            counted |= any(self._among(d, [weights / k]) and not self._among(d, [entries / k]) for k in inner)
            if (counted and not plainly) or self._among(d, self._totals):
                kind = "mean"
            elif plainly and divides and (d > 2.5 or self.rows == 1):
                kind = "likely"
            elif plainly or (multiples and d > 1.5 and self._among(d / self.rows, [round(d / self.rows)])):
                kind = "divided"
        elif d and self._among(d if divides else 1 / d, [*self._numbers, state.count]) and abs(c) != 1:
            kind = "divided"
        if kind is None:
            new.factor *= c
            return new
        new.kind, new.count, new.passed = kind, state.count * d, [*state.passed, position]
        new.factor *= math.copysign(1, c)
        return new

    def _scaled(self, position: int, state: State, number: float, divides: bool) -> State:
        return self.number(position, state, (1 / number if number else math.inf) if divides else number, divides)

    def _among(self, a: float, numbers: list) -> bool:
        return any(b > 0 and abs(a - b) <= self.tolerance * b for b in numbers)

    def _weighted(self, position: int, k: int, state: State) -> State:
        """A quantity times, or over, a constant."""
        divides = self.tape.kind(position)[0] == "D"
        other = self._field(position, "_saved_self" if k == 1 else "_saved_other")
        other = plain(other).detach()
        state = self._broadcast(state, torch.broadcast_shapes(state.shape, other.shape))
        uniform = other.numel() > 0 and bool((other == other.reshape(-1)[0]).all())
        if uniform and (self.rows > 1 or not other.dim()):
            c = other.reshape(-1)[0]
            c = float(c.real if c.is_complex() else c)
            new = self._scaled(position, state, c, divides)
            if other.numel() == 1 or new.kind != state.kind:
                return new
        self.fixed = False
        other = (other.abs() if other.is_complex() else other).double().cpu()
        other = 1 / other if divides else other
        new = state.like(state.moments, state.weights * other, state.axis)
        self._mark(new, state, other.expand(new.shape))
        new.loose = state.loose or other.numel() == 1
        new.weighted = state.weighted or not bool((other == other.round()).all())
        return new

    def _mark(self, new: State, state: State, coefficients: torch.Tensor) -> None:
        """Note what stands at a sum over rows: it must be the same in all parts."""
        if coefficients.numel() > 1 and (state.axis is None if self.rows == 1 else not state.single()):
            new.mark = state.mark + _mark_of(coefficients)

    def _shared(self, position: int, name: str, dims: int) -> float:
        """The mark of weights that all rows share, which a node has saved: of classes, of positives."""
        weights = getattr(self.tape.nodes[position], name, None)
        if weights is None or weights.dim() >= dims and weights.shape[0] != 1:
            return 0.0
        self.fixed = False
        return _mark_of(plain(weights).detach().double().cpu())

    def mean(self, position: int, state: State) -> State:
        """The mean over some dimensions."""
        count = max(state.shape.numel(), 1) / max(self.tape.shape(position).numel(), 1)
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
        if self.rows == 1 or state.one_row:
            if new.axis == -1:
                raise Unclear(f"of one row {self._written(position)} does not tell what it is over")
            return "within" if state.axis is None or new.axis is not None else "over"
        if state.like_all(state.total()) and not state.single():
            return "within"
        if not state.single():
            return "parts"
        return "within" if new.single() else "over" if new.like_all(new.total()) else "parts"

    def _nll(self, position: int, state: State) -> State:
        dim = min(1, len(state.shape) - 1)
        new = state.like(state.moments.sum(dim + 1), state.weights.sum(dim), None if dim == 0 else state.axis)
        new.mark = state.mark + self._shared(position, "_saved_weight", 2)
        reduction = self._field(position, "_saved_reduction")
        if reduction == 0:
            return new
        total = new.like(_total(new.moments, 3), new.weights.sum(), None)
        if reduction == 1:
            total.kind, total.count = "mean", float(self._field(position, "_saved_total_weight"))
            total.passed = [*state.passed, position]
            self._totals.append(total.count)
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
            below = 0 if axis == -1 or keep else sum(d < axis for d in dims)
            axis = None if axis in dims or len(dims) == n else axis - below
        new = state.like(moments.reshape(3, *shape), weights.reshape(shape), axis)
        if 0 < new.weights.numel() < state.weights.numel() and new.single():
            new.within = (*state.within, (state.within or (1.0,))[-1] * state.weights.numel() / new.weights.numel())
        return new

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
            raise Unclear(f"{self._written(position)} does not tell what it does with rows")
        total = sum(found[1:], start=found[0])

        def push(x):
            (out,) = torch.autograd.grad(total, v, x.to(total).expand_as(total), retain_graph=True)
            return (out.real if out.is_complex() else out).double().cpu()

        moments, weights = torch.stack([push(m) for m in state.moments]), push(state.weights)
        new = state.like(moments, weights, self._moved(position, state))
        self._mark(new, state, moments[0] / moments[0].sum().clamp_min(1e-300))
        places = tape.kind(position) in ("SliceBackward0", "SelectBackward0")
        along = places and signed(node._saved_dim) % len(state.shape) == state.axis and new.shape != state.shape
        if along or (places and not alike(state.total(), new.total())):
            raise Unclear(
                "it picks rows by their place, which are others on all rows; pick them before they are squared, or by a mask"
            )
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
        name, shape = self.tape.kind(position), self.tape.shape(position)
        kind = kind_of_all(parts)
        if name in ("AddBackward0", "SubBackward0", "WhereBackward0"):
            self.fixed &= name != "WhereBackward0"
            pushed = [self._broadcast(s, shape) for s in parts]
            if name[0] == "W":
                chosen = plain(self._field(position, "_saved_condition")).double().cpu().expand(shape)
                self._mark(pushed[0], parts[0], chosen)
        else:
            pushed = [self._pushed(position, k, s) for k, s in inputs.items()]
        new = pushed[0].like(sum(s.moments for s in pushed), sum(s.weights for s in pushed), pushed[0].axis)
        factors = {s.factor for s in parts}
        new.kind, new.factor, new.weighted = kind, sum(factors), any(s.weighted for s in parts)
        new.passed = [p for s in parts for p in s.passed]
        return new

    def _nonlinear(self, position: int, kind: str, inputs: dict) -> State:
        shape = self.tape.shape(position)
        if kind in _LOSSES:
            state = self._flat(position, inputs, torch.broadcast_shapes(*[s.shape for s in inputs.values()]))
            state.mark += self._shared(position, "_saved_pos_weight", len(state.shape))
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
        if not is_elementwise(kind):
            raise Unclear(f"{self._written(position)} does not tell what it does with rows")
        return self._flat(position, inputs, shape)

    def _broadcast_back(self, state: State, shape) -> State:
        return state.like(state.moments.expand(3, *shape), state.weights.expand(shape), state.axis)

    def _flat(self, position: int, inputs: dict, shape) -> State:
        """The state of a function of each entry, which may not be one of several rows."""
        for state in inputs.values():
            if state.axis is None if self.rows == 1 else not state.single():
                raise Unclear(
                    f"{self._written(position)} is applied to a sum over rows", True
                )
            if self.rows == 1 and state.axis == -1:
                raise Unclear(f"of one row {self._written(position)} does not tell what it is applied to")
            if state.kind != "sum" and self._among(state.count, self._numbers):
                raise Unclear(f"a number that may count rows divides what {self._written(position)} is applied to")
        pushed = [self._broadcast(s, shape) for s in inputs.values()]
        new = pushed[0].like(sum(s.moments for s in pushed), torch.ones(shape, dtype=torch.float64), pushed[0].axis)
        if not (new.single() or self.rows == 1):
            raise Unclear(f"{self._written(position)} takes different rows together", True)
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
            raise Unclear(f"{self._written(position)} takes all rows together", True)
        new.weights = torch.ones(new.shape, dtype=torch.float64)
        return new

    def _product(self, position: int, kind: str, inputs: dict, shape) -> State:
        """Products of matrices, of one quantity with a constant or of two with each other."""
        edges = self.tape.edges[position]
        used = {k: s for k, s in inputs.items() if not (kind == "AddmmBackward0" and k == 0)}
        for state in used.values():
            if not (self.rows == 1 or state.single()):
                raise Unclear(f"{self._written(position)} is applied to a sum over rows", True)
        if shape.numel() == 1 and all(edges):   # r^T r
            state = next(iter(used.values()))
            return state.like(_total(state.moments, 3).reshape(3, *shape), state.weights.sum().reshape(shape), None)
        moments, axes = 0.0, set()
        for k, state in used.items():
            first = k == (1 if kind == "AddmmBackward0" else 0)
            contracted = len(state.shape) - (1 if first or len(state.shape) == 1 else 2)
            axes.add(-1 if state.axis == contracted or len(shape) != len(state.shape) and not first else state.axis)
            if first:
                summed = state.moments.sum(-1, keepdim=len(shape) == len(state.shape))
            else:
                summed = state.moments.sum(-2 if len(state.shape) > 1 else -1, keepdim=len(shape) == len(state.shape))
            moments = moments + summed.expand(3, *shape)
        first = next(iter(used.values()))
        new = first.like(moments, torch.ones(shape, dtype=torch.float64), axes.pop() if len(axes) == 1 else -1)
        if not new.single():
            raise Unclear(f"{self._written(position)} takes different rows together", True)
        return new


def _mark_of(coefficients: torch.Tensor) -> float:
    return float((coefficients.reshape(-1) * torch.arange(1.0, 1 + coefficients.numel()).sin()).sum())


def _saved(node):
    return (getattr(node, name) for name in dir(node) if name.startswith("_saved_"))


def _total(moments: torch.Tensor, n: int) -> torch.Tensor:
    return moments.reshape(n, -1).sum(1)
