"""Losses that are a monotone function of a sum: norms and standard deviations, as weights of the sum that depend on its value.

phi(S) has the gradient phi'(S) dS, and takes the Gauss-Newton matrix phi'(S) GGN(S). At S = 0, where a norm has no gradient,
autograd's is 0, and there is no residual.
"""

from __future__ import annotations

import torch

from ..rules.table import plain
from .blocks import UnrecognizedLoss, diagonal_block, looked_at
from .curvature import reweighted
from .linear import reads
from .names import leads_nowhere
from .squares import modulus, square, variance_block


def _per_sum(weight, norm: torch.Tensor):
    """The weight of S in weight * sqrt(S), a number for one sum; norm: sqrt(S)."""
    weight = torch.where(norm > 0, 0.5 * torch.as_tensor(weight, dtype=norm.dtype, device=norm.device) / norm, 0.0)
    return float(weight) if weight.numel() == 1 and weight.device.type == "cpu" else weight


@reads("LinalgVectorNormBackward0")
def vector_norm(walk, position, node, edges, weight):
    order, z = node._saved_ord, plain(node._saved_self).detach()
    walk.form.steady = False
    if order == 2:
        weight = walk.spread(position, node, edges[0], _per_sum(weight, plain(node._saved_result).detach()))
        return (modulus if z.is_complex() else square)(walk, edges[0], position, weight)
    if order != 1 or z.is_complex():
        raise UnrecognizedLoss(f"it is a norm of order {order:g}, not 2 or 1")
    weight = walk.spread(position, node, edges[0], weight)
    signs = torch.as_tensor(weight)
    if looked_at(signs, walk.allow_sync) and bool((signs < 0).any()):
        raise UnrecognizedLoss("it has a norm with a negative weight")
    gradient = (weight * torch.sign(z)).to(z.dtype)
    walk.form.blocks.append(diagonal_block((edges[0],), gradient, reweighted(gradient, z)))
    return ()


@reads("AbsBackward0")
def absolute(walk, position, node, edges, weight):
    """|z| of complex numbers, which is a norm of two."""
    z = plain(node._saved_self).detach()
    if not z.is_complex():
        raise UnrecognizedLoss(leads_nowhere(walk.tape.name(position)))
    walk.form.steady = False
    return modulus(walk, edges[0], position, _per_sum(weight, z.abs()))


@reads("DistBackward0")
def distance(walk, position, node, edges, weight):
    if node._saved_p != 2:
        raise UnrecognizedLoss(f"it is a distance of order {node._saved_p:g}, not 2")
    if node._saved_self.is_complex():
        raise UnrecognizedLoss("it is a distance of complex numbers; write torch.linalg.vector_norm(a - b)")
    walk.form.steady = False
    weight = _per_sum(weight, plain(node._saved_result).detach())
    a, b = plain(node._saved_self).detach(), plain(node._saved_other).detach()
    if a.shape != b.shape:
        raise UnrecognizedLoss("it is a distance of tensors of different shapes")
    root = torch.as_tensor(weight, dtype=a.dtype, device=a.device).expand_as(a) * 2
    gradient = root * (a - b)
    if edges[0] is None:
        edges, gradient = (edges[1],), -gradient
    walk.form.blocks.append(diagonal_block(edges if edges[-1] is not None else edges[:1], gradient, root))
    return ()


@reads("StdBackward0")
def deviation(walk, position, node, edges, weight):
    walk.form.steady = False
    return variance_block(walk, position, node, edges, _per_sum(weight, plain(node._saved_result).detach()))
