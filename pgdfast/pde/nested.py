"""Derivatives with respect to the inputs by nested reverse-mode autograd: the form that any differentiable function has."""

from __future__ import annotations

import torch


def nested(net, x: torch.Tensor, directions: torch.Tensor, orders: list[int]) -> tuple[torch.Tensor, ...]:
    """(u, du, d2u) as pgdfast.pde.jet gives them.

    x: (N, d). directions: (K, d) or (K, N, d). orders: 1 or 2 per direction. One backward pass per output for all first
    derivatives, and one per output and direction of order 2, each through the graph of the one before.
    """
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = x if keep and x.requires_grad else x.detach().requires_grad_()
        u = net(inputs)
        more = 2 in orders
        first, second = [], []
        for output in range(u.shape[1]):
            slope = _gradient(u[:, output], inputs, keep or more)
            along = [(slope * direction).sum(1) for direction in directions]
            first.append(torch.stack(along))
            curves = [
                (_gradient(value, inputs, keep) * direction).sum(1)
                for value, direction, order in zip(along, directions, orders, strict=True) if order == 2
            ]
            second.append(torch.stack(curves) if curves else u.new_empty(0, len(x)))
    jets = u, torch.stack(first, 2), torch.stack(second, 2)
    return jets if keep else tuple(part.detach() for part in jets)


def _gradient(values: torch.Tensor, x: torch.Tensor, create_graph: bool) -> torch.Tensor:
    """The gradient of each value with respect to its row of x, (N, d); zero where there is none."""
    if not values.requires_grad:
        return torch.zeros_like(x)
    gradient, = torch.autograd.grad(values.sum(), x, create_graph=create_graph, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient
