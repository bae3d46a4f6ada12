"""Several dampings tried at every step: the best of their trial points.

All solves share the linearization. One network's trial losses are one batched run of the closure where it allows that; the
point that is chosen is then evaluated as any other trial, so that its loss is the closure's own.
"""

from __future__ import annotations

import math

from .parameters import Point


def best_of(step, member, solutions):
    """Generator of trial points; returns (number of the Solution whose point has the least loss, the loss there).

    Where none is below the loss before, the largest damping's. Cost: one run of the closure for all K points and one for the
    best, or one for each.
    """
    usable = [k for k, s in enumerate(solutions) if s.usable]
    if not usable:
        return max(range(len(solutions)), key=lambda k: solutions.damping[k]), math.nan
    before, parameters, b = member.report.loss, step.parameters, member.number

    def chosen(losses: dict[int, float]) -> int:
        k = min(losses, key=losses.get)
        return k if losses[k] < before else max(losses, key=lambda k: solutions.damping[k])

    def point(k: int) -> Point:
        parameters.constrain(b, solutions[k].step)
        return Point(solutions[k].step)

    if len(usable) > 1 and not parameters.stacked:
        displacements = []
        for k in usable:
            parameters.constrain(b, solutions[k].step)
            displacements.append(parameters.scaled(b, solutions[k].step))
        batched = step.batched_losses(displacements)
        if batched is not None:
            losses = dict(zip(usable, batched, strict=True))
            k = chosen(losses)
            value = _or_infinite((yield point(k)))
            if step.agrees(losses[k], value):
                return k, value
    losses = {}
    for k in usable:
        losses[k] = _or_infinite((yield point(k)))
    k = chosen(losses)
    return k, losses[k]


def _or_infinite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
