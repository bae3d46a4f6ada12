"""How the residuals of a program separate into rows: by themselves, joined where they meet, by a chain, or not at all."""

from __future__ import annotations

from dataclasses import dataclass

from ..tape.program import PARAMETER, RESIDUAL, Program
from .chain import Chain, chain, shared_layout
from .rows import RowLayout
from .shared_rows import Obstacle, patterns

_SMALL = 16   # products for J up to which there is nothing to say


@dataclass(slots=True)
class Separation:
    """The row layout of a program, or the chain that its kernels need for one; else why there is neither."""

    layout: RowLayout | None
    chain: Chain | None = None
    reason: str = ""


def separation(program: Program, constants, chains: bool = True) -> Separation:
    """The cheapest way to make J of a program by rows.

    constants: those of the linearization, which matter where the program gathers from its workspace. chains: may the kernels be
    those of two programs?
    """
    if not any(shape.numel() for shape in program.residual_shapes):
        return Separation(None)
    layout = shared_layout(program, constants)
    if layout is not None:
        return Separation(layout)
    best, obstacles = None, []
    for found in patterns(program, constants, cutting=True) if chains else ():
        if isinstance(found, Obstacle):
            obstacles.append(found)
            continue
        made = chain(program, found, constants)
        if made is not None and (best is None or made.cost < best.cost):
            best = made
    if best is not None:
        return Separation(best.rows(program), best)
    return Separation(None, None, _reason(program, obstacles))


def _reason(program: Program, obstacles: list[Obstacle]) -> str:
    M, P = sum(program.sizes(RESIDUAL)), sum(program.sizes(PARAMETER))
    if min(M, P) <= _SMALL:
        return ""
    cost = f"the Jacobian takes {min(M, P)} products"
    if obstacles:
        o = max(obstacles, key=lambda o: o.mixes)
        where = _place(program, o.residual)
        if o.mixes:
            return (
                f"{where} goes through an operation that mixes all points (a softmax or normalization over the batch), so "
                f"{cost}; normalize over the features of a point, or with statistics under torch.no_grad()."
            )
        return (
            f"{where} shares points with {o.rows} others (a mean, an integral, a difference over the points), and too "
            f"many residuals are like it, so {cost}; keep such residuals to a few dozen, or give them points of their own."
        )
    return (
        "the residuals share quantities that depend on many points or on most parameters (statistics of a batch, a mixture of "
        f"all points), so {cost}; compute those under torch.no_grad(), or on points of their own, where the problem allows it."
    )


def _place(program: Program, residual: int) -> str:
    for number, shape in enumerate(program.residual_shapes):
        if residual < shape.numel():
            return f"residual {residual} of tensor {number}" if len(program.residual_shapes) > 1 else f"residual {residual}"
        residual -= shape.numel()
    return "a residual"
