"""SPRING's momentum: the damping pulls a step to a part of the last one instead of to zero.

    phi_k = argmin ||J phi - r||^2 + mu ||phi - beta phi_(k-1)||_D^2,   theta <- theta - lr phi_k

Each batch asks for J phi = r on its own few rows; what they do not determine is kept from the batches before, as in the
randomized Kaczmarz method. phi_k is kept as it was solved for, whatever lr, line search or norm constraint made of the move.

Source: Goldshlager, Abrahamsen and Lin, arXiv 2401.10190 (SPRING); for PINNs arXiv 2505.12149.
"""

from __future__ import annotations

import math

import torch

KEY = "momentum"   # in the optimizer's state of each parameter


def checked_momentum(beta) -> float:
    """`momentum`, 0 <= beta < 1. Raises ValueError for anything else."""
    if not (isinstance(beta, (int, float)) and 0 <= beta < 1):
        raise ValueError(f"pgdfast.LM: momentum is {beta!r}; it must be a number from 0 to below 1 (SPRING: 0.9 to 0.99).")
    return float(beta)


def checked_constraint(square) -> float | None:
    """`norm_constraint`, None or a positive number. Raises ValueError for anything else."""
    if square is not None and not (isinstance(square, (int, float)) and 0 < square < math.inf):
        raise ValueError(
            f"pgdfast.LM: norm_constraint is {square!r}; it must be None or a positive number, the largest ||lr delta||^2."
        )
    return square


def prior(beta: float, parameters, state, b: int) -> torch.Tensor | None:
    """The prior beta phi_(k-1) of member b, (P,), zero where a parameter has none; None where none has.

    parameters: a Parameters; state: the optimizer's, by parameter.
    """
    kept = [state.get(p, {}).get(KEY) for p in parameters.params]
    if all(part is None for part in kept):
        return None
    parts = []
    for p, part in zip(parameters.reals, kept, strict=True):
        part = torch.zeros_like(p) if part is None else part
        parts.append((part[b] if parameters.stacked else part).reshape(-1))
    return beta * torch.cat(parts)


def kept(steps: dict[int, torch.Tensor], parameters, state) -> list[torch.Tensor]:
    """What is kept of phi_k for the next step, a new tensor for each parameter. steps: phi_k, (P,), by member."""
    if not parameters.stacked:
        parts = steps[0].detach().split(parameters.sizes)
        return [part.reshape(p.shape).to(p.dtype) for p, part in zip(parameters.reals, parts, strict=True)]
    found = []
    for k, (p, reals) in enumerate(zip(parameters.params, parameters.reals, strict=True)):
        last = state.get(p, {}).get(KEY)
        rows = torch.zeros_like(reals, requires_grad=False) if last is None else last.clone()
        for b, step in steps.items():
            rows[b] = step.detach().split(parameters.sizes)[k].reshape(rows[b].shape).to(rows.dtype)
        found.append(rows)
    return found
