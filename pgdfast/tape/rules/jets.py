"""Layers in Taylor mode (pgdfast/pde/layer.py): the tangents of all channels of a stack.

With z = x W^T + b, tangents z' of the channels (value 0, first k, second s) and the coefficients that the forward pass kept,

    y'_0 = slope z'_0    y'_k = slope z'_k + mix_k z'_0    y'_s = slope z'_s + bend_s z'_0 + 2 sum_k weights[s][k] mix_k z'_k

(csrc/cpu/jet.h). A weight is used once per channel of x, so that J J^T takes its factors from there.
"""

from __future__ import annotations

from .table import RULES, Rule


def _read(node) -> tuple:
    return node.saved_tensors, node.form[0], node.form[1], node.form[2] == "identity"


def jet_layer(op, saved, weights, directions, linear):
    x, weight, _, slope, mix, bend = saved
    points, given, width = len(x), x.shape[1], len(weight)
    channels = 1 + directions + len(weights)
    op.temporary("z", (points, channels, width))
    if op.needs[0]:
        op.reshape(0, (points * given, x.shape[2]), out="x")
        if given == channels:
            op.view("z", lambda t: t.view(points * channels, width), out="products")
            op.matmul("x", right=weight.T, out="products")
        else:
            op.temporary("products", (points * given, width))
            op.matmul("x", right=weight.T, out="products")
            op.view("products", lambda t: t.view(points, given, width), out="given")
            op.add("given", out="z", where=lambda t: t[:, :given])
    if op.needs[1]:
        op.view(1, lambda w: w.mT, out="weight")
        for c in range(given):
            op.view("z", lambda t, c=c: t[:, c], out=f"z{c}")
            op.matmul("weight", left=x[:, c], out=f"z{c}")
    if len(op.needs) > 2 and op.needs[2]:
        op.add(2, out="z", where=lambda t: t[:, 0])
    if linear:
        op.view("z", lambda t: t)
        return
    op.temporary("y", (points, channels, width))
    op.view("z", lambda t: t[:, :1], out="value")
    op.scale("z", slope, out="y")
    if directions:
        op.scale("value", mix, out="y", where=lambda t: t[:, 1 : 1 + directions])
    if weights:
        op.scale("value", bend, out="y", where=lambda t: t[:, 1 + directions :])
    for s, row in enumerate(weights):
        op.view("y", lambda t, s=s: t[:, 1 + directions + s], out=f"y{s}")
        for first, end in _runs(row):
            op.view("z", lambda t, a=first, b=end: t[:, 1 + a : 1 + b], out=f"z{s} {first}")
            op.sum(f"z{s} {first}", (1,), False, c=mix[:, first:end], alpha=2 * row[first], out=f"y{s}")
    op.view("y", lambda t: t)


def _runs(row) -> list[tuple[int, int]]:
    """[first, end) of neighbours with the same weight, other than 0."""
    edges = [0, *(k for k in range(1, len(row)) if row[k] != row[k - 1]), len(row)]
    return [(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True) if row[a] != 0]


RULES["JetLayerBackward"] = Rule(jet_layer, (), _read)
