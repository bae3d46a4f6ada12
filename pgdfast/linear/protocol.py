"""What the rooms above ask of a linearization, and what the solvers ask besides.

Index legend: M residuals, P parameters. Vectors are flat, in the order of the parameters; a step is subtracted from them.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from ..kernels.protocol import Kernels
from .rows import RowLayout


@runtime_checkable
class Linearization(Protocol):
    """The least-squares problem of a closure at the parameters of one point.

    Near it the loss is 1/2 ||residual - J delta||^2 up to a constant, plus c/2 ||theta - delta||^2 for the quadratic penalties
    of the loss. An EnsembleLinearization has the same names but for `ggn`, `ggns`, `gradient` and `gram`, with the members as
    the first dimension of every vector.
    """

    loss: torch.Tensor        # 0-dim
    residual: torch.Tensor    # (M,), scaled so that J^T residual (+ penalty) is the loss's gradient
    num_residuals: int        # M
    num_parameters: int       # P
    penalties: dict           # {parameter number: c}
    dtype: torch.dtype
    scalar: bool              # the closure returned the loss itself, in one number
    has_squares_only: bool    # the loss is a sum of squares with constant weights
    tapeless: bool            # the closure computes the same without gradients, bit for bit
    residuals_need_tape: bool   # `residual_at` reads a scalar loss, whose residual stands on its tape
    tape_bytes: int           # about what the closure's activations take; 0 where it is not known

    @property
    def sync_reason(self) -> str:
        """Why linearizing this closure looks at what tensors hold at every step; "" where it does not."""

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """J v: (P,) -> (M,). One forward sweep."""

    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        """J^T u: (M,) -> (P,). One backward sweep."""

    def ggn(self, v: torch.Tensor) -> torch.Tensor:
        """(J^T J + penalty) v: (P,) -> (P,)."""

    def ggns(self, V: torch.Tensor) -> torch.Tensor:
        """(J^T J + penalty) v for each row of V, (K, P) -> (K, P)."""

    def gradient(self) -> torch.Tensor:
        """Gradient of the loss, (P,)."""

    def dense(self) -> torch.Tensor:
        """J, (M, P). As many backward sweeps as a row has outputs, or M where rows do not separate."""

    def gram(self) -> torch.Tensor:
        """J J^T, (M, M), without J where rows separate."""

    def diagonal(self) -> torch.Tensor:
        """diag(J^T J + penalty), (P,)."""

    def residual_at(self, run) -> tuple[float, torch.Tensor]:
        """(loss, residual (M,)) at the parameters' present values; what the quadratic penalties add is in the loss alone.

        run: calls the closure, with its tape where `residuals_need_tape`. Raises ValueError where M is another.
        """

    def before_trial(self) -> None:
        """Say that the closure is about to run again: what it writes to is copied where that is to be expected."""

    def parameters_unchanged(self) -> None:
        """Declare the parameters to be, bit for bit, those of the linearization (after undoing a trial step)."""

    def doubt(self) -> None:
        """Say that products with J are not finite: the next tape of the same structure is compared with autograd."""

    def widened(self) -> Linearization:
        """The same linearization with products in float64, or itself where that is not to be had.

        The coefficients keep the precision in which the closure computed them; sums and solves gain.
        """

    def release(self) -> None:
        """Let go of the tape. Products raise RuntimeError from then on; what was computed before stays."""


@runtime_checkable
class SolvableLinearization(Linearization, Protocol):
    """A linearization by kernels, as the solvers take it. Products raise RuntimeError once the parameters have changed."""

    params: list              # the parameters, whose concatenation is the vector theta
    device: torch.device
    choices: dict             # what pgdfast.solve has chosen for problems of this structure

    @property
    def penalty(self) -> torch.Tensor | None:
        """Diagonal of the quadratic penalty, (P,)."""

    @property
    def penalty_gradient(self) -> torch.Tensor | None:
        """C theta, (P,)."""

    @property
    def coupling(self) -> str:
        """Why the residuals do not separate into rows, and what to do; "" where they do."""

    def agreed(self, number: float) -> float:
        """The least of what all processes have that share the rows, so that they decide alike."""

    def kernels(self) -> Kernels:
        """The kernels, after binding them to this linearization's constants where another's were bound.

        Raises RuntimeError once the parameters have changed or the linearization was released.
        """

    def row_layout(self) -> RowLayout | None:
        """The row layout of the residuals, None where they do not separate; the first call finds it for the kernels."""
