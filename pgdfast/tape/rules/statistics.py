"""Layers that normalize by statistics of a batch or of groups of channels, and weights that are normalized."""

from __future__ import annotations

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
