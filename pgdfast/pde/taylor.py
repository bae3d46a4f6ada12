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
    along = directions.transpose(0, 1) if directions.dim() == 3 else directions.expand(len(x), *directions.shape)
    count = len(directions)
    u = net(Stack(torch.cat([x.unsqueeze(1), along], 1), Form(count, weights)))
    if isinstance(u, Stack):
        if u.dim() == 2:
            channels = u.channels
            return channels[:, 0], channels[:, 1 : 1 + count].transpose(0, 1), channels[:, 1 + count :].transpose(0, 1)
        raise Unsupported(f"an output of {u.dim()} dimension")   # the nested form says what is wrong
    check_output(u, x)   # does not depend on x
    return u, u.new_zeros(count, *u.shape), u.new_zeros(len(weights), *u.shape)
