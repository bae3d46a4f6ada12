"""Losses of differences that grow linearly far out: huber and smooth_l1, of one output or of the difference of two."""

from __future__ import annotations

import torch

from ..rules.table import plain
from .blocks import UnrecognizedLoss, diagonal_block, looked_at
from .curvature import reweighted
from .linear import reads


def _robust(walk, node, edges, weight, slope):
    """Block of a loss with derivative slope(d), d = input - target: h = slope(d) / d, which is the curvature inside."""
    d = plain(node._saved_self).detach() - plain(node._saved_target).detach()
    if node._saved_reduction == 1:
        weight = weight / max(d.numel(), 1)
    signs = torch.as_tensor(weight)
    if looked_at(signs, walk.allow_sync) and bool((signs < 0).any()):
        raise UnrecognizedLoss("its huber or smooth_l1 loss has a negative weight")
    gradient, inside = slope(d)
    gradient = (weight * gradient).to(d.dtype)
    h = reweighted(gradient, d) if inside is None else (weight * inside).to(d.dtype)
    if edges[0] is None:
        edges, gradient = (edges[1],), -gradient
    walk.form.steady = False
    walk.form.blocks.append(diagonal_block(tuple(e for e in edges if e is not None), gradient, h.expand_as(d)))
    return ()


@reads("HuberLossBackward0")
def huber(walk, position, node, edges, weight):
    delta = float(node._saved_delta)
    return _robust(walk, node, edges, weight, lambda d: (d.clamp(-delta, delta), (delta / d.abs()).clamp_max(1)))


@reads("SmoothL1LossBackward0")
def smooth_l1(walk, position, node, edges, weight):
    beta = float(node._saved_beta)
    if beta == 0:
        return _robust(walk, node, edges, weight, lambda d: (torch.sign(d), None))
    return _robust(walk, node, edges, weight, lambda d: (d.clamp(-beta, beta) / beta, (1 / d.abs()).clamp_max(1 / beta)))
