"""What a solver returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

ADVICE = {
    "not_positive_definite": "the damped matrix is not positive definite to working precision: raise the damping, use "
    "float64, or solver='eigh'",
    "max_iterations": "CG stopped at its iteration limit: raise CG(max_iterations=...), the damping or the tolerance",
    "stagnated": "CG's residual stopped falling above its tolerance, at rounding level: use a larger tolerance or float64",
    "breakdown": "CG met a direction without curvature: raise the damping or use a direct solver",
    "not_finite": "the step is not finite: raise the damping or use float64",
}


@dataclass(slots=True)
class Solution:
    """delta of (mu D + J^T J + penalty) delta = g.

    step: (P,), to be subtracted from the parameters. status: "solved", "max_iterations" or "stagnated" (the step is usable), or
    "not_positive_definite", "breakdown", "not_finite" (the step is zero or partial; `usable` is False for a zero one).
    iterations: of CG, else 0. solver, reason: what ran and why. gain: g . delta.
    """

    step: torch.Tensor
    status: str
    iterations: int
    solver: str
    reason: str
    gain: float
    damped: float                       # delta . mu D delta
    linearization: object = field(repr=False, default=None)
    damping_diagonal: object = field(repr=False, default=None)
    known_residual_norm: float | None = None
    wide: bool = False                  # a float32 problem needed float64 sums

    @property
    def usable(self) -> bool:
        """True where the step descends the model."""
        return self.status in ("solved", "max_iterations", "stagnated") or (self.status == "breakdown" and self.gain > 0)

    @property
    def advice(self) -> str:
        """What to do about the status; empty when solved."""
        return ADVICE.get(self.status, "")

    @property
    def predicted_reduction(self) -> float:
        """Of the full step: g . delta - 1/2 delta . (J^T J + penalty) delta = 1/2 (g . delta + delta . mu D delta)."""
        return self.reduction(1.0)

    def reduction(self, t: float) -> float:
        """Predicted reduction of the loss by the step t delta.

        With A delta = g - mu D delta: t g.delta - t^2/2 delta.A delta. Exact solves only make it exact.
        """
        return t * self.gain - 0.5 * t * t * (self.gain - self.damped)

    @property
    def residual_norm(self) -> float:
        """||g - (mu D + J^T J + penalty) delta|| / ||g||; costs two products unless the solver knew it."""
        if self.known_residual_norm is None:
            lin = self.linearization
            g = lin.gradient()
            left = lin.ggn(self.step) + self.damping_diagonal * self.step
            norm = float(torch.linalg.vector_norm(g))
            self.known_residual_norm = float(torch.linalg.vector_norm(g - left)) / norm if norm > 0 else 0.0
        return self.known_residual_norm
