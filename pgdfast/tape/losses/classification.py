"""Cross-entropies: of a softmax, read as -sum q log p, and of a sigmoid."""

from __future__ import annotations

import torch

from ..rules.table import signed
from .blocks import Route, Softmax, UnrecognizedLoss, diagonal_block, looked_at, tiny
from .linear import reads


@reads("NllLossBackward0", "NllLoss2DBackward0")
def negative_log_likelihood(walk, position, node, edges, weight):
    log_p, target, classes = node._saved_self.detach(), node._saved_target, node._saved_weight
    if node._saved_reduction == 1:
        total = node._saved_total_weight
        if looked_at(total, walk.allow_sync):
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


@reads("LogSoftmaxBackward0")
def log_of_softmax(walk, position, node, edges, weight):
    walk.log_softmax[position] = walk.log_softmax.get(position, 0.0) - weight
    walk.to_log_softmax.setdefault(position, []).append(walk.chain)
    return ()


@reads("SoftmaxBackward0")
def softmax(walk, position, node, edges, weight):
    """A loss that grows as probabilities fall, read as sum -q log p with the slope that it has here."""
    p = node._saved_result.detach()
    q = -(walk.full(weight, position) * p)
    if looked_at(q, walk.allow_sync) and bool((q < 0).any()):
        raise UnrecognizedLoss("it grows with a probability of a softmax; a cross-entropy falls with it")
    walk.form.steady = False
    walk.form.blocks.append(softmax_block((edges[0],), p, q, signed(node._saved_dim) % max(p.dim(), 1)))
    return ()


def softmax_blocks(walk) -> None:
    """The blocks of the log_softmax that a walk has reached."""
    for position, q in walk.log_softmax.items():
        node = walk.tape.nodes[position]
        log_p = node._saved_result.detach()
        p = torch.exp(log_p)
        q = q.to(p.dtype).expand_as(p) if isinstance(q, torch.Tensor) else torch.full_like(p, q)
        if looked_at(q, walk.allow_sync) and bool((q < 0).any()):
            raise UnrecognizedLoss("its log_softmax enters with a positive sign; a cross-entropy has a negative one")
        dim = signed(node._saved_dim) % max(log_p.dim(), 1)
        walk.form.blocks.append(softmax_block((walk.tape.edges[position][0],), p, q, dim))
        walk.form.routes.append(Route(tuple(walk.to_log_softmax[position]), q))


def softmax_block(edges: tuple, p: torch.Tensor, q: torch.Tensor, dim: int) -> Softmax:
    """The block of -sum q log p."""
    p = p.clamp_min(tiny(p.dtype))
    total = q.sum(dim, keepdim=True)
    root = torch.sqrt(total * p)
    residual = torch.where(total > 0, (total * p - q) / root, 0.0).to(p.dtype)
    return Softmax(edges, residual, p, root, dim)


@reads("BinaryCrossEntropyWithLogitsBackward0")
def binary_cross_entropy(walk, position, node, edges, weight):
    z, t = node._saved_self.detach(), node._saved_target.detach()
    if edges[0] is None or (len(edges) > 1 and edges[1] is not None):
        raise UnrecognizedLoss("its binary cross-entropy has a target that depends on the parameters")
    if node._saved_reduction == 1:
        weight = weight / max(z.numel(), 1)
    if node._saved_weight is not None:
        weight = weight * node._saved_weight.detach()
    positive = 1.0 if node._saved_pos_weight is None else node._saved_pos_weight.detach()
    weights = [t for t in (torch.as_tensor(weight), torch.as_tensor(positive)) if looked_at(t, walk.allow_sync)]
    if any(torch.any(t < 0) for t in weights):
        raise UnrecognizedLoss("its binary cross-entropy has a negative weight")
    s, other = torch.sigmoid(z), torch.sigmoid(-z)
    # L = w (pos t softplus(-z) + (1 - t) softplus(z)), L' = w ((1 - t) s - pos t (1 - s))
    gradient = (weight * ((1 - t) * s - positive * t * other)).to(z.dtype)
    curvature = weight * (1 - t + positive * t) * s * other
    walk.form.blocks.append(diagonal_block((edges[0],), gradient.expand_as(z), curvature.expand_as(z)))
    return ()
