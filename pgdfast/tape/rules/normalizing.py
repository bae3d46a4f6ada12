"""Operations that normalize along dimensions: softmax, layer norm, attention, and smooth and hard maxima."""

from __future__ import annotations

import math

import torch

from ..program import UnsupportedStructure
from .local import local
from .table import reduced, rule, signed


@rule("SoftmaxBackward0", "SafeSoftmaxBackward0", saved="dim result")
def softmax(op, dim, p):
    op.project(0, (signed(dim),), p, ((None, p),))


@rule("LogSoftmaxBackward0", saved="dim result")
def log_softmax(op, dim, log_p):
    op.project(0, (signed(dim),), None, ((None, torch.exp(log_p)),))


@rule("LogsumexpBackward0", saved="dim keepdim result self")
def logsumexp(op, dims, keepdim, result, x):
    dims = reduced(dims, x.dim())
    op.sum(0, dims, keepdim, c=torch.exp(x - _kept(result, dims, keepdim)))


@rule("AmaxBackward0", "AminBackward0", saved="dim keepdim result self")
def extremum(op, dims, keepdim, result, x):
    dims = reduced(dims, x.dim())
    _shared(op, dims, keepdim, result, x)


@rule("MaxBackward1", "MinBackward1", saved="result self")
def extremum_of_all(op, result, x):
    _shared(op, list(range(x.dim())), False, result, x)


def _shared(op, dims, keepdim, result, x):
    """Ties share the derivative evenly."""
    ties = (x == _kept(result, dims, keepdim)).to(x.dtype)
    op.sum(0, dims, keepdim, c=ties / ties.sum(dims, keepdim=True) if dims else ties)


def _kept(result: torch.Tensor, dims, keepdim: bool) -> torch.Tensor:
    for d in () if keepdim else dims:
        result = result.unsqueeze(d)
    return result


@rule("NativeLayerNormBackward0", saved="input normalized_shape result1 result2 weight")
def layer_norm(op, x, shape, mean, rstd, weight):
    """Of n = (x - mean) rstd: w n + b."""
    n = (x - mean) * rstd
    if op.needs[0]:
        dims = tuple(range(-len(shape), 0))
        scale = rstd if weight is None else rstd * weight
        op.project(0, dims, scale, ((None, None), (n, n)), alpha=1 / max(math.prod(shape), 1))
    if op.needs[1]:
        op.scale(1, n)
    if op.needs[2]:
        op.add(2)


@rule("NativeLayerNormBackwardBackward0", saved="grad_out input normalized_shape mean rstd weight", own=True, used=True)
def layer_norm_backward(op, g, x, shape, mean, rstd, weight, backward, used):
    """Of n = (x - mean) rstd: f(g, x, w) = rstd (wg - mean(wg) - n mean(n wg))."""
    if used != (0,):
        raise UnsupportedStructure("second derivatives of a layer norm by its weights")
    dims = tuple(range(-len(shape), 0))
    if op.needs[1]:
        local(op, backward, {1: dims}, 0, dims)
    n = (x - mean) * rstd
    for i, factor in ((0, weight), (4, g)):
        if op.needs[i]:
            op.temporary(f"product {i}", x.shape)
            op.scale(i, torch.ones_like(x) if factor is None else factor, out=f"product {i}")
            op.project(f"product {i}", dims, rstd, ((None, None), (n, n)), alpha=1 / max(math.prod(shape), 1))


@rule("ScaledDotProductFlashAttentionForCpuBackward0", saved="attn_mask dropout_p is_causal key query scale value")
def attention(op, mask, dropout, causal, key, query, scale, value):
    """S = scale q k^T + mask, P = softmax S, y = P v, over stacks (batch, heads) of matrices.

    Query heads that share a key and a value lie below one another in one matrix.
    """
    if dropout:
        raise UnsupportedStructure("attention with dropout in one operation")
    batch, heads, length, width = query.shape
    shared, keys = heads // max(key.shape[1], 1), key.shape[2]
    scale = 1 / math.sqrt(width) if scale is None else scale
    scores = scale * (query @ (key.mT if shared == 1 else key.mT.repeat_interleave(shared, 1)))
    if mask is not None:
        scores = scores + mask
    if causal:
        allowed = torch.ones(length, keys, dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    rows = batch, heads // max(shared, 1), shared * length
    query, p = query.reshape(*rows, width), torch._safe_softmax(scores, -1).view(*rows, keys)
    if op.needs[0] or op.needs[1]:
        op.temporary("scores", p.shape)
        op.temporary("weights", p.shape)
        if op.needs[0]:
            op.reshape(0, query.shape, out="queries")
            op.matmul("queries", right=key.mT, alpha=scale, out="scores")
        if op.needs[1]:
            op.view(1, lambda x: x.mT, out="keys")
            op.matmul("keys", left=query, alpha=scale, out="scores")
        op.project("scores", (-1,), p, ((None, p),), out="weights")
    op.temporary("values", (*rows, value.shape[-1]))
    if op.needs[0] or op.needs[1]:
        op.matmul("weights", right=value, out="values")
    if op.needs[2]:
        op.matmul(2, left=p, out="values")
    op.reshape("values", (batch, heads, length, value.shape[-1]))
