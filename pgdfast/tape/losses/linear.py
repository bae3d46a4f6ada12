"""Walking down from the loss through linear operations with the weight, dL / d node output, a constant.

A reader is a function of (walk, position, node, edges, weight) that names the edges to go on with, each with its weight. One
for an operation that ends the walk, squares and cross-entropies, adds blocks to the form and names none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..rules.table import plain, signed
from ..walk import Tape
from .blocks import Form, Route, UnrecognizedLoss, looked_at
from .names import leads_nowhere

READERS: dict[str, Callable] = {}
LINEAR: set[str] = set()   # of those, which only pass the weight on


def reads(*nodes: str, linear: bool = False):
    """Register a reader for autograd nodes of these names."""

    def register(reader: Callable) -> Callable:
        for node in nodes:
            READERS[node] = reader
        LINEAR.update(nodes if linear else ())
        return reader

    return register


def is_linear(tape: Tape, position: int) -> bool:
    """Whether a node is linear in what depends on the parameters."""
    kind = tape.kind(position)
    if kind in ("MulBackward0", "DotBackward0", "DivBackward0"):
        factors = tape.edges[position]
        return not all(factors) and (kind != "DivBackward0" or factors[0] is not None)
    return kind in LINEAR


class Walk:
    """One walk down a tape, and the form that it has found. allow_sync: see scalar_form; chain: see Route, of where it is."""

    def __init__(self, tape: Tape, allow_sync: bool, chain=None):
        self.tape, self.allow_sync = tape, allow_sync
        self.form = Form()
        self.chain = chain
        self.log_softmax: dict[int, object] = {}   # the weight at each, which several terms may share
        self.to_log_softmax: dict[int, list] = {}  # the chains to each
        self.masked = False   # do weights of 0 hide numbers that are NaN?

    def read(self, root: int, output: int = 0, weight=1.0) -> Form:
        """The form of a node's output times a weight.

        Raises: UnrecognizedLoss.
        """
        stack, form = [(root, output, weight, self.chain)], self.form
        while stack:
            position, output, weight, above = stack.pop()
            reader = READERS.get(self.tape.kind(position))
            if reader is None:
                above = tuple(map(self.tape.name, sorted(self.form.consumed)))
                raise UnrecognizedLoss(leads_nowhere(self.tape.name(position), above))
            form.consumed.add(position)
            self.chain = chain = (above, position)
            following = reader(self, position, self.tape.nodes[position], self.tape.edges[position], weight)
            if following:
                stack.extend([(*step, chain) for step in reversed(following)])
            elif len(form.blocks) > len(form.routes):
                form.routes.append(Route((self.chain,), weight))
        return form

    def fit(self, edge, position: int, weight):
        """The weight of an input that was broadcast to the shape of the node at `position`."""
        target, source = self.tape.shape(position), self.tape.shape(*edge)
        if target == source:
            return weight
        if isinstance(weight, torch.Tensor):
            return weight.expand(target).sum_to_size(source)
        return weight * target.numel() / max(source.numel(), 1)

    def times(self, weight, factor: torch.Tensor):
        """A weight times a constant, or its conjugate where it is complex: as gradients are."""
        one = factor.numel() == 1 and looked_at(factor, self.allow_sync)
        if factor.is_complex():
            if not one or bool(factor.imag):
                return weight * factor.conj()
            factor = factor.real
        return weight * (float(factor) if one else factor)

    def spread(self, position: int, node, edge, weight):
        """The weight of a sum's terms: that of the sum, repeated."""
        if not isinstance(weight, torch.Tensor):
            return weight
        shape, weight = self.tape.shape(*edge), weight.expand(self.tape.shape(position))
        for d in sorted(d % max(len(shape), 1) for d in map(signed, getattr(node, "_saved_dim", None) or ())):
            if not node._saved_keepdim:
                weight = weight.unsqueeze(d)
        return weight.expand(shape)

    def dtype(self, position: int) -> torch.dtype:
        """Of a node's output."""
        return self.tape.nodes[position]._input_metadata[0].dtype

    def full(self, weight, position: int) -> torch.Tensor:
        """A weight as a tensor of the shape and dtype of a node's output."""
        device = self.tape.nodes[position]._input_metadata[0].device
        return torch.as_tensor(weight, dtype=self.dtype(position), device=device).expand(self.tape.shape(position))


@reads("AddBackward0", linear=True)
def add(walk, position, node, edges, weight):
    alphas = (1.0, float(node._saved_alpha))
    return [(*e, walk.fit(e, position, a * weight)) for e, a in zip(edges, alphas, strict=False) if e]


