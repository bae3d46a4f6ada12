"""The block of a term at a cut, from its two derivatives there: diagonal, of a softmax, or the same matrix for every row.

An elementwise function f(a) takes h = f'' where that is positive, and f'/a where it is not (reweighted least squares: huber
outside, l1, Cauchy): half h a^2 then touches f with its slope, and lies above it where f grows slower than a square.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..rules.table import plain, signed
from .blocks import IndefiniteForm, Rows, diagonal_block, tiny
from .classification import softmax_block
from .linear import is_linear
from .tail import FOLDS, Tail

# f'' counts as positive from this fraction of f'/a on: less would ask for steps a thousand times the distance to the centre.
_POSITIVE = 1e-3
_NEAREST = 1e-3     # distances from the centre are taken to be at least this fraction of their mean
_EPSILONS = 1e-2    # what `log(p + 1e-8)` may change in a cross-entropy's second derivative
_ADDING = {"AddBackward0", "AddBackward1", "SubBackward0", "SubBackward1", "RsubBackward1"}
_BATCH = 1 << 20    # numbers in one batch of products
_WIDEST = 512       # outputs of a row that has a matrix of its own


def accepted(tail: Tail, quadratic: bool, centred: bool):
    """The block of a tail whose second derivative has one of the forms, None where it has none.

    quadratic: only operations of at most second degree stand above the cut. centred: do they fold the quantity, so that f'/a
    has a meaning?
    """
    g = tail.gradient
    if g.is_complex() or not bool(torch.isfinite(g).all()):
        return None
    if not g.numel():   # a part without rows
        return diagonal_block((tail.cut.edge,), g, g)
    h = tail.product(torch.ones_like(g))
    probe = tail.probe()
    answer, expected = tail.product(probe), h * probe
    if not bool(torch.isfinite(answer).all()):
        return None
    if _close(answer, expected):
        return _elementwise(tail, g, h, centred, quadratic)
    return _softmax(tail, g, h, probe, answer) or (_rows(tail, g, probe, answer) if quadratic else None)


def _close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 0.0) -> bool:
    tolerance = max(tolerance, torch.finfo(a.dtype).eps ** 0.5)
    return bool((a - b).norm() <= tolerance * (a.norm() + b.norm()))


def _elementwise(tail: Tail, g: torch.Tensor, h: torch.Tensor, centred: bool, quadratic: bool):
    """The block of an elementwise function, None where it is neither convex nor centred."""
    edges = (tail.cut.edge,)
    largest = float(h.abs().max())
    convex = largest > 0 and float(h.min()) >= -64 * torch.finfo(h.dtype).eps * largest
    a = tail.centre() if centred else None
    if a is None or a.shape != g.shape:
        return diagonal_block(edges, g, h, squares=quadratic) if convex else None
    g = torch.where(a.abs().max() > 0, g, 0.0)   # an exact fit: 0 is among the slopes of a kink
    ratio = reweighted(g, a)
    if not convex and bool(((ratio < 0) & (h <= 0)).any()):
        return None
    return diagonal_block(edges, g, torch.where(h > _POSITIVE * ratio, h, ratio), squares=quadratic)


def reweighted(gradient: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """f'/a, the curvature of least squares that pull to a = 0 as f does."""
    floor = _NEAREST * a.abs().mean()
    clamped = torch.where(a < 0, torch.minimum(a, -floor), torch.maximum(a, floor))
    return torch.where(gradient == 0, 0.0, torch.where(a == 0, gradient.abs() / floor, gradient / clamped))


def _softmax(tail: Tail, g, h, probe, answer):
    """Q (diag p - p p^T) along the dimension of a softmax that the quantity enters."""
    found = _probabilities(tail)
    if found is None:
        return None
    p, dim = found

    def form(v):
        return p * (v - (p * v).sum(dim, keepdim=True))

    part, other = form(probe), tail.probe(2)   # the totals fit the first probe
    total = (answer * part).sum(dim, keepdim=True) / part.square().sum(dim, keepdim=True).clamp_min(tiny(g.dtype))
    if not _close(answer, total * part, _EPSILONS) or not _close(tail.product(other), total * form(other), _EPSILONS):
        return None
    if bool((total < 0).any()):
        return None
    q = total * p - g
    if not bool((g.sum(dim).abs() <= 1e3 * torch.finfo(g.dtype).eps * (total.sum(dim) + g.abs().sum(dim))).all()):
        return diagonal_block((tail.cut.edge,), g, total * p)   # diag p >= diag p - p p^T
    return softmax_block((tail.cut.edge,), p, q, dim)


def _probabilities(tail: Tail):
    """(p, dim) of a softmax right above the cut, or of one that is written out, of exponentials and their sum."""
    tape = tail.tape
    for position, _ in tail.cut.users:
        node, kind = tape.nodes[position], tape.kind(position)
        if kind == "LogsumexpBackward0":
            z, dims = plain(node._saved_self).detach(), node._saved_dim
            if len(dims) != 1:
                continue
            dim = signed(dims[0]) % max(z.dim(), 1)
            return torch.softmax(z, dim), dim
        if kind in ("SoftmaxBackward0", "LogSoftmaxBackward0"):
            p = plain(node._saved_result).detach()
            return (p if kind[0] == "S" else p.exp()), signed(node._saved_dim) % max(p.dim(), 1)
    for position in tail.cut.region:
        if tape.kind(position) not in ("SumBackward0", "SumBackward1", "MeanBackward0", "MeanBackward1"):
            continue
        below, dims = tape.edges[position][0], list(getattr(tape.nodes[position], "_saved_dim", None) or ())
        if below[0] in tape.nodes and tape.kind(below[0]) == "ExpBackward0" and tape.shape(*below) == tail.gradient.shape:
            e = plain(tape.nodes[below[0]]._saved_result).detach()
            dims = dims or list(range(e.dim()))
            if len(dims) == 1:
                dim = signed(dims[0]) % max(e.dim(), 1)
                return e / e.sum(dim, keepdim=True).clamp_min(tiny(e.dtype)), dim
    return None


