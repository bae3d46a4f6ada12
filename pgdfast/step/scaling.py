"""D of the damped matrix mu D + J^T J: the identity, or Marquardt's, in which the units of parameters cancel."""

from __future__ import annotations

import torch

# "auto" scales so few parameters whose diag(J^T J) differs so much: those of curve fits, each with a unit of its own. It harms
# networks, even small ones.
FEW, SPREAD = 32, 1e6
_FALL = 0.5   # what a step leaves of D where diag(J^T J) has fallen


def chosen_scaling(asked: str, before: str | None, adaptive: bool, lin) -> str:
    """The scaling of a network.

    before: what earlier steps have chosen. adaptive: does the rule move mu? One that is given is that of the identity. lin: the
    linearization, of whose J^T J the diagonal is taken where there are few parameters.
    """
    if asked != "auto":
        return asked
    if before or not adaptive or lin.num_parameters > FEW:
        return before or "identity"
    diagonal = lin.diagonal()
    reached = diagonal[diagonal > 0].double()
    wide = reached.numel() > 1 and float(reached.max() / reached.min()) >= SPREAD
    return "marquardt" if wide else "identity"


def marquardt(diagonal: torch.Tensor, parameters, state, members) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(D, (P,) or (B, P); what is kept of it for the next step, a tensor for each parameter).

    diagonal: of J^T J. state: the optimizer's, by parameter. members: those whose scaling is not "marquardt" get ones.

    D is the running maximum of the diagonal, which falls by no more than half a step: MINPACK's, which never falls, keeps for
    ever what a step through a region of huge derivatives has left. 1 where the loss has not reached a parameter.
    """
    rows, scales = [], []
    for p, reals, part in zip(parameters.params, parameters.reals, diagonal.split(parameters.sizes, -1), strict=True):
        seen, known = part.reshape(reals.shape).to(reals.dtype), state.get(p, {}).get("scale")
        if known is not None:   # where a batch does not reach a parameter, nothing was learned of it
            seen = torch.where(seen > 0, torch.maximum(_FALL * known, seen), known)
        scales.append(seen.clone() if known is None else seen)
        rows.append(scales[-1].reshape(*[parameters.count] * parameters.stacked, -1))
    D = torch.cat(rows, -1)
    D = torch.where(D > 0, D, 1.0)
    for m in members:
        if m.scaling != "marquardt":
            D[m.number] = 1.0
    return D, scales
