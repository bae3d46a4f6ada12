"""jet and laplacian: what a residual of a differential equation is made of."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .nested import nested


class Jet(NamedTuple):
    """A function and its derivatives along K directions at N points, O outputs each.

    value: (N, O). first: (K, N, O). second: (K2, N, O), of the K2 directions of order 2, in their order.
    """

    value: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor


class Laplacian(NamedTuple):
    """A function, its gradient and its Laplacian at N points, O outputs each.

    value: (N, O). gradient: (d, N, O), by coordinate. laplacian: (N, O).
    """

    value: torch.Tensor
    gradient: torch.Tensor
    laplacian: torch.Tensor


def jet(net, x: torch.Tensor, directions, order=2) -> Jet:
    """Value, first and second derivatives of a network along directions of its inputs.

    net: maps (N, d) to (N, O), each row by itself. x: (N, d) points. directions: numbers of coordinates, e.g. [0, 1]; or
    vectors (K, d); or vectors of each point's own, (K, N, d). order: 1 or 2, for all directions or one for each: with
    t as coordinate 0, jet(net, x, [0, 1], order=[1, 2]) gives u, (u_t, u_x), (u_xx,).

    A mixed derivative follows from three: u_xy = (D2(e_x + e_y) - u_xx - u_yy) / 2.

    Raises ValueError for x, directions or orders of other forms.
    """
    directions, orders = _directions(x, directions, order)
    return Jet(*nested(net, x, directions, orders))


def laplacian(net, x: torch.Tensor, coordinates=None) -> Laplacian:
    """Value, gradient and Laplacian of a network with respect to its inputs.

    net: maps (N, d) to (N, O), each row by itself. x: (N, d) points. coordinates: those that the Laplacian runs over,
    all by default; the gradient is with respect to all. `u, (u_t, u_x, u_y), lap = laplacian(net, x, coordinates=[1, 2])`.

    Raises ValueError for x or coordinates of other forms.
    """
    _check_points(x)
    over = list(range(x.shape[1])) if coordinates is None else list(coordinates)
    directions, orders = _directions(x, list(range(x.shape[1])), [2 if k in over else 1 for k in range(x.shape[1])])
    u, du, d2u = nested(net, x, directions, orders)
    return Laplacian(u, du, d2u.sum(0))


def _check_points(x) -> None:
    if not isinstance(x, torch.Tensor) or x.dim() != 2 or not x.is_floating_point():
        given = f"shape {tuple(x.shape)} of {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"pgdfast.pde: x is {given}; it must be a floating-point tensor (N, d) of N points.")


def _directions(x: torch.Tensor, directions, order) -> tuple[torch.Tensor, list[int]]:
    _check_points(x)
    if not isinstance(directions, torch.Tensor):
        directions = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[list(directions)]
    orders = [order] * len(directions) if isinstance(order, int) else list(order)
    return directions.to(x), orders
