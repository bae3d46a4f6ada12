"""SPRING's momentum: the damping pulls a step to a part of the last one instead of to zero.

    phi_k = argmin ||J phi - r||^2 + mu ||phi - beta phi_(k-1)||_D^2,   theta <- theta - lr phi_k

Each batch asks for J phi = r on its own few rows; what they do not determine is kept from the batches before, as in the
randomised Kaczmarz method. phi_k is kept as it was solved for, whatever lr, line search or norm constraint made of the move.

Source: Goldshlager, Abrahamsen and Lin, arXiv 2401.10190 (SPRING); for PINNs arXiv 2505.12149.
"""

from __future__ import annotations

import math

import torch

_KEY = "momentum"   # in the optimizer's state of each parameter


class Momentum:
    """beta, and phi_(k-1) in the state of an optimizer, parameter by parameter.

    beta: 0 <= beta < 1; 0 keeps nothing. Raises ValueError for anything else.
    """

    def __init__(self, beta: float):
        if not (isinstance(beta, (int, float)) and 0 <= beta < 1):
            raise ValueError(f"pgdfast.LM: momentum is {beta!r}; it must be a number from 0 to below 1 (SPRING: 0.9 to 0.99).")
        self.beta = float(beta)

    def prior(self, params: list[torch.Tensor], state) -> torch.Tensor | None:
        """Beta phi_(k-1), (P,), zero where a parameter has none; None where none has."""
        if self.beta == 0:
            return None
        kept = [state.get(p, {}).get(_KEY) for p in params]
        if all(part is None for part in kept):
            return None
        pairs = zip(params, kept, strict=True)
        return self.beta * torch.cat([(torch.zeros_like(p) if part is None else part).reshape(-1) for p, part in pairs])

    def keep(self, step: torch.Tensor | None, params: list[torch.Tensor], state) -> None:
        """Keep phi_k, (P,), for the next step; None forgets the last one, because no step was taken."""
        if self.beta == 0:
            return
        if step is None:
            for p in params:
                state.get(p, {}).pop(_KEY, None)
            return
        for p, part in zip(params, step.detach().split([p.numel() for p in params]), strict=True):
            state[p][_KEY] = part.reshape(p.shape).to(p.dtype)


def checked_constraint(square) -> float | None:
    """`norm_constraint`, None or a positive number. Raises ValueError for anything else."""
    if square is not None and not (isinstance(square, (int, float)) and 0 < square < math.inf):
        raise ValueError(
            f"pgdfast.LM: norm_constraint is {square!r}; it must be None or a positive number, the largest ||lr delta||^2."
        )
    return square
