"""What a closure is known by, and what its result says of the loss and the residual at a point, without derivatives."""

from __future__ import annotations

import contextlib
import functools
import types

import torch


def code_of(closure):
    """What stays the same of a function that is defined anew for every step; None for what is not written in Python."""
    closure = getattr(closure, "given_closure", closure)
    return getattr(closure, "__code__", None) or getattr(type(closure).__call__, "__code__", None)


def functions_in(closure, depth: int = 3) -> tuple:
    """The codes of functions that a closure has in its cells, as those have that a function makes of other functions."""
    inner = []
    for cell in (getattr(closure, "__closure__", None) or ()) if depth else ():
        with contextlib.suppress(ValueError):   # an empty one
            if isinstance(cell.cell_contents, types.FunctionType | types.MethodType | functools.partial):
                inner.append(cell.cell_contents)
    if isinstance(closure, functools.partial):
        inner += [f for f in (closure.func, *closure.args, *closure.keywords.values()) if hasattr(f, "__code__")]
    return tuple([code for f in inner for code in (code_of(f), *functions_in(f, depth - 1))])


def loss_at(result, scalar: bool) -> torch.Tensor:
    """The loss, 0-dim, detached, of what a closure returned; scalar: a result of one entry is the loss, whatever its shape."""
    if isinstance(result, torch.Tensor) and (scalar or result.dim() == 0):
        return result.detach().reshape(())
    return half_square(result)


def half_square(result) -> torch.Tensor:
    """1/2 ||r||^2 of residual tensors, 0-dim, float64, detached; summed as a linearization does, to the bit."""
    parts = [part.detach().reshape(-1) for part in (result if isinstance(result, (tuple, list)) else [result])]
    r = (parts[0] if len(parts) == 1 else torch.cat(parts)).double()
    return torch.dot(r, r) * 0.5


def values_of(result, tracer, scalar: bool) -> tuple[float, torch.Tensor]:
    """(loss, residual (M,)) of a closure's result, without derivatives; a scalar's stand on its tape."""
    if scalar:
        with torch.enable_grad():
            result = result.reshape(()) if result.dim() else result
        trace = tracer.trace(result)
        return trace.value, trace.residual
    residual = flat_residuals(result)
    return 0.5 * float(residual.double().square().sum()), residual


def flat_residuals(result) -> torch.Tensor:
    """The residual tensors of a closure's result as one vector."""
    parts = result if isinstance(result, (tuple, list)) else [result]
    return torch.cat([part.detach().reshape(-1) for part in parts])
