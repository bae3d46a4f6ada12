"""Reading the loss off the end of a tape: which outputs it is a convex function of, and their scaled residuals.

A loss becomes blocks, each a least-squares problem at the current point: a residual r and a factor S of the output
Hessian H = S S^T, such that the gradient is J^T r and the (generalized) Gauss-Newton matrix J^T J with J = S^T dF.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from .rules.table import plain
from .walk import Tape, describe

RECOGNISED = (
    "Return the residual tensor (or a tuple of them), or use one of: F.mse_loss, a sum or mean of squares, "
    "F.cross_entropy, F.binary_cross_entropy_with_logits, or a weighted sum of those with positive weights."
)


@dataclass(slots=True)
class Squares:
    """w ||a - b||^2 with w constant: r = sqrt(2w) (a - b), S = sqrt(2w).

    parts: where a and b were saved, as (position, field); empty for residuals that the closure returned.
    """

    edges: tuple
    residual: torch.Tensor
    scale: float | torch.Tensor
    parts: tuple = ()
    kind: str = "squares"

    def signature(self) -> tuple:
        """What decides the instructions that `apply` writes."""
        return self.kind, self.edges, self.residual.shape, describe(self.scale) if type(self.scale) is not float else None

    def apply(self, op) -> None:
        """Write S^T, from outputs to residual, with the verbs of `op`."""
        if op.needs[0]:
            op.scale(0, self.scale)
        if len(self.edges) > 1 and op.needs[1]:
            op.scale(1, -self.scale)


@dataclass(slots=True)
class Softmax:
    """-sum q log softmax(z) over `dim`, with weights q >= 0 and Q = sum q.

    The gradient Q p - q lies in the range of S = sqrt(Q) (diag(sqrt p) - p sqrt(p)^T), with
    r = (Q p - q) / (sqrt(Q) sqrt(p)) before it: finite wherever p is.
    """

    edges: tuple
    residual: torch.Tensor
    p: torch.Tensor
    root: torch.Tensor      # sqrt(Q p)
    dim: int
    kind: str = "softmax"

    def signature(self) -> tuple:
        """What decides the instructions that `apply` writes."""
        return self.kind, self.edges, describe(self.p), describe(self.root), self.dim

    def apply(self, op) -> None:
        """Write S^T, from outputs to residual, with the verbs of `op`."""
        shape = list(self.p.shape)
        if shape:
            shape[self.dim] = 1
        op.temporary("mean", shape)
        op.sum(0, (self.dim,) if shape else None, True, c=self.p, out="mean")
        op.scale(0, self.root)
        op.scale("mean", -self.root)


@dataclass(slots=True)
class Logistic:
    """Binary cross-entropy on logits: a diagonal output Hessian h, S = sqrt(h), r = gradient / sqrt(h)."""

    edges: tuple
    residual: torch.Tensor
    scale: torch.Tensor
    kind: str = "logistic"

    def signature(self) -> tuple:
        """What decides the instructions that `apply` writes."""
        return self.kind, self.edges, describe(self.scale)

    def apply(self, op) -> None:
        """Write S^T, from outputs to residual, with the verbs of `op`."""
        op.scale(0, self.scale)


@dataclass(slots=True)
class Form:
    """A loss as blocks, quadratic penalties (coefficient c of c/2 ||theta_l||^2 per parameter), and its nodes."""

    blocks: list = field(default_factory=list)
    penalties: dict[int, float] = field(default_factory=dict)
    consumed: set[int] = field(default_factory=set)

    @property
    def squares_only(self) -> bool:
        """True without cross-entropies."""
        return all(block.kind == "squares" for block in self.blocks)

    def reduces(self, tape: Tape) -> bool:
        """True where the loss sums over several numbers, or ends in an operation that is a loss by name."""
        return (
            any(block.residual.numel() > 1 for block in self.blocks)
            or any(number > 1 for number in self._penalized(tape))
            or any(tape.kind(position) in _LOSSES for position in self.consumed)
        )

    def _penalized(self, tape: Tape) -> list[int]:
        return [tape.shape(tape.leaf.index(leaf)).numel() for leaf in self.penalties]


class UnrecognizedLoss(ValueError):
    """A scalar that is neither squares nor a cross-entropy."""


def residual_form(residuals: list[torch.Tensor], edges: list) -> Form:
    """L = 1/2 sum ||r||^2 of residual tensors that the closure returned."""
    return Form([Squares((edge,), r.detach(), 1.0) for r, edge in zip(residuals, edges, strict=True)])


def scalar_form(tape: Tape, root: int, allow_sync: bool = True) -> Form:
    """The form of the scalar at a tape position.

    allow_sync: may this wait for a device? If not, numbers on one stay there, and signs of weights there are not looked at.
    Raises: UnrecognizedLoss naming the operation that fits none of the forms.
    """
    return _Reader(tape, allow_sync).read(root)


def _root_of(weight, allow_sync: bool):
    """sqrt(2 w) for a number or tensor."""
    if isinstance(weight, torch.Tensor):
        if _looked_at(weight, allow_sync) and bool((weight < 0).any()):
            raise UnrecognizedLoss("one of its squares has a negative weight, so it is no sum of squares")
        return torch.sqrt(2 * weight)
    if weight < 0:
        raise UnrecognizedLoss(f"one of its squares has the negative weight {weight:g}, so it is no sum of squares")
    return math.sqrt(2 * weight)


def _looked_at(t: torch.Tensor, allow_sync: bool) -> bool:
    """Whether entries may decide what is done."""
    return allow_sync or t.device.type == "cpu"


class _Reader:
    """Walks down from the loss with the weight (dL / d node output, constant) until a convex function is reached."""

    def __init__(self, tape: Tape, allow_sync: bool):
        self.tape, self.allow_sync = tape, allow_sync
        self.form = Form()
        self.log_softmax: dict[int, object] = {}

    def read(self, root: int) -> Form:
        stack = [(root, 0, 1.0)]
        while stack:
            position, output, weight = stack.pop()
            reader = _READERS.get(self.tape.kind(position))
            if reader is None:
                name = self.tape.name(position)
                raise UnrecognizedLoss(f"its operation {name} leads to no sum of squares and no cross-entropy")
            self.form.consumed.add(position)
            node, edges = self.tape.nodes[position], self.tape.edges[position]
            following = reader(self, position, node, edges, weight)
            if following:
                stack.extend(reversed(following))
        for position, q in self.log_softmax.items():
            self._softmax_block(position, q)
        return self.form

    # Linear operations: pass the weight on.

    def _fit(self, edge, position: int, weight):
        """The weight of an input that was broadcast to the shape of the node at `position`."""
        target, source = self.tape.shape(position), self.tape.shape(*edge)
        if target == source:
            return weight
        if isinstance(weight, torch.Tensor):
            return weight.expand(target).sum_to_size(source)
        return weight * target.numel() / max(source.numel(), 1)

    def add(self, position, node, edges, weight):
        alphas = (1.0, float(node._saved_alpha))
        return [(*e, self._fit(e, position, a * weight)) for e, a in zip(edges, alphas, strict=False) if e]

    def subtract(self, position, node, edges, weight):
        alphas = (1.0, -float(node._saved_alpha))
        return [(*e, self._fit(e, position, a * weight)) for e, a in zip(edges, alphas, strict=False) if e]

    def same(self, position, node, edges, weight):
        return [(*edges[0], weight)]

    def negate(self, position, node, edges, weight):
        return [(*edges[0], -weight)]

    def rsub(self, position, node, edges, weight):
        return [(*edges[0], -float(node._saved_alpha) * weight)]

    def multiply(self, position, node, edges, weight):
        if edges[0] is not None and edges[0] == edges[1]:
            return self._square(edges[0], position, weight)
        if edges[0] is not None and edges[1] is not None:
            raise UnrecognizedLoss("it multiplies two different quantities that both depend on the parameters")
        k = 0 if edges[0] is not None else 1
        factor = plain(node._saved_other if k == 0 else node._saved_self).detach().to(self._dtype(position))
        return [(*edges[k], self._fit(edges[k], position, self._times(weight, factor)))]

    def divide(self, position, node, edges, weight):
        if edges[1] is not None:
            raise UnrecognizedLoss("it divides by a quantity that depends on the parameters")
        # In float64: the tape keeps the number in `loss / 7` as a tensor whose reciprocal would be of default precision.
        divisor = plain(node._saved_other).detach()
        factor = (torch.ones_like(divisor, dtype=torch.float64) / divisor).to(self._dtype(position))
        return [(*edges[0], self._fit(edges[0], position, self._times(weight, factor)))]

    def _times(self, weight, factor: torch.Tensor):
        return weight * (float(factor) if factor.numel() == 1 and _looked_at(factor, self.allow_sync) else factor)

    def multiply_number(self, position, node, edges, weight):
        return [(*edges[0], weight * float(node._saved_other))]

    def divide_number(self, position, node, edges, weight):
        return [(*edges[0], weight / float(node._saved_other))]

    def total(self, position, node, edges, weight):
        return [(*edges[0], self._spread(position, node, edges[0], weight))]

    def mean(self, position, node, edges, weight):
        count = self.tape.shape(*edges[0]).numel() / max(self.tape.shape(position).numel(), 1)
        return [(*edges[0], self._spread(position, node, edges[0], weight / max(count, 1)))]

    def _spread(self, position, node, edge, weight):
        """The weight of a sum's terms: that of the sum, repeated."""
        if not isinstance(weight, torch.Tensor):
            return weight
        shape, weight = self.tape.shape(*edge), weight.expand(self.tape.shape(position))
        for d in sorted(d % max(len(shape), 1) for d in map(_signed, getattr(node, "_saved_dim", None) or ())):
            if not node._saved_keepdim:
                weight = weight.unsqueeze(d)
        return weight.expand(shape)

    def reshape(self, position, node, edges, weight):
        if isinstance(weight, torch.Tensor):
            weight = weight.expand(self.tape.shape(position)).reshape(self.tape.shape(*edges[0]))
        return [(*edges[0], weight)]

    def stack(self, position, node, edges, weight):
        dim = _signed(node._saved_dim)
        if isinstance(weight, torch.Tensor):
            parts = weight.expand(self.tape.shape(position)).unbind(dim)
        else:
            parts = [weight] * len(edges)
        return [(*e, w) for e, w in zip(edges, parts, strict=True) if e]

    def cat(self, position, node, edges, weight):
        if isinstance(weight, torch.Tensor):
            return self.pull(position, node, edges, weight)
        return [(*e, weight) for e in edges if e]

    def pull(self, position, node, edges, weight):
        """Any other linear operation with one output: its own backward carries the weight."""
        weight = torch.as_tensor(weight, dtype=self._dtype(position), device=node._input_metadata[0].device)
        pulled = node(weight.expand(self.tape.shape(position)))
        pulled = pulled if isinstance(pulled, tuple) else (pulled,)
        # What was broadcast is summed by the engine, not by the node.
        return [(*e, w.sum_to_size(self.tape.shape(*e))) for e, w in zip(edges, pulled, strict=False) if e]

    def _dtype(self, position: int) -> torch.dtype:
        return self.tape.nodes[position]._input_metadata[0].dtype

    # Convex functions: end the walk with a block.

    def _square(self, edge, saver: int, weight):
        """The squares of what stands at an edge; the node at `saver` saved it as its `self`."""
        position = edge[0]
        leaf = self.tape.leaf[position]
        if leaf >= 0 and not isinstance(weight, torch.Tensor):
            _root_of(weight, self.allow_sync)
            self.form.penalties[leaf] = self.form.penalties.get(leaf, 0.0) + 2 * weight
            return ()
        if self.tape.kind(position) == "LinalgVectorNormBackward0" and self.tape.nodes[position]._saved_ord == 2:
            node, below = self.tape.nodes[position], self.tape.edges[position][0]
            self.form.consumed.add(position)
            return self._square(below, position, self._spread(position, node, below, weight))
        scale = _root_of(weight, self.allow_sync)
        value = plain(self.tape.nodes[saver]._saved_self).detach()
        if value.is_complex():
            raise UnrecognizedLoss("one of its squares is of complex numbers; write torch.view_as_real(z).square() for |z|^2")
        self.form.blocks.append(Squares((edge,), value * scale, scale, ((saver, "_saved_self"),)))
        return ()

    def power(self, position, node, edges, weight):
        if node._saved_exponent != 2:
            raise UnrecognizedLoss(f"it raises a quantity to the power {node._saved_exponent:g}, not 2")
        return self._square(edges[0], position, weight)

    def product(self, position, node, edges, weight):
        """r^T r as a product of matrices, for one column r (or r r^T for one row)."""
        if all(edges) and self.tape.shape(position).numel() == 1 and self._same_but_for_transpose(*edges):
            return self._square(edges[0], position, weight)
        raise UnrecognizedLoss("it is a product of matrices, but not of one column's transpose with the column itself")

    def _same_but_for_transpose(self, a, b) -> bool:
        for one, other in ((a, b), (b, a)):
            if self.tape.kind(one[0]) in _TRANSPOSES and self.tape.edges[one[0]][0] == other:
                return True
        return False

    def dot(self, position, node, edges, weight):
        if edges[0] is not None and edges[0] == edges[1]:
            return self._square(edges[0], position, weight)
        if edges[0] is not None and edges[1] is not None:
            raise UnrecognizedLoss("it is a dot product of two different vectors that both depend on the parameters")
        return self.pull(position, node, edges, weight)

    def mse(self, position, node, edges, weight):
        a, b = plain(node._saved_self), plain(node._saved_target)
        if node._saved_reduction == 1:
            weight = weight / max(a.numel(), 1)
        scale = _root_of(weight, self.allow_sync)
        parts = (position, "_saved_self"), (position, "_saved_target")
        if edges[0] is None:
            self.form.blocks.append(Squares((edges[1],), (b - a).mul_(scale), scale, parts[::-1]))
        else:
            kept = edges if edges[1] is not None else edges[:1]
            self.form.blocks.append(Squares(kept, (a - b).mul_(scale), scale, parts))
        return ()

    def negative_log_likelihood(self, position, node, edges, weight):
        log_p, target, classes = node._saved_self.detach(), node._saved_target, node._saved_weight
        if node._saved_reduction == 1:
            total = node._saved_total_weight
            if _looked_at(total, self.allow_sync):
                total = float(total)
                weight = weight / total if total else 0.0   # no label counts: the loss itself is not a number
            else:
                weight = torch.where(total > 0, weight / total.double(), 0.0)
        kept = target != node._saved_ignore_index
        index = torch.where(kept, target, 0)
        each = torch.ones_like(index, dtype=log_p.dtype) if classes is None else classes.detach()[index]
        each = torch.where(kept, each, 0) * weight
        dim = min(1, log_p.dim() - 1)
        q = torch.zeros_like(log_p).scatter_(dim, index.unsqueeze(dim), each.unsqueeze(dim))
        return [(*edges[0], -q)]

    def log_of_softmax(self, position, node, edges, weight):
        self.log_softmax[position] = self.log_softmax.get(position, 0.0) - weight
        return ()

    def _softmax_block(self, position, q):
        node = self.tape.nodes[position]
        log_p = node._saved_result.detach()
        dim = _signed(node._saved_dim) % max(log_p.dim(), 1)
        p = torch.exp(log_p).clamp_min(_tiny(log_p.dtype))
        q = q.to(p.dtype).expand_as(p) if isinstance(q, torch.Tensor) else torch.full_like(p, q)
        if _looked_at(q, self.allow_sync) and bool((q < 0).any()):
            raise UnrecognizedLoss("its log_softmax enters with a positive sign; a cross-entropy has a negative one")
        total = q.sum(dim, keepdim=True)
        root = torch.sqrt(total * p)
        residual = torch.where(total > 0, (total * p - q) / root, 0.0).to(p.dtype)
        self.form.blocks.append(Softmax((self.tape.edges[position][0],), residual, p, root, dim))

    def binary_cross_entropy(self, position, node, edges, weight):
        z, t = node._saved_self.detach(), node._saved_target.detach()
        if edges[0] is None or (len(edges) > 1 and edges[1] is not None):
            raise UnrecognizedLoss("its binary cross-entropy has a target that depends on the parameters")
        if node._saved_reduction == 1:
            weight = weight / max(z.numel(), 1)
        if node._saved_weight is not None:
            weight = weight * node._saved_weight.detach()
        positive = 1.0 if node._saved_pos_weight is None else node._saved_pos_weight.detach()
        signed = [t for t in (torch.as_tensor(weight), torch.as_tensor(positive)) if _looked_at(t, self.allow_sync)]
        if any(torch.any(t < 0) for t in signed):
            raise UnrecognizedLoss("its binary cross-entropy has a negative weight")
        s = torch.sigmoid(z)
        # L = w (pos t softplus(-z) + (1 - t) softplus(z)), L' = w ((1 - t) s - pos t (1 - s))
        gradient = weight * ((1 - t) * s - positive * t * torch.sigmoid(-z))
        curvature = weight * (1 - t + positive * t) * s * torch.sigmoid(-z)
        root = torch.sqrt(curvature.clamp_min(_tiny(z.dtype)))
        dead = (curvature <= 0) & (gradient == 0)
        root = torch.where(dead, 0.0, root).to(z.dtype).expand_as(z).contiguous()
        residual = torch.where(dead, 0.0, gradient / root).to(z.dtype)
        self.form.blocks.append(Logistic((edges[0],), residual, root))
        return ()


