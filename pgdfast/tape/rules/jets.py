"""Chains of layers in Taylor mode (pgdfast/pde/chain.py): the tangents of all channels of a stack.

With z = x W^T + b, tangents z' of the channels (value 0, first k, second s) and the coefficients slope, mix_k, bend_s,

    y'_0 = slope z'_0    y'_k = slope z'_k + mix_k z'_0    y'_s = slope z'_s + bend_s z'_0 + 2 sum_k weights[s][k] mix_k z'_k

(csrc/cpu/jet.h). A weight is used once per channel of x, so that J J^T takes its factors from there.
"""

from __future__ import annotations

import torch

from ...kernels import native
from .table import RULES, Rule, plain


def _read(node) -> tuple:
    x, along, *parameters = map(plain, node.saved_tensors)
    stacks, kept = native.jet_chain(x, along, parameters, node.forms, node.weights, node.directions, keep=True)
    if along is not None:   # (K, in): derivatives that all points share
        stacks[0] = torch.cat([x, along.expand(x.shape[0], *along.shape)], 1)
    given = tuple([t is not None for t in parameters])
    return stacks[:-1], kept, parameters[::2], given, along is not None, node.weights, node.directions


def jet_chain(op, stacks, kept, matrices, given, seeded, weights, directions):
    # Inputs on the tape: x, `along` if there is one, and the weights and biases that there are.
    numbers, following = [], 1 + seeded
    for there in given:
        numbers.append(following if there else None)
        following += there
    source = 0 if op.needs[0] else None
    for number, (x, coefficients, matrix) in enumerate(zip(stacks, kept, matrices, strict=True)):
        weight, bias = [k if k is not None and op.needs[k] else None for k in numbers[2 * number : 2 * number + 2]]
        if source is not None or weight is not None or bias is not None:
            _layer(op, f"{number} ", source, weight, bias, x, coefficients, matrix, weights, directions)
            source = f"{number} y"
    op.view(source, lambda t: t)


def _layer(op, name, source, weight, bias, x, coefficients, matrix, weights, directions):
    """One layer's tangents, in temporaries called by `name`; source, weight and bias: inputs that have tangents, or None."""
    z, y = name + "z", name + "y"
    points, channels, width = x.shape[0], 1 + directions + len(weights), matrix.shape[0]
    linear = coefficients is None
    z = y if linear else z
    op.temporary(z, (points, channels, width))
    if source is not None:
        given = x.shape[1]
        op.reshape(source, (points * given, x.shape[2]), out=name + "x")
        if given == channels:
            op.view(z, lambda t: t.view(points * channels, width), out=name + "products")
            op.matmul(name + "x", right=matrix.T, out=name + "products")
        else:
            op.temporary(name + "products", (points * given, width))
            op.matmul(name + "x", right=matrix.T, out=name + "products")
            op.view(name + "products", lambda t: t.view(points, given, width), out=name + "given")
            op.add(name + "given", out=z, where=lambda t: t[:, :given])
    if weight is not None:
        op.view(weight, lambda t: t.mT, out=name + "weight")
        for c in range(x.shape[1]):
            op.view(z, lambda t, c=c: t[:, c], out=f"{z}{c}")
            op.matmul(name + "weight", left=x[:, c], out=f"{z}{c}")
    if bias is not None:
        op.add(bias, out=z, where=lambda t: t[:, 0])
    if linear:
        return
    op.temporary(y, (points, channels, width))
    op.view(z, lambda t: t[:, :1], out=name + "value")
    op.scale(z, coefficients[:, :1], out=y)
    if channels > 1:
        op.scale(name + "value", coefficients[:, 1:], out=y, where=lambda t: t[:, 1:])
    for s, row in enumerate(weights):
        op.view(y, lambda t, s=s: t[:, 1 + directions + s], out=f"{y}{s}")
        for first, end in _runs(row):
            part = f"{z}{s} {first}"
            op.view(z, lambda t, a=first, b=end: t[:, 1 + a : 1 + b], out=part)
            op.sum(part, (1,), False, c=coefficients[:, 1 + first : 1 + end], alpha=2 * row[first], out=f"{y}{s}")


def _runs(row) -> list[tuple[int, int]]:
    """[first, end) of neighbours with the same weight, other than 0."""
    edges = [0, *(k for k in range(1, len(row)) if row[k] != row[k - 1]), len(row)]
    return [(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True) if row[a] != 0]


RULES["pgdfast.pde.chain.JetChainBackward"] = Rule(jet_chain, (), _read)
