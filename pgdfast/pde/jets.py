"""jet and laplacian: what a residual of a differential equation is made of."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .nested import nested
from .stack import Unsupported
from .taylor import taylor

_announced: set[str] = set()


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
    vectors (K, d); or vectors of each point's own, (K, N, d). order: 1 or 2, for all directions or one for each: with t as
    coordinate 0, `u, (u_t, u_x), (u_xx,) = jet(net, x, [0, 1], order=[1, 2])`.
    A mixed derivative follows from three: u_xy = (D2(e_x + e_y) - u_xx - u_yy) / 2.

    One forward pass of Taylor mode, some 1 + K + K2 times the network's own, where the network is made of operations that
    have a rule (pgdfast/pde/stack.py): linear layers, activations, sums, products, concatenation, columns. Others take
    nested autograd, announced once by name. Differentiable with respect to parameters and x, any number of times.
    Source: Griewank and Walther, Evaluating Derivatives (2008), chapter 13.

    Raises ValueError for x, directions or orders of other forms.
    """
    directions, orders = _directions(x, directions, order)
    weights = tuple(tuple(float(k == j) for j in range(len(orders))) for k, o in enumerate(orders) if o == 2)
    return Jet(*_derivatives(net, x, directions, weights))


def laplacian(net, x: torch.Tensor, coordinates=None) -> Laplacian:
    """Value, gradient and Laplacian of a network with respect to its inputs, as `jet` computes them.

    net: maps (N, d) to (N, O), each row by itself. x: (N, d) points. coordinates: those that the Laplacian runs over, all by
    default; the gradient is with respect to all: `u, (u_t, u_x, u_y), lap = laplacian(net, x, coordinates=[1, 2])`.
    The second derivatives travel as their sum: 2 + d channels (the forward Laplacian of Li et al., arXiv 2307.08214).

    Raises ValueError for x or coordinates of other forms.
    """
    _check_points(x)
    count = x.shape[1]
    over = set(range(count)) if coordinates is None else set(_coordinates(coordinates, count))
    if not over:
        raise ValueError("pgdfast.pde.laplacian: coordinates is empty; name at least one, or leave it out for all.")
    weights = (tuple(float(k in over) for k in range(count)),)
    directions = _coordinate_directions(x, range(count))
    u, du, d2u = _derivatives(net, x, directions, weights)
    return Laplacian(u, du, d2u[0])


def _derivatives(net, x, directions, weights):
    """(value, first, second), by Taylor mode where the network allows it."""
    try:
        return taylor(net, x, directions, weights)
    except Unsupported as missing:
        _announce(str(missing))
    return nested(net, x, directions, weights)


def _check_points(x) -> None:
    if not isinstance(x, torch.Tensor) or x.dim() != 2 or not x.is_floating_point():
        given = f"shape {tuple(x.shape)} of {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"pgdfast.pde: x is {given}; it must be a floating-point tensor (N, d) of N points.")


def _directions(x, directions, order) -> tuple[torch.Tensor, list[int]]:
    """Directions as a tensor, (K, d) or (K, N, d), and the order of each."""
    _check_points(x)
    points, count = x.shape
    if isinstance(directions, torch.Tensor) and directions.is_floating_point():
        if directions.shape[1:] not in ((count,), (points, count)):
            raise ValueError(
                f"pgdfast.pde.jet: directions have shape {tuple(directions.shape)} for points {tuple(x.shape)}; they must be "
                f"(K, {count}), or (K, {points}, {count}) with one vector for each point."
            )
        directions = directions.to(x)
    else:
        directions = _coordinate_directions(x, _coordinates(directions, count))
    if not len(directions):
        raise ValueError("pgdfast.pde.jet: directions is empty; name at least one coordinate or vector.")
    orders = list(order) if isinstance(order, Iterable) else [order] * len(directions)
    if len(orders) != len(directions) or any(o not in (1, 2) for o in orders):
        raise ValueError(
            f"pgdfast.pde.jet: order is {order!r} for {len(directions)} direction(s); it must be 1 or 2, or one of them for "
            "each direction. Higher ones follow by differentiating the result with torch.autograd.grad."
        )
    return directions, orders


def _coordinates(given, count: int) -> list[int]:
    """Numbers of coordinates, counted from 0."""
    numbers = given.tolist() if isinstance(given, torch.Tensor) else list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(k, int) and -count <= k < count for k in numbers):
        raise ValueError(
            f"pgdfast.pde: {given!r} does not name coordinates of points with {count}; give integers below {count}, or "
            "vectors as a floating-point tensor."
        )
    return [k % count for k in numbers]


def _coordinate_directions(x: torch.Tensor, coordinates) -> torch.Tensor:
    return _unit_vectors(x.shape[1], tuple(coordinates), x.dtype, x.device)


@lru_cache(maxsize=64)
def _unit_vectors(count: int, coordinates: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.eye(count, dtype=dtype, device=device)[list(coordinates)]


def _announce(operation: str) -> None:
    if any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack()):
        return   # somebody, such as the reference's float64, changes every operation: no fault of the network's
    if operation not in _announced:
        _announced.add(operation)
        warnings.warn(
            f"pgdfast.pde: no Taylor rule for {operation}; this network's derivatives take nested autograd, slower.",
            stacklevel=4,
        )