def _tiny(dtype: torch.dtype) -> float:
    # Square roots of this and their reciprocals are still ordinary numbers.
    return 1e-300 if dtype == torch.float64 else 1e-30


def _signed(dim: int) -> int:
    return dim - (1 << 64) if dim >= 1 << 63 else dim


_LOSSES = {
    "MseLossBackward0", "NllLossBackward0", "NllLoss2DBackward0", "LogSoftmaxBackward0",
    "BinaryCrossEntropyWithLogitsBackward0",
}
_TRANSPOSES = {"TBackward0", "TransposeBackward0", "PermuteBackward0"}   # of a column or row there is one other form
_READERS = {
    "AddBackward0": _Reader.add,
    "SubBackward0": _Reader.subtract,
    "AddBackward1": _Reader.same,
    "SubBackward1": _Reader.same,
    "RsubBackward1": _Reader.rsub,
    "NegBackward0": _Reader.negate,
    "MulBackward0": _Reader.multiply,
    "MulBackward1": _Reader.multiply_number,
    "DivBackward0": _Reader.divide,
    "DivBackward1": _Reader.divide_number,
    "SumBackward0": _Reader.total,
    "SumBackward1": _Reader.total,
    "MeanBackward0": _Reader.mean,
    "MeanBackward1": _Reader.mean,
    "ViewBackward0": _Reader.reshape,
    "UnsafeViewBackward0": _Reader.reshape,
    "ReshapeAliasBackward0": _Reader.reshape,
    **{f"SqueezeBackward{k}": _Reader.reshape for k in range(6)},
    "UnsqueezeBackward0": _Reader.reshape,
    "CloneBackward0": _Reader.same,
    "AliasBackward0": _Reader.same,
    "ToCopyBackward0": _Reader.same,
    "StackBackward0": _Reader.stack,
    "CatBackward0": _Reader.cat,
    **dict.fromkeys(
        [
            "ExpandBackward0", "PermuteBackward0", "TransposeBackward0", "TBackward0", "SelectBackward0", "SliceBackward0",
            "DiagonalBackward0", "IndexBackward0", "IndexSelectBackward0", "GatherBackward0", "MaskedSelectBackward0",
            "MaskedFillBackward0", "WhereBackward0", "TraceBackward0",
        ],
        _Reader.pull,
    ),
    "PowBackward0": _Reader.power,
    "DotBackward0": _Reader.dot,
    "MmBackward0": _Reader.product,
    "MseLossBackward0": _Reader.mse,
    "NllLossBackward0": _Reader.negative_log_likelihood,
    "NllLoss2DBackward0": _Reader.negative_log_likelihood,
    "LogSoftmaxBackward0": _Reader.log_of_softmax,
    "BinaryCrossEntropyWithLogitsBackward0": _Reader.binary_cross_entropy,
}
