"""Layers that normalize by statistics of a batch or of groups of channels, and weights that are normalized."""

from __future__ import annotations

import math

from ..program import UnsupportedStructure
from .table import rule, signed


def _by_channel(t, dims: int):
    """A tensor (channels,) that broadcasts against (samples, channels, *positions)."""
    return t.view(-1, *[1] * (dims - 2))


@rule("NativeBatchNormBackward0", saved="eps input result1 result2 running_mean running_var training weight")
def batch_norm(op, eps, x, mean, rstd, running_mean, running_var, training, weight):
    """Of n = (x - mean) rstd, by channel: w n + b.

    The batch's own statistics are temporaries of one number a channel: all else separates by sample.
    """
    dims = x.dim()
    if not training:
        mean, rstd = running_mean, (running_var + eps).rsqrt()
    mean, rstd = _by_channel(mean, dims), _by_channel(rstd, dims)
    n = (x - mean) * rstd
    scale = rstd if weight is None else rstd * _by_channel(weight, dims)
    if op.needs[0]:
        op.scale(0, scale)
        if training:
            channels, others = x.shape[1], (0, *range(2, dims))
            share = channels / max(x.numel(), 1)
            for name, along in (("mean", None), ("spread", n)):
                op.temporary(name, (channels,))
                op.sum(0, others, False, c=along, alpha=share, out=name)
                op.view(name, lambda t: _by_channel(t, dims), out=name)
            op.scale("mean", -scale)
            op.scale("spread", -scale * n)
    if op.needs[1]:
        op.view(1, lambda t: _by_channel(t, dims), out="weight")
        op.scale("weight", n)
    if op.needs[2]:
        op.view(2, lambda t: _by_channel(t, dims), out="bias")
        op.add("bias")


@rule("NativeGroupNormBackward0", saved="group input result1 result2 weight")
def group_norm(op, groups, x, mean, rstd, weight):
    """Of n = (x - mean) rstd, by sample and group of channels: w n + b."""
    dims = x.dim()
    shape = (x.shape[0], groups, x[0].numel() // groups if len(x) else 0)
    n = ((x.reshape(shape) - mean.view(*shape[:2], 1)) * rstd.view(*shape[:2], 1)).view(x.shape)
    if op.needs[0]:
        scale = rstd.view(*shape[:2], 1)
        if weight is not None:
            scale = (_by_channel(weight, dims).expand(x.shape)).reshape(shape) * scale
        grouped = n.view(shape)
        op.temporary("result", x.shape)
        op.reshape(0, shape, out="input")
        op.view("result", lambda t: t.view(shape), out="groups")
        op.project("input", (2,), scale, ((None, None), (grouped, grouped)), alpha=1 / max(shape[2], 1), out="groups")
        op.view("result", lambda t: t)
    if op.needs[1]:
        op.view(1, lambda t: _by_channel(t, dims), out="weight")
        op.scale("weight", n)
    if op.needs[2]:
        op.view(2, lambda t: _by_channel(t, dims), out="bias")
        op.add("bias")


@rule("WeightNormInterfaceBackward0", saved="dim g result1 v")
def weight_norm(op, dim, g, norm, v):
    """Of g v / |v|, norms over all dimensions but one."""
    kept = signed(dim) % v.dim()
    others = tuple(d for d in range(v.dim()) if d != kept)
    if op.needs[0]:
        op.project(0, others, g / norm, ((v, v / (norm * norm)),))
    if op.needs[1]:
        op.scale(1, v / norm)


# Double-backward nodes. Of n = (x - mean) rstd over some dimensions D, h = w g, m = mean_D h and a = mean_D (n h):
# f(g, x, w) = rstd (h - m - n a).


def _normalized_backward(op, inputs, g, n, rstd, weight, dims) -> None:
    """Numbers of inputs g, x and w; weight: that broadcasts against g, or None."""
    at_g, at_x, at_w = inputs
    share = 1 / max(math.prod(g.shape[d] for d in dims), 1)
    kept = [1 if d in [k % g.dim() for k in dims] else size for d, size in enumerate(g.shape)]

    def add_mean(i, factor, c, name):
        """Out += c mean_D (factor in_i)."""
        op.temporary(name, kept)
        op.sum(i, dims, True, c=factor, alpha=share, out=name)
        op.scale(name, c)

    h = g if weight is None else g * weight
    if op.needs[at_g]:
        scale = rstd if weight is None else rstd * weight
        op.scale(at_g, scale)
        add_mean(at_g, weight, -rstd, "mean of g")
        add_mean(at_g, n if weight is None else n * weight, -rstd * n, "spread of g")
    if at_w is not None and op.needs[at_w]:
        op.view(at_w, lambda t: t.view(weight.shape).expand(g.shape), out="weight")
        op.scale("weight", rstd * g)
        add_mean("weight", g, -rstd, "mean of w")
        add_mean("weight", n * g, -rstd * n, "spread of w")
    if op.needs[at_x]:
        m, a = h.mean(dims, keepdim=True), (n * h).mean(dims, keepdim=True)
        squared = rstd * rstd
        op.scale(at_x, -squared * a)
        add_mean(at_x, None, squared * (a + n * m), "mean of x")
        add_mean(at_x, n, squared * (3 * n * a + m - h), "spread of x")
        add_mean(at_x, h, -squared * n, "h and x")


def _by_the_input(used) -> None:
    if any(used):
        raise UnsupportedStructure("the derivative of a normalization by its weight or bias, differentiated")


@rule("NativeLayerNormBackwardBackward0", saved="grad_out input mean normalized_shape rstd weight", used=True)
def layer_norm_backward(op, g, x, mean, shape, rstd, weight, used):
    """By row."""
    _by_the_input(used)
    dims = tuple(range(-len(shape), 0))
    weight = None if weight is None else weight.view(*[1] * (x.dim() - len(shape)), *weight.shape)
    _normalized_backward(op, (0, 1, 4), g, (x - mean) * rstd, rstd, weight, dims)


@rule("NativeBatchNormBackwardBackward0",
      saved="eps grad_out input running_mean running_var save_invstd save_mean train weight", used=True)
def batch_norm_backward(op, eps, g, x, running_mean, running_var, rstd, mean, training, weight, used):
    """By channel; with running statistics it is g times a number."""
    _by_the_input(used)
    dims = x.dim()
    weight = None if weight is None else _by_channel(weight, dims)[None]
    if training:
        mean, rstd = _by_channel(mean, dims), _by_channel(rstd, dims)
        _normalized_backward(op, (0, 1, 2), g, (x - mean) * rstd, rstd[None], weight, (0, *range(2, dims)))
        return
    rstd = _by_channel((running_var + eps).rsqrt(), dims)
    if op.needs[0]:
        op.scale(0, rstd if weight is None else rstd * weight)
    if weight is not None and op.needs[2]:
        op.view(2, lambda t: t.view(weight.shape), out="weight")
        op.scale("weight", rstd * g)
    if not op.needs[0] and not (weight is not None and op.needs[2]):
        op.scale(1, 0.0)
