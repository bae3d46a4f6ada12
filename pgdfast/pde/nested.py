"""Derivatives with respect to the inputs by nested reverse-mode autograd: the form that any differentiable function has."""

from __future__ import annotations

import torch


def nested(net, x: torch.Tensor, directions: torch.Tensor, weights: tuple[tuple[float, ...], ...]) -> tuple[torch.Tensor, ...]:
    """(value, first, second) of a network: (N, O), (K, N, O) and (S, N, O), as pgdfast.pde.taylor gives them.

    One backward pass per output for all first derivatives, and one per output and direction for the second ones, each
    through the graph of the one before.
    """
    keep = torch.is_grad_enabled()
    twice = [any(row[k] for row in weights) for k in range(len(directions))]
    with torch.enable_grad():
        inputs = x if keep and x.requires_grad else x.detach().requires_grad_()
        u = net(inputs)
        check_output(u, x)
        first, second = [], []
        for output in range(u.shape[1]):
            slope = _gradient(u[:, output], inputs, keep or any(twice))
            along = [(slope * direction).sum(1) for direction in directions]
            curves = [
                (_gradient(value, inputs, keep) * direction).sum(1) if wanted else None
                for value, direction, wanted in zip(along, directions, twice, strict=True)
            ]
            first.append(torch.stack(along))
            sums = [sum(w * c for w, c in zip(row, curves, strict=True) if w) for row in weights]
            second.append(torch.stack(sums) if sums else u.new_empty(0, len(x)))
        jets = u, torch.stack(first, 2), torch.stack(second, 2)
    return jets if keep else tuple(part.detach() for part in jets)


def _gradient(values: torch.Tensor, x: torch.Tensor, create_graph: bool) -> torch.Tensor:
    """The gradient of each value with respect to its row of x, (N, d); zero where there is none."""
    if not values.requires_grad:
        return torch.zeros_like(x)
    gradient, = torch.autograd.grad(values.sum(), x, create_graph=create_graph, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient


def check_output(u, x) -> None:
    """Raise ValueError unless u is (N, O)."""
    if not isinstance(u, torch.Tensor) or u.dim() != 2 or len(u) != len(x):
        given = f"shape {tuple(u.shape)}" if isinstance(u, torch.Tensor) else type(u).__name__
        raise ValueError(
            f"pgdfast.pde: the network gave {given} for {len(x)} points; it must give ({len(x)}, O), one row for each point."
        )
