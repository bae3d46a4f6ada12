"""Losses that are no squares or cross-entropies by name: any function of what the model computes that autograd differentiates.

A term of the loss is read by the first of these ways that serves it:

    walk       down linear operations to squares and cross-entropies (losses.py)
    cut        at one tensor z that all of the term depends on, and that the term folds at 0 (abs, an even power, ...)
    monotone   as phi' S for phi(S), where S is a term that can be read
    link       at a z that the term makes probabilities of (sigmoid, softmax, exp, ...)
    split      into its inputs, for a linear operation
    convex     at any z of which it is convex
    chosen     as a kink at 0 of a z that is not saved, by torch.where alone
    scale      as two losses, each times the other, or a loss times, or over, a quantity that is learned beside it

At a cut the rows are S r = dL/dz, S S^T = H with the Hessian H of the term with respect to z, made explicitly. A diagonal H
takes, where it is less than a thousandth of L'/z, that in its place (z measured from where it is folded).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from .losses import (
    TINY,
    Block,
    diagonal,
    is_linear,
    kind_of,
    operations,
    pulled,
    reweighted,
    varying_nodes,
    walked,
)

FOLDS = ("Abs", "Cosh", "Maximum", "Minimum", "Relu", "LeakyRelu", "L1Loss")
LINKS = ("Sigmoid", "Softmax", "LogSoftmax", "Logsumexp", "LogSigmoid", "Softplus", "Exp")
REDUCTIONS = (
    *("Sum", "Mean", "Nansum", "MseLoss", "NllLoss", "NllLoss2D", "LinalgVectorNorm", "Dot", "Var", "Dist", "Std"),
    *("BinaryCrossEntropyWithLogits", "HuberLoss", "SmoothL1Loss", "BinaryCrossEntropy", "SoftMarginLoss"),
)
UNARY = (
    *("Exp", "Log", "Neg", "Mul", "Div", "Add", "Sub", "Rsub", "Pow", "Clone", "View", "Select", "Slice", "Softplus", "Sqrt"),
    *("Unsqueeze", "Squeeze", "Expand", "Permute", "Transpose", "T", "ToCopy", "Reciprocal", "Clamp", "ClampMin", "Sigmoid"),
    "Index",
)
POLYNOMIALS = ("Pow", "Mul", "Dot", "Vdot", "Mm", "Mv", "Bmm", "Addmm", "Var", "Split", "SplitWithSizes", "Unbind")
LOSSES = (
    *("MseLoss", "NllLoss", "NllLoss2D", "LogSoftmax", "BinaryCrossEntropyWithLogits", "HuberLoss", "SmoothL1Loss", "Var"),
    *("BinaryCrossEntropy", "SoftMarginLoss"),
)
WAYS = ("walk", "cut", "monotone", "link", "split", "convex", "chosen", "scale", "slope")
OF_A_SUM = ("walk", "cut", "monotone", "split")  # below phi(S) and scales: what the model computes is no part of S
DEEPEST, LONGEST = 8, 200


def scalar_blocks(loss: Tensor, params: Sequence[Tensor]) -> list[Block]:
    """Return the blocks of a 0-dim loss.

    Raises ValueError for a loss that cannot be read or has a negative weight.
    """
    root = get_gradient_edge(loss).node
    order = operations(root)
    reader = _Reader(order, varying_nodes(order, params), loss.detach())
    try:
        blocks, constant = walked(root, torch.ones_like(loss), order, reader.varying)
        return blocks if constant else _not_squares(blocks)
    except ValueError as error:
        try:
            blocks = reader.read(root, torch.ones_like(loss))
            for block, slope in reader.beside:
                both = diagonal(block.edges, block.parts[0] + slope, block.parts[1])
                block.residual, block.root, block.parts = both.residual, both.root, both.parts
            return blocks[::-1]
        except _Unread:
            raise error from None


def ends_in_loss(loss: Tensor) -> bool:
    """Whether an operation that is a loss by name stands on the tape, before any that the model may end with."""
    stack = [get_gradient_edge(loss).node]
    while stack:
        node = stack.pop()
        if _named(node, LOSSES):
            return True
        if is_linear(node, {below for below, _ in node.next_functions if below is not None}):
            stack += [below for below, _ in node.next_functions if below is not None]
    return False


class _Unread(Exception):
    """No way serves a term."""


def _not_squares(blocks: list[Block]) -> list[Block]:
    for block in blocks:
        block.squares = False
    return blocks


def _named(node: Node, names: Sequence[str]) -> bool:
    return kind_of(node).removesuffix("Backward") in names


class _Reader:
    """Reads terms, each a node with the weight of its output."""

    def __init__(self, order: list[Node], varying: set[Node], loss: Tensor):
        self.order, self.varying, self.loss = order, varying, loss
        self.place = {node: k for k, node in enumerate(order)}  # users have lower places
        self.seen: list[list[Block]] = []  # blocks found so far, by level of nesting
        self.beside: list[tuple[Block, Tensor]] = []  # terms that are linear where a block stands

    def read(self, node: Node, weight: Tensor, ways: Sequence[str] = WAYS) -> list[Block]:
        """Return the blocks of a term. ways: those that are tried. Raises _Unread."""
        seen, self.seen, beside = self.seen, [], len(self.beside)
        try:
            return self._all({node: weight}, {}, ways)
        except _Unread:
            del self.beside[beside:]
            raise
        finally:
            self.seen = seen

    def _all(self, terms: dict, slopes: dict, ways: Sequence[str]) -> list[Block]:
        blocks = []
        self.seen.append(blocks)
        try:
            return self._each(terms, slopes, ways, blocks)
        finally:
            self.seen.pop()

    def _each(self, terms: dict, slopes: dict, ways: Sequence[str], blocks: list[Block]) -> list[Block]:
        while terms:
            node = min(terms, key=self.place.get)
            weight = terms.pop(node)
            beside = [b for found in self.seen for b in found if b.parts is not None and [e.node for e, _ in b.edges] == [node]]
            if beside:  # the term is linear where a block stands
                self.beside.append((beside[0], weight))
                continue
            for way in ways:
                found = getattr(self, "_" + way)(node, weight, terms, slopes, ways)
                if found is not None:
                    blocks += found
                    break
            else:
                raise _Unread
        return blocks + self._settled(slopes)

    def _walk(self, node, weight, terms, slopes, ways):
        try:
            blocks, constant = walked(node, weight, self.order, self.varying)
        except ValueError:
            return None
        return blocks if constant else _not_squares(blocks)

    # --- cuts ---------------------------------------------------------------------------------------------------------

    def _below(self, node: Node) -> list[Node]:
        return [below for below, _ in node.next_functions if below in self.varying]

    def _cuts(self, node: Node) -> list[tuple[Node, list[Node], list[Node]]]:
        """Nodes whose output all of a term depends on: each with the operations above, and those not above the one before."""
        frontier, above, found, before = {node}, [], [], 0
        while len(above) < LONGEST:
            top = min(frontier, key=self.place.get)
            if hasattr(top, "variable"):
                break
            frontier.remove(top)
            frontier.update(self._below(top))
            above.append(top)
            if len(frontier) == 1:
                found.append((next(iter(frontier)), list(above), above[before:]))
                before = len(above)
            elif any(hasattr(other, "variable") for other in frontier):
                break
        return found[:DEEPEST]

    def _cut(self, node, weight, terms, slopes, ways):
        return self._first(node, weight, lambda z, above, new: self._centre_operations(z, new))

    def _link(self, node, weight, terms, slopes, ways):
        return self._first(node, weight, lambda z, above, new: any(_named(n, LINKS) for n in self._users(z, above)))

    def _convex(self, node, weight, terms, slopes, ways):
        return self._first(node, weight, lambda z, above, new: True)

    def _chosen(self, node, weight, terms, slopes, ways):
        """A loss that is all of sum slope * a, with slopes that torch.where chooses: h = |slope| / mean |a|."""
        if terms or any(self.seen):
            return None
        for z, above, _ in self._cuts(node):
            where = [_named(other, ("Where",)) for other in above]
            if _named(z, REDUCTIONS) or not any(where) or not self.loss > 0:
                continue
            if all(chooses or is_linear(other, self.varying) for chooses, other in zip(where, above, strict=True)):
                (slope,) = torch.autograd.grad([GradientEdge(node, 0)], [GradientEdge(z, 0)], [weight], retain_graph=True)
                if slope.any():
                    return [diagonal([((z, 0), 1.0)], slope, slope.abs() * slope.abs().sum() / self.loss)]
        return None

    def _first(self, node, weight, suits):
        for z, above, new in self._cuts(node):
            if _named(z, REDUCTIONS) or not suits(z, above, new):
                continue
            try:
                block = self._at(node, weight, z, above, new)
            except RuntimeError:  # no second derivative
                continue
            if block is not None:
                return [block]
        return None

    def _users(self, z: Node, above: list[Node]) -> list[Node]:
        return [node for node in above if z in self._below(node)]

    def _centre_operations(self, z: Node, new: list[Node]) -> list[Node]:
        """Operations that fold a multiple of z at 0, or, if they tell where, elsewhere."""
        return [node for node in new if _folds(node) and self._straight(node, z, _named(node, ("Maximum", "Minimum")))]

    def _straight(self, node: Node, z: Node, offsets: bool) -> bool:
        return all(
            below is z or (
                is_linear(below, self.varying) and (offsets or not self._offset(below)) and self._straight(below, z, offsets)
            )
            for below in self._below(node)
        )

    def _offset(self, node: Node) -> bool:
        """Whether an operation adds a constant."""
        return _named(node, ("Add", "Sub", "Rsub")) and len(self._below(node)) < 2

    def _derivatives(self, node, weight, z) -> tuple[Tensor, Tensor, GradientEdge]:
        """dL/dz, of z's shape, and the Hessian, (n, n)."""
        edge = GradientEdge(z, 0)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad([GradientEdge(node, 0)], [edge], [weight], create_graph=True)
            flat, rows = slope.reshape(-1), []
            for k in range(flat.numel()):
                row = None
                if flat.requires_grad:
                    (row,) = torch.autograd.grad(flat[k], [edge], retain_graph=True, allow_unused=True)
                rows.append(torch.zeros_like(flat) if row is None else row.reshape(-1))
        return slope.detach(), torch.stack(rows).detach() if rows else flat.new_zeros(0, 0), edge

    def _at(self, node, weight, z, above, new) -> Block | None:
        slope, H, edge = self._derivatives(node, weight, z)
        if not slope.isfinite().all() or not H.isfinite().all() or not slope.numel():
            return None
        h, size = H.diagonal().reshape(slope.shape), H.abs().max()
        if (H - H.diagonal().diag()).norm() <= 1e-9 * H.norm():
            a = self._distance(slope, z, above, new)
            if a is not None and not a.any():
                slope = torch.zeros_like(slope)  # an exact fit: 0 is among the slopes of a kink
            h = self._curvature(slope, h, a)
            if h is None:
                return None
            block = diagonal([((z, 0), 1.0)], slope, h)
            block.squares = self._polynomial(above)
            return block
        polynomial, (total, H) = self._polynomial(above), self._softmax_form(H, z, above, slope.shape)
        if not polynomial and total is None:
            return None
        values, vectors = torch.linalg.eigh((H + H.T) / 2)
        if values[0] < -1e-10 * size:
            return None
        flat = slope.reshape(-1)
        outside = vectors[:, values <= 1e-12 * size].T @ flat
        if total is not None and outside.norm() > 1e-9 * (total.sum() + flat.norm()):  # linear where the Hessian is zero
            return diagonal([((z, 0), 1.0)], slope, total)
        root = values.clamp(min=2e-13 * size).sqrt()  # a little everywhere, to hold the slope that rounding leaves there
        S, residual = (vectors * root) @ vectors.T, (vectors / root) @ (vectors.T @ flat)
        return Block([(edge, 1.0)], residual.reshape(slope.shape), lambda jac: S @ jac.reshape(len(S), -1), polynomial)

    def _softmax_form(self, H, z, above, shape) -> tuple[Tensor | None, Tensor]:
        """Q p, and Q (diag p - p p^T) where H is that, but for what log(p + eps) changes, along a softmax of z; else H."""
        for dim, p in self._softmaxes(z, above, shape):
            form, weights = torch.zeros_like(H), torch.zeros(H.shape[0], dtype=H.dtype)
            numbers = torch.arange(len(H)).reshape(shape).movedim(dim, -1)
            for index in numbers.reshape(-1, shape[dim]):
                q = p.reshape(-1)[index]
                unit = q.diag() - torch.outer(q, q)
                total = H[index[:, None], index].trace() / unit.trace().clamp(min=TINY)
                form[index[:, None], index], weights[index] = total * unit, total * q
            if (H - form).norm() <= 1e-2 * H.norm() and (weights >= 0).all():
                return weights.reshape(shape), form
        return None, H

    def _softmaxes(self, z, above, shape):
        """(dimension, p) of every softmax of z above it, and of every quotient of exponentials and their sum or mean."""
        users = self._users(z, above)
        for node in above:
            if node in users and _named(node, ("Logsumexp",)):
                dim = _signed(node._saved_dim[0], shape)
                yield dim, torch.softmax(node._saved_self.detach(), dim)
            elif node in users and _named(node, ("Softmax", "LogSoftmax")):
                p = node._saved_result.detach()
                yield _signed(node._saved_dim, shape), p.exp() if _named(node, ("LogSoftmax",)) else p
            elif _named(node, ("Sum", "Mean")) and _named(node.next_functions[0][0], ("Exp",)):
                e = node.next_functions[0][0]._saved_result.detach()
                dims = list(getattr(node, "_saved_dim", None) or range(e.dim()))
                if e.shape == shape and len(dims) == 1:
                    dim = _signed(dims[0], shape)
                    yield dim, e / e.sum(dim, keepdim=True)

    def _polynomial(self, above: list[Node]) -> bool:
        return all(
            node._saved_exponent == 2 if _named(node, ("Pow",)) else _named(node, POLYNOMIALS) or is_linear(node, self.varying)
            for node in above
        )

    @staticmethod
    def _curvature(slope, h, a) -> Tensor | None:
        convex = h.max() > 0 and h.min() >= -1e-14 * h.abs().max()
        if a is None:
            return h if convex else None
        ratio = reweighted(slope, a)
        if not convex and ((ratio < 0) & (h <= 0)).any():
            return None
        return torch.where(h > 1e-3 * ratio, h, ratio)

    def _distance(self, slope, z, above, new) -> Tensor | None:
        """How far z is from where it is folded."""
        folds = self._centre_operations(z, new)
        if not folds:
            return None
        for node in new:
            if _named(node, ("Maximum", "Minimum")):
                gap = node._saved_self.detach() - node._saved_other.detach()
                steepness = self._slope_of(node, 0, z, slope) - self._slope_of(node, 1, z, slope)
                return torch.where(steepness == 0, 0.0, gap / steepness) if gap.shape == steepness.shape else None
        value = self._value(z, self._users(z, above), slope.shape)
        if value is None and any(_named(node, ("Relu",)) for node in new):
            value = torch.zeros_like(slope)
            for node in new:
                if _named(node, ("Relu",)):
                    steepness = self._slope_of(node, 0, z, slope)
                    value = value + torch.where(steepness == 0, 0.0, node._saved_result.detach() / steepness)
        return value

    @staticmethod
    def _value(z, users, shape) -> Tensor | None:
        for node in users:
            for (below, _), field in zip(node.next_functions, ("_saved_self", "_saved_other"), strict=False):
                saved = getattr(node, field, None)
                if below is z and isinstance(saved, Tensor) and saved.shape == shape:
                    return saved.detach()
        saved = getattr(z, "_saved_result", None)
        return saved.detach() if isinstance(saved, Tensor) and saved.shape == shape else None

    def _slope_of(self, node, k, z, like) -> Tensor:
        below, output = node.next_functions[k]
        if below not in self.varying:
            return torch.zeros_like(like)
        if below is z:
            return torch.ones_like(like)
        ones = torch.ones(below._input_metadata[output].shape, dtype=like.dtype)
        (found,) = torch.autograd.grad(
            [GradientEdge(below, output)], [GradientEdge(z, 0)], [ones], retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(like) if found is None else found

    # --- without a cut of its own ---------------------------------------------------------------------------------------

    def _monotone(self, node, weight, terms, slopes, ways):
        for z, above, _ in self._cuts(node):
            if all(is_linear(other, self.varying) for other in above):
                continue
            try:
                (slope,) = torch.autograd.grad([GradientEdge(node, 0)], [GradientEdge(z, 0)], [weight], retain_graph=True)
                slope = torch.where(slope.isfinite(), slope, 0.0)  # a root at 0 has none
                return _not_squares(self.read(z, slope, OF_A_SUM))
            except (_Unread, RuntimeError):
                continue
        return None

    def _split(self, node, weight, terms, slopes, ways):
        if hasattr(node, "variable") or not is_linear(node, self.varying):
            return None
        further, notes, beside = dict(terms), dict(slopes), len(self.beside)
        try:
            found = pulled(node, weight, self.varying)
            for below, carried in found:
                further[below] = further.get(below, 0.0) + carried
            blocks = self._all(further, notes, ways)
        except (ValueError, _Unread):
            del self.beside[beside:]
            return None
        terms.clear()
        slopes.clear()
        return blocks

    # --- scales: (first derivative, second derivative, is it a scale?, value) of the loss at a node ----------------------

    def _scale(self, node, weight, terms, slopes, ways):
        if _named(node, ("Log",)):
            v = node._saved_self.detach()
            if _named(node.next_functions[0][0], REDUCTIONS) or (weight < 0).any():
                return None
            _note(slopes, node.next_functions[0][0], weight / v, -weight / v**2, True, v)
            return []
        if not _named(node, ("Mul", "Div")) or len(self._below(node)) < 2:
            return None
        a, b = node._saved_self.detach(), node._saved_other.detach()
        if _named(node, ("Mul",)):
            first, second = (weight * b, weight * a), (0 * weight, 0 * weight)
        else:
            first, second = (weight / b, -weight * a / b**2), (0 * weight, 2 * weight * a / b**3)
        inputs, values = [below for below, _ in node.next_functions], (a, b)
        first, second = ([t.sum_to_size(v.shape) for t, v in zip(pair, values, strict=True)] for pair in (first, second))
        beside = len(self.beside)
        try:  # two losses, each with the other for its weight
            return _not_squares(self.read(inputs[0], first[0], OF_A_SUM) + self.read(inputs[1], first[1], OF_A_SUM))
        except _Unread:
            del self.beside[beside:]
        for loss, scale in ((0, 1), (1, 0)):
            if _named(inputs[scale], REDUCTIONS):
                continue
            try:
                blocks = self.read(inputs[loss], first[loss], OF_A_SUM)
            except _Unread:
                continue
            _note(slopes, inputs[scale], first[scale], second[scale], True, values[scale])
            return _not_squares(blocks)
        return None

    def _slope(self, node, weight, terms, slopes, ways):
        if not hasattr(node, "variable") and _named(node, REDUCTIONS):
            return None
        _note(slopes, node, weight, torch.zeros_like(weight), False, None)
        return []

    def _settled(self, slopes: dict) -> list[Block]:
        """Carry the derivatives by scales down to what these are computed from, and return the rows there."""
        blocks = []
        while slopes:
            node = min(slopes, key=self.place.get)
            first, second, scale, value = slopes.pop(node)
            if not scale:
                if first.any():
                    raise _Unread
                continue
            below = [] if hasattr(node, "variable") or not _named(node, UNARY) else self._below(node)
            if len(below) == 1:
                _note(slopes, below[0], *self._chained(node, below[0], first, second))
                continue
            if value is None or value.shape != first.shape or not (value > 0).all():
                h = second.clamp(min=0) + first.abs()
            else:  # in the logarithm of a positive quantity
                h = ((value**2 * second + value * first).clamp(min=0) + (value * first).abs()) / value**2
            blocks.append(diagonal([((node, 0), 1.0)], first, h))
        return blocks

    def _chained(self, node, below, first, second):
        """The derivatives of L(y(x)) by x: L' y' and L' y'' + L'' y'^2."""
        slope, H, _ = self._derivatives(node, first, below)
        ones = torch.ones_like(first)
        if slope.shape == first.shape:
            added = self._derivatives(node, ones, below)[0] ** 2 * second
        else:
            added = self._derivatives(node, second, below)[0]
        return slope, H.diagonal().reshape(slope.shape) + added, True, self._value(below, [node], slope.shape)


def _note(slopes: dict, node: Node, first: Tensor, second: Tensor, scale: bool, value: Tensor | None) -> None:
    if node in slopes:
        old = slopes[node]
        first, second, scale, value = first + old[0], second + old[1], scale or old[2], old[3] if value is None else value
    slopes[node] = first, second, scale, value


def _signed(dim: int, shape) -> int:
    """A dimension as saved on a tape, where negative ones are kept as unsigned 64-bit numbers."""
    return (dim - 2**64 if dim >= 2**63 else dim) % max(len(shape), 1)


def _folds(node: Node) -> bool:
    if _named(node, ("Pow",)):
        return node._saved_exponent > 0 and math.fmod(node._saved_exponent, 2) == 0
    if _named(node, ("Mul",)):
        return len(node.next_functions) == 2 and node.next_functions[0] == node.next_functions[1]
    if _named(node, ("Clamp", "ClampMin")):
        return [b for b in (node._saved_min, getattr(node, "_saved_max", None)) if b is not None] in ([0], [0.0])
    return _named(node, FOLDS)