def _rows(tail: Tail, g, probe, answer):
    """The same matrix W, times weights, for every row along the last dimension, or along the first: sum w_i r_i^T W r_i."""
    shape = g.shape
    for turned in (False, True):
        n = shape[0 if turned else -1] if shape else 0
        if not 1 < n <= _WIDEST or (turned and len(shape) < 2):
            continue

        def rows(t, n=n, turned=turned):
            return t.reshape(n, -1).T if turned else t.reshape(-1, n)

        def back(t, turned=turned):
            return (t.T if turned else t).reshape(shape)

        x, y = rows(probe), rows(answer)
        other = tail.probe(2)   # the weights fit the first one
        v, product = rows(other), rows(tail.product(other))
        kept, key = tail.tape.structure.matrices, (tail.cut.edge, turned)
        known = kept.get(key)   # a W is mostly that of the step before, which two products tell
        if known is not None and known.W.dtype == g.dtype:
            weights = _weights(x @ known.W, y)
            if _close(y, weights * (x @ known.W)) and _close(product, weights * (v @ known.W)):
                return _quadratic(tail, rows(g), known, weights, back, turned)
        place = int(y.norm(dim=1).argmax())

        def unit(k, like=x, place=place, back=back):
            e = torch.zeros_like(like)
            e[place, k] = 1
            return back(e)

        if n * g.numel() <= _BATCH:
            products = tail.product(torch.stack([unit(k) for k in range(n)]), batched=True)
        else:
            products = [tail.product(unit(k)) for k in range(n)]
        W = torch.stack([rows(t)[place] for t in products])
        weights = _weights(x @ W, y)
        if _close(y, weights * (x @ W)) and _close(product, weights * (v @ W)):
            kept[key] = _Matrix(W, *torch.linalg.eigh(0.5 * (W + W.T)))
            return _quadratic(tail, rows(g), kept[key], weights, back, turned)
    return None


class _Matrix(NamedTuple):
    W: torch.Tensor
    values: torch.Tensor
    vectors: torch.Tensor


def _weights(form: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of each row the w with y = w form."""
    return (y * form).sum(1, keepdim=True) / form.square().sum(1, keepdim=True).clamp_min(tiny(y.dtype))


def _quadratic(tail: Tail, g, matrix: _Matrix, weights, back, turned: bool):
    W, values, vectors = matrix
    largest = float(values.abs().max())
    rounding = 1e3 * torch.finfo(W.dtype).eps
    if float(values[0]) < -rounding * largest or float(weights.min()) < -rounding:
        raise IndefiniteForm(
            "as a quadratic form r^T W r it has a W that is not positive semidefinite (smallest eigenvalue of W + W^T "
            f"relative to the largest: {float(values[0]) / largest:.1e})"
        )
    # Where W has no curvature a little is left, so that R r = g even there: with what rounding or a linear part leaves of g.
    root = values.clamp_min(max(rounding * largest, tiny(W.dtype))).sqrt()
    R, heavy = (vectors * root) @ vectors.T, weights.clamp_min(0).sqrt()
    if bool((g[(heavy == 0).expand_as(g)] != 0).any()):
        return None
    r = torch.where(heavy == 0, 0.0, ((g @ vectors) / root) @ vectors.T / heavy)
    return Rows((tail.cut.edge,), back(r).contiguous(), R.contiguous(), back(heavy.expand_as(g)).contiguous(), turned)


def is_centred(tape, cut) -> bool:
    """Whether an operation above a cut folds it, or a multiple of it, at 0; a maximum of two tells where it folds it."""
    return any(_folds(tape, position) and _straight(tape, position, cut.edge) for position in cut.new)


def _folds(tape, position: int) -> bool:
    kind, node = tape.kind(position), tape.nodes[position]
    if kind == "PowBackward0":
        return float(node._saved_exponent) % 2 == 0 and node._saved_exponent > 0
    if kind == "MulBackward0":
        return tape.edges[position][0] == tape.edges[position][1]
    if kind in ("ClampBackward1", "ClampMinBackward0"):
        bounds = [b for b in (node._saved_min, getattr(node, "_saved_max", None)) if b is not None]
        return len(bounds) == 1 and float(bounds[0]) == 0
    return kind in FOLDS


def _straight(tape, position: int, edge) -> bool:
    """Whether only linear operations, without a constant added, stand between the inputs of a node and an edge below.

    A maximum or minimum of two has saved both, and may have constants added.
    """
    offsets = tape.kind(position) in ("MaximumBackward0", "MinimumBackward0")
    stack = [e for e in tape.edges[position] if e is not None]
    while stack:
        e = stack.pop()
        if e == edge:
            continue
        added = tape.kind(e[0]) in _ADDING and sum(map(bool, tape.edges[e[0]])) < 2
        if not is_linear(tape, e[0]) or (added and not offsets):
            return False
        stack += [below for below in tape.edges[e[0]] if below is not None]
    return True
