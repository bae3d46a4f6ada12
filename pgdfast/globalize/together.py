"""The losses at several trial points by one run of the closure under torch.func.vmap.

The closure holds the module's parameters. A TorchFunctionMode puts the points in their place in every operation, by identity;
vmap gives all of them a leading dimension. Closures that vmap refuses (.item(), branches on data, operations without a rule),
and those whose loss comes out different, because they reach parameters by another way, are remembered by their code and run
point by point.
"""

from __future__ import annotations

import math
import warnings
import weakref

import torch
from torch.overrides import TorchFunctionMode

from .draws import code_of

_ROUNDING = 1e3   # times the rounding unit: what the order of sums may change in a loss
# Code of closures that do not run for many points at once.
_apart: weakref.WeakSet = weakref.WeakSet()


class _Instead(TorchFunctionMode):
    """Every operation takes `points` in place of `params`."""

    def __init__(self, params, points):
        super().__init__()
        self._points = {id(p): point for p, point in zip(params, points, strict=True)}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Run the operation on the points."""
        return function(*self._replaced(args), **self._replaced(kwargs or {}))

    def _replaced(self, value):
        if isinstance(value, torch.Tensor):
            return self._points.get(id(value), value)
        if type(value) in (tuple, list):
            return type(value)([self._replaced(v) for v in value])
        if type(value) is dict:
            return {key: self._replaced(v) for key, v in value.items()}
        return value


def losses_together(trials, displacements: list[torch.Tensor]) -> list[float] | None:
    """The losses at theta - e for each displacement e, (P,), infinite where not finite; None where they must be found apart.

    Cost: one run of the closure on K times the numbers. Random numbers are those of the linearisation, the same for all points.
    """
    code = code_of(trials.closure)
    if code is None or code in _apart:
        return None
    params = trials.move.params
    rows = torch.stack(displacements)
    with torch.no_grad():
        parts = rows.split([p.numel() for p in params], dim=1)
        points = [p.detach() - part.reshape(-1, *p.shape).to(p.dtype) for p, part in zip(params, parts, strict=True)]

    def loss(*points):
        with _Instead(params, points), torch.enable_grad():
            result = trials.closure()
            if isinstance(result, torch.Tensor) and result.dim() == 0:
                return result.detach()
            parts = result if isinstance(result, (tuple, list)) else [result]
            return 0.5 * sum(part.detach().double().square().sum() for part in parts)

    try:
        with trials.replayed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")   # of operations that vmap takes one by one
            found = torch.func.vmap(loss, randomness="same")(*points).double().tolist()
    except Exception:   # noqa: BLE001 - what the closure itself raises, it raises again point by point
        _apart.add(code)
        return None
    return [value if math.isfinite(value) else math.inf for value in found]


def agrees(trials, together: float, alone: float) -> bool:
    """Whether a loss of `losses_together` is the closure's own; if not, it is no longer asked for."""
    eps = torch.finfo(trials.lin.loss.dtype).eps
    size = max(abs(float(trials.lin.loss)), abs(alone))
    same = together == alone or abs(together - alone) <= _ROUNDING * eps * size
    if not same:
        _apart.add(code_of(trials.closure))
    return same
