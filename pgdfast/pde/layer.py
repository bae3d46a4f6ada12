"""One layer in Taylor mode: all channels of a stack through y = g(x W^T + b) at once.

A stack holds, per point, the channels of a quantity: its value, K first derivatives and S second ones; (N, C, width) with
C = 1 + K + S. Elementwise, y = g(z) has y_k = g' z_k and y_s = g' z_s + g'' sum_k weights[s][k] z_k^2 (csrc/cpu/jet.h).
Source: Griewank and Walther, Evaluating Derivatives (2008), chapter 13; the sum of squares instead of one channel per
direction is the forward Laplacian of Li et al., arXiv 2307.08214.
"""

from __future__ import annotations

import torch

from ..kernels import native
from .activations import KINDS, derivatives


def layer(x, weight, bias, weights: tuple[tuple[float, ...], ...], directions: int, activation: str, scale: float):
    """activation(scale (x W^T + b)) of a stack, (N, C, out).

    x: (N, C, in), or (N, 1 + K, in) where the second derivatives are zero. weight: (out, in). bias: (out) or None.
    weights: (S, K). directions: K. The identity takes no scale.
    """
    if native.applies_to_jets(x, weight, bias):
        return JetLayer.apply(x, weight, bias, weights, directions, activation, scale)
    return plain_layer(x, weight, bias, weights, directions, activation, scale)


def plain_layer(x, weight, bias, weights, directions, activation, scale):
    """The same by PyTorch's own operations: the reference, and the form for other devices and for double backward."""
    z = x @ weight.T
    if bias is not None:
        z = torch.cat([z[:, :1] + bias, z[:, 1:]], 1)
    if activation == "identity":
        return padded(z, 1 + directions + len(weights))
    value, first, second = z[:, :1], z[:, 1 : 1 + directions], z[:, 1 + directions :]
    y, slope, curve = derivatives(activation, scale * value)
    slope, curve = scale * slope, scale * scale * curve
    parts = [y, slope * first]
    if weights:
        squares = torch.einsum("nkw,sk->nsw", first * first, torch.tensor(weights, dtype=z.dtype, device=z.device))
        parts.append(curve * squares + slope * second if second.shape[1] else curve * squares)
    return torch.cat(parts, 1)


def padded(stack: torch.Tensor, channels: int) -> torch.Tensor:
    """A stack with the second derivatives that it lacks, zero."""
    missing = channels - stack.shape[1]
    return torch.cat([stack, stack.new_zeros(len(stack), missing, *stack.shape[2:])], 1) if missing else stack


class JetLayer(torch.autograd.Function):
    """`layer` by the C++ core. The tape keeps what its rule (pgdfast/tape/rules/jets.py) and both backwards need."""

    @staticmethod
    def forward(ctx, x, weight, bias, weights, directions, activation, scale):
        """See `layer`; x and weight are on the CPU, of one dtype, float32 or float64."""
        x, weight = x.contiguous(), weight.contiguous()
        points, width, keep = len(x), len(weight), any(ctx.needs_input_grad) and activation != "identity"
        y = x.new_empty(points, 1 + directions + len(weights), width)
        coefficients = [x.new_empty(points, n, width) for n in (1, directions, len(weights))] if keep else [None] * 3
        native.jet_layer(x, weight, bias, weights, directions, KINDS.index(activation), scale, y, *coefficients)
        ctx.save_for_backward(x, weight, bias, *coefficients)
        ctx.form = weights, directions, activation, scale
        return y

    @staticmethod
    def backward(ctx, y_bar):
        """Cotangents of x, weight and bias: one pass of the core and two matrix products."""
        if torch.is_grad_enabled():   # a backward of this backward is wanted
            return *_differentiable(ctx, y_bar), None, None, None, None
        x, weight, bias, *coefficients = ctx.saved_tensors
        weights, directions, activation, _ = ctx.form
        z_bar = y_bar.contiguous()
        if activation != "identity":
            z_bar = native.jet_adjoint(weights, directions, *coefficients, z_bar)
        z_bar = z_bar[:, : x.shape[1]]
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        return (
            z_bar @ weight if need_x else None,
            z_bar.flatten(0, 1).T @ x.flatten(0, 1) if need_weight else None,
            z_bar[:, 0].sum(0) if need_bias else None,
            None, None, None, None,
        )


def _differentiable(ctx, y_bar):
    """The same cotangents through the plain form's graph."""
    # Aliases: x may itself depend on the weight, and that way is not this layer's.
    given = [None if t is None else t.view_as(t) for t in ctx.saved_tensors[:3]]
    wanted = [t for t, need in zip(given, ctx.needs_input_grad, strict=False) if need]
    y = plain_layer(*given, *ctx.form)
    found = iter(torch.autograd.grad(y, wanted, y_bar, create_graph=True))
    return [next(found) if need else None for need in ctx.needs_input_grad[:3]]
