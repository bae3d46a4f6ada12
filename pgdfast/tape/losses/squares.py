"""Sums of squares that the tape shows as such: they may be read by the core at every later step (tape/replay.py)."""

from __future__ import annotations

import math

import torch

from ..rules.table import plain, reduced
from .blocks import Centred, Diagonal, UnrecognizedLoss, looked_at
from .linear import pull, reads, scaled

_TRANSPOSES = {"TBackward0", "TransposeBackward0", "PermuteBackward0"}   # of a column or row there is one other form
_CONJUGATES = {"ConjBackward0", "ConjPhysicalBackward0"}
_VIEWS = _TRANSPOSES | {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0", "CloneBackward0"}


def root_of(weight, allow_sync: bool):
    """sqrt(2 w) for a number or tensor.

    Raises: UnrecognizedLoss where w < 0.
    """
    if isinstance(weight, torch.Tensor):
        if looked_at(weight, allow_sync) and bool((weight < 0).any()):
            raise UnrecognizedLoss("one of its squares has a negative weight, so it is no sum of squares")
        return torch.sqrt(2 * weight)
    if weight < 0:
        raise UnrecognizedLoss(f"one of its squares has the negative weight {weight:g}, so it is no sum of squares")
    return math.sqrt(2 * weight)


def square(walk, edge, saver: int, weight, field: str = "_saved_self"):
    """The squares of what stands at an edge; the node at `saver` saved it."""
    position = edge[0]
    if edge in walk.tape.structure.complex:
        raise UnrecognizedLoss("one of its squares is of complex numbers; write torch.view_as_real(z).square() for |z|^2")
    if penalty(walk, edge, weight):
        return ()
    kind = walk.tape.kind(position)
    if kind == "ViewAsRealBackward0" and penalty(walk, walk.tape.edges[position][0], weight):
        return ()
    if kind == "LinalgVectorNormBackward0" and walk.tape.nodes[position]._saved_ord == 2:
        node, below = walk.tape.nodes[position], walk.tape.edges[position][0]
        walk.form.consumed.add(position)
        walk.chain = walk.chain, position
        weight = walk.spread(position, node, below, weight)
        return (modulus if node._saved_self.is_complex() else square)(walk, below, position, weight)
    if kind == "AbsBackward0" and walk.tape.nodes[position]._saved_self.is_complex():
        walk.form.consumed.add(position)
        walk.chain = walk.chain, position
        return modulus(walk, walk.tape.edges[position][0], position, weight)
    factor, value = root_of(weight, walk.allow_sync), plain(getattr(walk.tape.nodes[saver], field)).detach()
    residual = value * factor
    if walk.masked and isinstance(factor, torch.Tensor):
        residual = torch.where(factor == 0, 0.0, residual)
    walk.form.blocks.append(Diagonal((edge,), residual, factor, ((saver, field),)))
    return ()


def penalty(walk, edge, weight) -> bool:
    """Note the squares of all of a parameter's numbers, alike weighted; whether it is that which stands at an edge."""
    leaf = walk.tape.leaf[edge[0]]
    if leaf < 0 or isinstance(weight, torch.Tensor):
        return False
    root_of(weight, walk.allow_sync)
    walk.form.penalties[leaf] = walk.form.penalties.get(leaf, 0.0) + 2 * weight
    walk.form.penalty_routes.append((leaf, walk.chain))
    return True


def modulus(walk, edge, saver: int, weight, field: str = "_saved_self"):
    """|z|^2 of the complex numbers at an edge, as the squares of their real and imaginary parts."""
    if penalty(walk, edge, weight):
        return ()
    if isinstance(weight, torch.Tensor):
        weight = (weight.real if weight.is_complex() else weight).unsqueeze(-1)
    factor = root_of(weight, walk.allow_sync)
    with torch.enable_grad():   # what was saved is still tied to the tape
        parts = torch.view_as_real(getattr(walk.tape.nodes[saver], field).resolve_conj())
    handles = (tuple(torch.autograd.graph.get_gradient_edge(parts)),)
    walk.form.entries = True
    walk.form.blocks.append(Diagonal((edge,), parts.detach() * factor, factor, handles=handles))
    return ()


def conjugates(tape, a, b) -> bool:
    """Whether one edge is the complex conjugate of the other."""
    return any(tape.kind(x[0]) in _CONJUGATES and tape.edges[x[0]][0] == y for x, y in ((a, b), (b, a)))


def same_numbers(tape, a, b) -> bool:
    """Whether two edges are the same quantity, as far as views written twice go."""
    while a != b:
        if a is None or b is None or a[1] or b[1]:
            return False
        kind = tape.kind(a[0])
        if kind not in _VIEWS or kind != tape.kind(b[0]) or tape.shape(*a) != tape.shape(*b):
            return False
        if kind != "CloneBackward0" and _window(tape.nodes[a[0]]) != _window(tape.nodes[b[0]]):
            return False
        a, b = tape.edges[a[0]][0], tape.edges[b[0]][0]
    return True


def written_twice(walk, a, b, deepest: int = 100) -> bool:
    """Whether two edges of equal value were computed by the same operations from the same quantities."""
    stack, tape = [(a, b)], walk.tape
    for _ in range(deepest):
        if not stack:
            return True
        a, b = stack.pop()
        if a == b:
            continue
        if a is None or b is None or a[1] != b[1] or tape.kind(a[0]) != tape.kind(b[0]) or tape.leaf[a[0]] >= 0:
            return False
        walk.form.consumed |= {a[0], b[0]}
        if tape.shape(*a) != tape.shape(*b) or not _same_saved(tape.nodes[a[0]], tape.nodes[b[0]]):
            return False
        stack += zip(tape.edges[a[0]], tape.edges[b[0]], strict=True)
    return False


def _same_saved(a, b) -> bool:
    for name in dir(a):
        if name.startswith("_saved_"):
            x, y = getattr(a, name), getattr(b, name)
            if isinstance(x, torch.Tensor):
                if not isinstance(y, torch.Tensor) or not torch.equal(x, y):
                    return False
            elif not isinstance(x, (list, tuple)) or not any(isinstance(v, torch.Tensor) for v in x):
                if x != y:
                    return False
            elif len(x) != len(y) or not all(
                (v is None and w is None) or (v is not None and w is not None and torch.equal(v, w))
                for v, w in zip(x, y, strict=True)
            ):
                return False
    return True


def _window(node) -> tuple:
    return tuple(getattr(node, name, None) for name in ("_saved_dims", "_saved_dim", "_saved_dim0", "_saved_dim1"))


@reads("MulBackward0")
def multiply(walk, position, node, edges, weight):
    if edges[0] is not None and edges[1] is not None:
        if conjugates(walk.tape, *edges):
            k = 1 if walk.tape.kind(edges[0][0]) in _CONJUGATES else 0
            return modulus(walk, edges[k], position, weight, ("_saved_self", "_saved_other")[k])
        if same_numbers(walk.tape, *edges):
            return square(walk, edges[0], position, weight)
        a, b = node._saved_self, node._saved_other
        if looked_at(a, walk.allow_sync) and torch.equal(a, b) and written_twice(walk, *edges):
            walk.form.entries = True
            return square(walk, edges[0], position, weight)
        raise UnrecognizedLoss(
            "it multiplies two different quantities that both depend on the parameters (return the residuals, if it is these "
            "whose squares are to be small)"
        )
    return scaled(walk, position, node, edges, weight)


@reads("PowBackward0")
def power(walk, position, node, edges, weight):
    if node._saved_exponent != 2:
        raise UnrecognizedLoss(f"it raises a quantity to the power {node._saved_exponent:g}, not 2")
    return square(walk, edges[0], position, weight)


@reads("MmBackward0", "BmmBackward0")
def product(walk, position, node, edges, weight):
    """r^T r as a product of matrices, for one column r (or r r^T for one row)."""
    tape = walk.tape
    if all(edges) and tape.shape(position).numel() == 1:
        a, b = edges
        if same_numbers(tape, a, b) or _turned(tape, a) == b or _turned(tape, b) == a:
            return square(walk, a, position, weight)
    raise UnrecognizedLoss("it is a product of matrices, but not of one column's transpose with the column itself")


def _turned(tape, edge):
    return tape.edges[edge[0]][0] if tape.kind(edge[0]) in _TRANSPOSES else None


@reads("DotBackward0", "VdotBackward0")
def dot(walk, position, node, edges, weight):
    if edges[0] is not None and edges[1] is not None:
        if same_numbers(walk.tape, *edges):
            value = node._saved_self
            if value.is_complex() and walk.tape.kind(position) == "VdotBackward0":
                return modulus(walk, edges[0], position, weight)
            return square(walk, edges[0], position, weight)
        raise UnrecognizedLoss("it is a dot product of two different vectors that both depend on the parameters")
    return pull(walk, position, node, edges, weight)


@reads("MseLossBackward0")
def mse(walk, position, node, edges, weight):
    a, b = plain(node._saved_self), plain(node._saved_target)
    if node._saved_reduction == 1:
        weight = weight / max(a.numel(), 1)
    factor = root_of(weight, walk.allow_sync)
    parts = (position, "_saved_self"), (position, "_saved_target")
    if edges[0] is None:
        walk.form.blocks.append(Diagonal((edges[1],), (b - a).mul_(factor), factor, parts[::-1]))
    else:
        kept = edges if edges[1] is not None else edges[:1]
        walk.form.blocks.append(Diagonal(kept, (a - b).mul_(factor), factor, parts))
    return ()


@reads("VarBackward0")
def variance(walk, position, node, edges, weight):
    return variance_block(walk, position, node, edges, weight)


def variance_block(walk, position, node, edges, weight):
    """Mean squares of deviations from the mean over some dimensions."""
    z = plain(node._saved_self).detach()
    if z.is_complex():
        raise UnrecognizedLoss("it is a variance of complex numbers")
    dims = tuple(reduced(node._saved_dim or (), z.dim()))
    correction = 1.0 if node._saved_correction is None else float(node._saved_correction)
    divisor = math.prod(z.shape[d] for d in dims) - correction
    weight = weight / divisor if divisor > 0 else weight * math.nan
    if isinstance(weight, torch.Tensor):
        weight = weight.expand(walk.tape.shape(position))
        for d in dims if not node._saved_keepdim else ():
            weight = weight.unsqueeze(d)
    factor = root_of(weight, walk.allow_sync)
    residual = (z - z.mean(dims, keepdim=True)) * factor if dims else torch.zeros_like(z)
    walk.form.blocks.append(Centred((edges[0],), residual, factor, dims))
    return ()
