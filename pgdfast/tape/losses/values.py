"""The value of every term of a loss at its tape, without derivatives: from what nodes have saved."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..rules.table import plain
from ..walk import Tape
from .blocks import Form, Route, unrolled
from .shares import closed

_NORMS = {"LinalgVectorNormBackward0", "StdBackward0", "DistBackward0"}
_REDUCTIONS = ("none", "mean", "sum")


def term_values(tape: Tape, form: Form, rest: float) -> list[float] | None:
    """The value of each block's term, up to a constant; None where more than one cannot be had that depends on data.

    rest: the loss without its quadratic penalties, of which what is left over is the value of those that cannot.
    """
    values = [_value(tape, block, route) for block, route in zip(form.blocks, form.routes, strict=True)]
    unknown = [k for k, v in enumerate(values) if v is None]
    if len(unknown) > 1 and any(closed(tape, form.blocks[k].edges, set()) != "parameters" for k in unknown):
        return None
    left = rest - sum(v for v in values if v is not None)
    for k in unknown:   # several count once, all of them together
        values[k], left = left, 0.0
    return values


def half_squares(residual: torch.Tensor) -> float:
    """1/2 ||r||^2 in float64."""
    return 0.5 * float(plain(residual).detach().double().square().sum())


def _value(tape: Tape, block, route: Route) -> float | None:
    steps = unrolled(route.chains[0])
    if not block.residual.numel():
        return 0.0
    if len(route.chains) > 1 and not isinstance(steps[0][-1], int):
        return None
    steps = steps[0]
    if "coupled" in steps or any(isinstance(step, tuple) for step in steps[:-1]):
        return None
    if isinstance(steps[-1], tuple):
        return half_squares(block.residual) if block.squares else None
    position, node = steps[-1], tape.nodes[steps[-1]]
    kind, weight = tape.kind(position), route.weight
    weight = weight if weight is None or isinstance(weight, torch.Tensor) else torch.tensor(weight, dtype=torch.float64)
    if kind in _NORMS or (kind == "AbsBackward0" and block.squares):
        if not (len(steps) > 1 and isinstance(steps[-2], int) and _squares(tape, steps[-2], position)):
            result = plain(node._saved_self).abs() if kind[0] == "A" else node._saved_result
            return _product(weight, result)
        return half_squares(block.residual)
    if kind == "LogSoftmaxBackward0":
        return -_product(weight, node._saved_result)
    if kind == "SoftmaxBackward0":
        return _product(weight, node._saved_result)
    if block.squares:
        return half_squares(block.residual)
    if kind == "AbsBackward0":
        return _product(weight, plain(node._saved_self).abs())
    found = _LOSSES.get(kind)
    if found is None:
        return None
    return _product(weight, found(node, _REDUCTIONS[node._saved_reduction]))


def _squares(tape: Tape, above: int, position: int) -> bool:
    """Whether a node squares what another puts out."""
    users = [e for e in tape.edges[above] if e is not None and e[0] == position]
    return bool(users) and (tape.kind(above) == "PowBackward0" or len(users) == 2)


def _product(weight: torch.Tensor, result) -> float:
    """The sum of weight * result; what has no weight may be infinite."""
    result = plain(result).detach().double()
    weight = weight.detach().to(result).expand_as(result)
    return float(torch.where(weight == 0, 0.0, weight * result).sum())


def _double(t):
    return None if t is None else plain(t).detach().double()


def _huber(node, reduction: str):
    return F.huber_loss(_double(node._saved_self), _double(node._saved_target), reduction, float(node._saved_delta))


def _smooth_l1(node, reduction: str):
    z, target = _double(node._saved_self), _double(node._saved_target)
    return F.smooth_l1_loss(z, target, reduction=reduction, beta=float(node._saved_beta))


def _binary_cross_entropy(node, reduction: str):
    return F.binary_cross_entropy_with_logits(
        _double(node._saved_self), _double(node._saved_target), _double(node._saved_weight), reduction=reduction,
        pos_weight=_double(node._saved_pos_weight),
    )


_LOSSES = {
    "HuberLossBackward0": _huber,
    "SmoothL1LossBackward0": _smooth_l1,
    "BinaryCrossEntropyWithLogitsBackward0": _binary_cross_entropy,
}