@reads("SubBackward0", linear=True)
def subtract(walk, position, node, edges, weight):
    alphas = (1.0, -float(node._saved_alpha))
    return [(*e, walk.fit(e, position, a * weight)) for e, a in zip(edges, alphas, strict=False) if e]


@reads("AddBackward1", "SubBackward1", "CloneBackward0", "AliasBackward0", "ToCopyBackward0", linear=True)
def same(walk, position, node, edges, weight):
    return [(*edges[0], weight)]


@reads("NegBackward0", linear=True)
def negate(walk, position, node, edges, weight):
    return [(*edges[0], -weight)]


@reads("RsubBackward1", linear=True)
def rsub(walk, position, node, edges, weight):
    return [(*edges[0], -float(node._saved_alpha) * weight)]


def scaled(walk, position, node, edges, weight):
    """A product with one constant factor."""
    k = 0 if edges[0] is not None else 1
    factor = plain(node._saved_other if k == 0 else node._saved_self).detach().to(walk.dtype(position))
    return [(*edges[k], walk.fit(edges[k], position, walk.times(weight, factor)))]


@reads("DivBackward0", linear=True)
def divide(walk, position, node, edges, weight):
    if edges[1] is not None:
        raise UnrecognizedLoss(
            "it divides by a quantity that depends on the parameters (detach() a denominator that only scales)"
        )
    # In float64: the tape keeps the number in `loss / 7` as a tensor whose reciprocal would be of default precision.
    divisor = plain(node._saved_other).detach()
    factor = (torch.ones_like(divisor, dtype=torch.float64) / divisor).to(walk.dtype(position))
    return [(*edges[0], walk.fit(edges[0], position, walk.times(weight, factor)))]


@reads("MulBackward1", linear=True)
def multiply_number(walk, position, node, edges, weight):
    return [(*edges[0], weight * float(node._saved_other))]


@reads("DivBackward1", linear=True)
def divide_number(walk, position, node, edges, weight):
    return [(*edges[0], weight / float(node._saved_other))]


@reads("SumBackward0", "SumBackward1", linear=True)
def total(walk, position, node, edges, weight):
    return [(*edges[0], walk.spread(position, node, edges[0], weight))]


@reads("MeanBackward0", "MeanBackward1", linear=True)
def mean(walk, position, node, edges, weight):
    count = walk.tape.shape(*edges[0]).numel() / max(walk.tape.shape(position).numel(), 1)
    return [(*edges[0], walk.spread(position, node, edges[0], weight / max(count, 1)))]


@reads("NansumBackward0", linear=True)
def sum_of_numbers(walk, position, node, edges, weight):
    """NaN counts for nothing."""
    walk.masked = True
    return pull(walk, position, node, edges, weight)


@reads(
    "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0",
    *(f"SqueezeBackward{k}" for k in range(6)), linear=True,
)
def reshape(walk, position, node, edges, weight):
    if isinstance(weight, torch.Tensor):
        weight = weight.expand(walk.tape.shape(position)).reshape(walk.tape.shape(*edges[0]))
    return [(*edges[0], weight)]


@reads("StackBackward0", linear=True)
def stack(walk, position, node, edges, weight):
    if isinstance(weight, torch.Tensor):
        parts = weight.expand(walk.tape.shape(position)).unbind(signed(node._saved_dim))
    else:
        parts = [weight] * len(edges)
    return [(*e, w) for e, w in zip(edges, parts, strict=True) if e]


@reads("CatBackward0", linear=True)
def cat(walk, position, node, edges, weight):
    if isinstance(weight, torch.Tensor):
        return pull(walk, position, node, edges, weight)
    return [(*e, weight) for e in edges if e]


@reads(
    "ExpandBackward0", "PermuteBackward0", "TransposeBackward0", "TBackward0", "SelectBackward0", "SliceBackward0",
    "DiagonalBackward0", "IndexBackward0", "IndexSelectBackward0", "GatherBackward0", "MaskedSelectBackward0",
    "MaskedFillBackward0", "WhereBackward0", "TraceBackward0", "CopySlices", "CopyBackwards", "IndexPutBackward0",
    "SliceScatterBackward0", "SelectScatterBackward0", "IndexCopyBackward0", "ScatterBackward0", "FlipBackward0",
    "RepeatBackward0", "ViewAsRealBackward0", "RealBackward0", linear=True,
)
def pull(walk, position, node, edges, weight):
    """Any other linear operation with one output: its own backward carries the weight."""
    pulled = node(walk.full(weight, position))
    pulled = pulled if isinstance(pulled, tuple) else (pulled,)
    # What was broadcast is summed by the engine, not by the node.
    return [
        (*e, w.sum_to_size(walk.tape.shape(*e))) for e, w in zip(edges, pulled, strict=False) if e and w is not None
    ]
