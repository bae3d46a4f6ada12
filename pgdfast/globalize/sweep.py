"""Several dampings tried at every step: the best of their trial points.

All solves share the linearisation, and all trial losses one batched run of the closure where it allows that (together.py). The
point that is chosen is then evaluated as any other trial, so that its loss is the closure's own.
"""

from __future__ import annotations

import math

from .together import agrees, losses_together
from .trial import Trials


def best(trials: Trials, solutions, constraint: float | None) -> int:
    """The number of the Solution whose trial point has the least loss; the largest mu where none is below the loss before.

    trials: of the step; it knows the loss of the chosen point afterwards, and the parameters are back. constraint: the norm
    constraint, or None. Cost: one run of the closure for all K points and one for the best, or one for each.
    """
    usable = [k for k, s in enumerate(solutions) if s.usable]
    if len(usable) < 2:
        return usable[0] if usable else max(range(len(solutions)), key=lambda k: solutions.damping[k])
    loss = float(trials.lin.loss)

    def chosen(losses: dict[int, float]) -> int:
        k = min(losses, key=losses.get)
        return k if losses[k] < loss else max(losses, key=lambda k: solutions.damping[k])

    def at(k: int) -> float:
        trials.move.constrain(solutions[k].step, constraint)
        value = trials.along(solutions[k].step)
        return value if math.isfinite(value) else math.inf

    displacements = []
    for k in usable:
        trials.move.constrain(solutions[k].step, constraint)
        displacements.append(trials.move.scaled(solutions[k].step))
    together = losses_together(trials, displacements)
    if together is not None:
        losses = dict(zip(usable, together, strict=True))
        k = chosen(losses)
        value = at(k)
        if not agrees(trials, losses[k], value):
            together = None
    if together is None:
        losses = {k: at(k) for k in usable}
        k = chosen(losses)
        value = losses[k]
    trials.move.undo()
    trials.lin.parameters_unchanged()
    trials.know(solutions[k].step, value)
    return k
