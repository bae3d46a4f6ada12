"""D of the damped matrix mu D + J^T J: the identity, or Marquardt's, in which the units of parameters cancel."""

from __future__ import annotations

import torch

# "auto" scales so few parameters whose diag(J^T J) differs so much: those of curve fits, each with a unit of its own. It harms
# networks, even small ones.
FEW, SPREAD = 32, 1e6


def is_scaled(asked: str, before: bool | None, adaptive: bool, lin) -> bool:
    """Whether a network's D is Marquardt's.

    before: what earlier steps have chosen, None at the first. adaptive: does the rule move mu? One that is given is that of
    the identity. lin: the linearization, of whose J^T J the diagonal is taken where there are few parameters.
    """
    if asked != "auto":
        return asked == "marquardt"
    if before is not None:
        return before
    if not adaptive or lin.num_parameters > FEW:
        return False
    diagonal = lin.diagonal()
    reached = diagonal[diagonal > 0].double()
    return reached.numel() > 1 and float(reached.max() / reached.min()) >= SPREAD


def marquardt(diagonal: torch.Tensor, parameters, state, members) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(D, (P,) or (B, P); what is kept of it for the next step, a tensor for each parameter).

    diagonal: of J^T J. state: the optimizer's, by parameter. members: those that are not `scaled` get ones.

    D is the running maximum of the diagonal, as MINPACK's, and 1 where the loss has not reached a parameter. What a region of
    huge derivatives has left in it stays; mu, whose bounds go by the curvature in the norm of D, then falls as far as it must.
    """
    rows, scales = [], []
    for p, reals, part in zip(parameters.params, parameters.reals, diagonal.split(parameters.sizes, -1), strict=True):
        seen, known = part.reshape(reals.shape).to(reals.dtype), state.get(p, {}).get("scale")
        scales.append(seen.clone() if known is None else torch.maximum(known, seen))
        rows.append(scales[-1].reshape(*[parameters.count] * parameters.stacked, -1))
    D = torch.cat(rows, -1)
    D = torch.where(D > 0, D, 1.0)
    for m in members:
        if not m.scaled:
            D[m.number] = 1.0
    return D, scales
