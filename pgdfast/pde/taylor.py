"""A network and its derivatives with respect to its inputs in one forward pass."""

from __future__ import annotations

import torch

from .nested import check_output
from .stack import Form, Stack, Unsupported


def taylor(net, x: torch.Tensor, directions: torch.Tensor, weights: tuple[tuple[float, ...], ...]) -> tuple[torch.Tensor, ...]:
    """(value, first, second) of a network: (N, O), (K, N, O) and (S, N, O).

    x: (N, d). directions: (K, d) or (K, N, d). weights: (S, K); second derivative s is the sum of those along the directions
    with these weights. Raises Unsupported, with the operation's name, where an operation of the network has no rule.
    """
    count = directions.shape[0]
    form = Form(count, weights)
    if directions.dim() == 2:
        inputs = Stack(tuple(x.shape), form, x, seed=(x.unsqueeze(1), directions))
    else:
        inputs = Stack(tuple(x.shape), form, x, torch.cat([x.unsqueeze(1), directions.transpose(0, 1)], 1))
    u = net(inputs)
    if isinstance(u, Stack):
        if len(u.sizes) == 2:
            channels = u.channels
            return channels[:, 0], channels[:, 1 : 1 + count].transpose(0, 1), channels[:, 1 + count :].transpose(0, 1)
        raise Unsupported(f"an output of {len(u.sizes)} dimension")   # the nested form says what is wrong
    check_output(u, x)   # does not depend on x
    return u, u.new_zeros(count, *u.shape), u.new_zeros(len(weights), *u.shape)
