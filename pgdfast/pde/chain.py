"""Chains of layers in Taylor mode: all channels of a stack through y = g(x W^T + b), layer after layer, in one call.

A stack holds, per point, the channels of a quantity: its value, K first derivatives and S second ones; (N, C, width) with
C = 1 + K + S. Elementwise, y = g(z) has y_k = g' z_k and y_s = g' z_s + g'' sum_k weights[s][k] z_k^2 (csrc/cpu/jet.h).
Source: Griewank and Walther, Evaluating Derivatives (2008), chapter 13; the sum of squares instead of one channel per
direction is the forward Laplacian of Li et al., arXiv 2307.08214.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels import native
from .activations import KINDS, derivatives


class Layer(NamedTuple):
    """activation(scale (x W^T + b)); weight: (out, in), bias: (out) or None. The identity takes no scale."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    activation: str = "identity"
    scale: float = 1.0


def chain(x, along, weights: tuple[tuple[float, ...], ...], directions: int, layers: list[Layer]) -> torch.Tensor:
    """The last layer's stack, (N, C, out).

    x: (N, C, in), or (N, 1 + K, in) where the second derivatives are zero; or (N, 1, in) with along, (K, in), the first
    derivatives that all points share. weights: (S, K). directions: K.
    """
    parameters = [t for layer in layers for t in layer[:2]]
    if native.applies_to_jets(x, *parameters):
        forms = [(KINDS.index(layer.activation), layer.scale) for layer in layers]
        contiguous = [t if t is None else t.contiguous() for t in parameters]
        return JetChain.apply(x.contiguous(), along, weights, directions, forms, *contiguous)
    stack = x if along is None else spread(x, along)
    for layer in layers:
        stack = plain_layer(stack, weights, directions, layer)
    return stack


def plain_layer(x, weights, directions: int, layer: Layer) -> torch.Tensor:
    """One layer by PyTorch's own operations: the reference, and the form for other devices and for double backward."""
    z = x @ layer.weight.T
    if layer.bias is not None:
        z = torch.cat([z[:, :1] + layer.bias, z[:, 1:]], 1)
    if layer.activation == "identity":
        return padded(z, 1 + directions + len(weights))
    value, first, second = z[:, :1], z[:, 1 : 1 + directions], z[:, 1 + directions :]
    y, slope, curve = derivatives(layer.activation, layer.scale * value)
    slope, curve = layer.scale * slope, layer.scale**2 * curve
    parts = [y, slope * first]
    if weights:
        squares = torch.einsum("nkw,sk->nsw", first * first, torch.tensor(weights, dtype=z.dtype, device=z.device))
        parts.append(curve * squares + slope * second if second.shape[1] else curve * squares)
    return torch.cat(parts, 1)


def spread(x: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """(N, 1 + K, width) of values (N, 1, width) and derivatives that all points share, (K, width)."""
    return torch.cat([x, along.expand(x.shape[0], *along.shape)], 1)


def padded(stack: torch.Tensor, channels: int) -> torch.Tensor:
    """A stack with the second derivatives that it lacks, zero."""
    points, given, *rest = stack.shape
    return torch.cat([stack, stack.new_zeros(points, channels - given, *rest)], 1) if given < channels else stack


class JetChain(torch.autograd.Function):
    """`chain` by the C++ core, which passes a few points through all layers and writes the result alone.

    What derivatives need of every layer is computed once more when they are wanted: by a backward, or by LM's reading of
    the tape (pgdfast/tape/rules/jets.py). Written down at once it would make every forward pass wait for memory,
    trials that nobody differentiates included (bench/NOTES.md).
    """

    @staticmethod
    def forward(ctx, x, along, weights, directions, forms, *parameters):
        """See `chain`; all tensors are on the CPU, of one dtype, float32 or float64. `along` gets no gradient."""
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, along, *parameters)
            ctx.forms, ctx.weights, ctx.directions = forms, weights, directions
        return native.jet_chain(x, along, parameters, forms, weights, directions)

    @staticmethod
    def backward(ctx, y_bar):
        """Cotangents of x, weights and biases: per layer one pass of the core and two matrix products."""
        if torch.is_grad_enabled():   # a backward of this backward is wanted
            return _differentiable(ctx, y_bar)
        x, along, *parameters = ctx.saved_tensors
        stacks, kept = native.jet_chain(x, along, parameters, ctx.forms, ctx.weights, ctx.directions, keep=True)
        gradients = [None] * len(parameters)
        needed = ctx.needs_input_grad[5:]
        for k in reversed(range(len(ctx.forms))):
            weight, source = parameters[2 * k], stacks[k]
            z_bar = y_bar.contiguous()
            if kept[k] is not None:
                z_bar = native.jet_adjoint(ctx.weights, ctx.directions, kept[k], z_bar)
            if needed[2 * k + 1]:
                gradients[2 * k + 1] = z_bar[:, 0].sum(0)
            given = z_bar[:, : source.shape[1]]
            if needed[2 * k]:
                gradients[2 * k] = given.flatten(0, 1).T @ source.flatten(0, 1)
                if k == 0 and along is not None:
                    gradients[0] += z_bar[:, 1 : 1 + ctx.directions].sum(0).T @ along
            if k > 0 or ctx.needs_input_grad[0]:
                y_bar = given @ weight
        return y_bar if ctx.needs_input_grad[0] else None, None, None, None, None, *gradients


def _differentiable(ctx, y_bar) -> tuple:
    """The same cotangents through the plain form's graph."""
    # Aliases: x may itself depend on the weights, and that way is not this chain's.
    x, along, *parameters = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
    stack = x if along is None else spread(x, along)
    for (kind, scale), weight, bias in zip(ctx.forms, parameters[::2], parameters[1::2], strict=True):
        stack = plain_layer(stack, ctx.weights, ctx.directions, Layer(weight, bias, KINDS[kind], scale))
    need_x, _, _, _, _, *needed = ctx.needs_input_grad
    wanted = [t for t, need in zip([x, *parameters], [need_x, *needed], strict=True) if need]
    found = iter(torch.autograd.grad(stack, wanted, y_bar, create_graph=True))
    first, *rest = [next(found) if need else None for need in [need_x, *needed]]
    return first, None, None, None, None, *rest
