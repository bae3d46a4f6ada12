"""What the solvers ask of an implementation's kernels, and what these hand back.

Index legend: M residuals, P parameters, B members of an ensemble, K vectors or dampings.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

# How a solve ended, by number as in csrc/plan/status.h.
STATUS = ("solved", "not_positive_definite", "max_iterations", "breakdown", "stagnated", "progress")


class Factor(Protocol):
    """A factor of the damped matrix of one solve; it stays that of this solve whatever is solved afterwards."""

    order: int            # M of a dual matrix, P of a primal one
    is_dual: bool
    bytes: int            # memory held

    def solve(self, b: torch.Tensor) -> torch.Tensor:
        """(J W J^T + s I)^-1 b, (M,), or (J^T J + diag(d))^-1 b, (P,), in the precision of b. Cost: 2 order^2."""

    @property
    def dual_vector(self) -> torch.Tensor:
        """Y of the solve, (M,), delta = W J^T y; of a dual factor alone. Raises ValueError for a primal one."""


class TensorFactor:
    """A Factor in PyTorch: a lower triangle, and y where the matrix is that of the residuals."""

    __slots__ = ("_lower", "_y")

    def __init__(self, lower: torch.Tensor, y: torch.Tensor | None = None):
        self._lower, self._y = lower, y

    order = property(lambda self: len(self._lower), doc="M or P.")
    is_dual = property(lambda self: self._y is not None, doc="True for the matrix of the residuals.")
    bytes = property(lambda self: self._lower.numel() * self._lower.element_size(), doc="Memory held.")

    @torch.no_grad()
    def solve(self, b: torch.Tensor) -> torch.Tensor:
        """See Factor."""
        return torch.cholesky_solve(b.to(self._lower.dtype).unsqueeze(1), self._lower).squeeze(1).to(b.dtype)

    @property
    def dual_vector(self) -> torch.Tensor:
        """See Factor."""
        if self._y is None:
            raise ValueError("pgdfast: a factor of the primal matrix has no dual vector.")
        return self._y


class Outcome(NamedTuple):
    """One solve of (diag(d) + J^T J) delta = g, g = J^T r + q.

    step: delta, (P,), zero where there is no factor. status: one of STATUS. iterations and residual_norm,
    ||g - A delta|| / ||g||, of iterative solves, else 0. gain: g . delta. square: ||delta||^2. trace: of J D^-1 J^T, which
    bounds the condition of the damped matrix; 0 of iterative solves. slack: (g - A delta) . delta, 0 of direct ones. factor: of
    direct solves where there is one, else None.
    """

    step: torch.Tensor
    status: str
    iterations: int = 0
    residual_norm: float = 0.0
    gain: float = 0.0
    square: float = 0.0
    trace: float = 0.0
    slack: float = 0.0
    factor: Factor | None = None


class Traits:
    """What an operator offers beyond jvp, vjp and dense: nothing, unless a class says so."""

    name: str = ""
    fused: bool = False            # has gram, diagonal and set_rows
    has_direct: bool = False       # has dual and primal; kernels that are fused without have gram(weights) and normal instead
    batches: bool = False          # products with J^T take (K, M)
    has_cg: bool = False           # has cg
    has_product: bool = False      # has product, J^T J v in one go
    has_lsmr: bool = False
    has_multishift: bool = False
    scales_rows: bool = False      # bind takes a row scale; for others scaled.py
    packs: bool = False            # has pack and gram_order (native.py); known once there are rows
    adds_normal: bool = False      # has add_normal (native.py)
    solves_members: bool = False   # has set_members, select and members_solve
    sums_outputs: bool = False    # J^T J comes from factors summed over the outputs of a row; known once there are rows
    has_columns: bool = False      # has columns, squared and gram(weights): what a chain (linear/chained.py) asks of its parts
    swept: int | None = None       # numbers that a sweep passes, where they are not those of one arena
    remake: float = 0.0            # operations beside the sweeps for each product, of tapes that are not kept
    rows_per_sweep: int = 1        # rows of J that one sweep makes where they do not separate; each takes an arena
    matrix_free: bool = True       # products J v do not take J itself
    jacobian_flops: float | None = None   # operations of J, where they are not a sweep for each row
    block_bytes: float | None = None      # has normal and diagonal, which make no more of J than this at once


class Kernels(Protocol):
    """A program's kernels: bind constants, then call. Results are new tensors of `dtype`.

    The attributes of Traits say which methods there are. r: (M,); d: (P,), positive; q, scale, penalty, inverse, start: (P,) or
    None; options: a CG. An Outcome is that of `dual`.
    """

    name: str
    fused: bool
    has_direct: bool
    batches: bool
    has_cg: bool
    has_lsmr: bool
    has_multishift: bool
    solves_members: bool
    sums_outputs: bool
    has_columns: bool
    rows_per_sweep: int

    dtype: torch.dtype
    num_residuals: int
    num_parameters: int
    flops: float        # operations of one sweep
    arena_size: int     # elements of intermediate results of one sweep

    def bind(self, constants: list, row_scale: torch.Tensor | None = None) -> None:
        """Use these constants from now on, which are kept alive. Raises RuntimeError where they are laid out differently.

        row_scale: with `scales_rows`, (M,), converted to `dtype`: all that follows is of diag(row_scale) J.
        """

    def release(self) -> None:
        """Forget the constants; bind others before the next product."""

    def set_rows(self, rows) -> None:
        """Take the row structure that `gram` and `dual` need, or drop it with None."""

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """J v, (P,) -> (M,)."""

    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        """J^T u, (M,) -> (P,); with `batches` also (K, M) -> (K, P)."""

    def dense(self) -> torch.Tensor:
        """J, (M, P)."""

    def gram(self) -> torch.Tensor:
        """The matrix J J^T, (M, M); needs rows. Without `has_direct` also J W J^T, by a list of one weight per parameter."""

    def columns(self, parameters: list[int]) -> torch.Tensor:
        """The columns of J of these parameter tensors, (M, their elements); with `has_columns`, needs rows."""

    def squared(self, A: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """A A^T, or A^T A, of any matrix; with `has_columns`."""

    def normal(self) -> torch.Tensor:
        """J^T J, (P, P); of kernels that are fused without `has_direct`."""

    def diagonal(self) -> torch.Tensor:
        """diag(J^T J), (P,)."""

    def dual(self, r, weights, shift: float, q) -> Outcome:
        """Delta = W (J^T y + q / s), (s I + J W J^T) y = r - J W q / s; W one weight per parameter tensor, or None for ones.

        Needs rows. Cost: one Gram matrix, kept while constants and weights stay; M^3 / 3; one product with J^T.
        """

    def primal(self, r, d, q) -> Outcome:
        """Delta = (diag(d) + J^T J)^-1 (J^T r + q). Cost: J^T J, kept while the constants stay; P^3 / 3."""

    def cg(self, r, d, q, preconditioner, start, path, options) -> tuple[Outcome, list[tuple]]:
        """A whole CG solve; with `has_cg`.

        preconditioner: (inverse, V, c), each None or a tensor: a diagonal and V^T diag(c) V, V (rank, P). path: (slots, P),
        which iterates 1, 2, 4, ... are written to in turn, or None. Returns also, for each slot that was written, (slot,
        iteration, gain, square, slack). Cost: one JVP and one VJP per iteration.
        """

    def multishift(self, r, q, mus, scale, penalty, options) -> tuple[torch.Tensor, list[tuple]]:
        """CG for all of K ascending mus from one Krylov space; with `has_multishift`.

        Returns steps, (K, P), and of each mu the numbers of an Outcome after the step.
        """

    def lsmr(self, r, d, root, damp: float, q, max_iterations: int, tolerance: float) -> Outcome:
        """A whole LSMR solve in the variables y = (delta - q / d) / root, damp^2 = d root^2; with `has_lsmr`."""

    def set_members(self, count: int, shifts: list[int], spans: list[int]) -> None:
        """Say that constants are those of B members: see tape.members.Members; with `solves_members`."""

    def select(self, member: int) -> None:
        """Let products and solves be those of one member."""

    def members_solve(self, name, listed, r, mu, penalty, scale, q, options, inverse=None, start=None):
        """Whole solves by "dual", "primal" or "cg" for the members listed, several at a time, in one call.

        r: (B, M); mu: (B,), float64; penalty: c per parameter, or empty; scale, q, inverse (the diagonal preconditioner of CG)
        and start: (B, P) or None. Returns the steps, (B, P), rows of members not listed being zero, and for each listed the
        numbers of an Outcome after the step, without a factor.
        """
