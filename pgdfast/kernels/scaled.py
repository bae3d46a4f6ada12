"""Kernels of diag(row_scale) J made of those of J, where an implementation does not scale rows itself.

Index legend: M residuals, P parameters, K vectors.
"""

from __future__ import annotations

import torch

from .protocol import Traits


def row_scaled(kernels, row_scale: torch.Tensor | None):
    """The kernels, bound to their constants, of diag(row_scale) J: themselves without a scale, or where `bind` was given it."""
    return kernels if row_scale is None or kernels.scales_rows else RowScaled(kernels, row_scale)


class RowScaled(Traits):
    """Products and forms of `base` with every row of J times its factor, (M,); solves are PyTorch's."""

    def __init__(self, base, row_scale: torch.Tensor):
        self.base, self.name, self.dtype = base, base.name, base.dtype
        self.num_residuals, self.num_parameters = base.num_residuals, base.num_parameters
        self.flops, self.arena_size, self.rows_per_sweep = base.flops, base.arena_size, base.rows_per_sweep
        self.fused, self.batches, self.has_columns = base.fused, base.batches, base.has_columns
        self.jacobian_flops, self.block_bytes = base.jacobian_flops, base.block_bytes
        self._scale = row_scale.detach().to(self.dtype)
        self._column = self._scale.unsqueeze(1)
        self._held: dict[str, tuple] = {}

    @property
    def matrix_free(self) -> bool:
        """See Traits; of double backward it is learned."""
        return self.base.matrix_free

    def release(self) -> None:
        """Forget the constants; bind others before the next product."""
        self._held.clear()
        self.base.release()

    def set_rows(self, rows) -> None:
        """Take the row structure that Gram and dense forms need, or drop it with None."""
        self._held.clear()
        self.base.set_rows(rows)

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """J v: (P,) -> (M,), and with `batches` (K, P) -> (K, M)."""
        if v.dim() == 2 and self.base.has_multishift:   # such kernels have their own use for batches
            return torch.stack([self.base.jvp(x) for x in v]) * self._scale
        return self.base.jvp(v) * self._scale

    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        """J^T u: (M,) -> (P,), and with `batches` (K, M) -> (K, P)."""
        return self.base.vjp(u * self._scale)

    @torch.no_grad()
    def dense(self) -> torch.Tensor:
        """J, (M, P)."""
        J = self.base.dense()
        return J.mul_(self._column) if self.fused else J * self._column   # what is not fused keeps its own

    @torch.no_grad()
    def columns(self, parameters: list[int]) -> torch.Tensor:
        """The columns of J of these parameter tensors, (M, their elements); with `has_columns`, needs rows."""
        return self.base.columns(parameters).mul_(self._column)

    def squared(self, A: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """A A^T, or A^T A, of any matrix; with `has_columns`."""
        return self.base.squared(A, transposed)

    @torch.no_grad()
    def gram(self, weights: list[float] | None = None) -> torch.Tensor:
        """J W J^T, (M, M), W one number per parameter or None; with `fused`, needs rows. Kept: not to be changed."""
        key = None if weights is None else tuple(weights)
        if "gram" not in self._held or self._held["gram"][0] != key:
            self._held.pop("gram", None)
            self._held["gram"] = key, (self.base.gram(weights) * self._column).mul_(self._scale)
        return self._held["gram"][1]

    @torch.no_grad()
    def normal(self) -> torch.Tensor:
        """J^T J, (P, P); with `fused` or `block_bytes`. Kept for further dampings: not to be changed."""
        if "normal" not in self._held:
            factor = self._uniform() if self.block_bytes is not None or not self.base.has_direct else None
            if factor is not None:
                H = self.base.normal() * factor
            else:
                H = torch.zeros(self.num_parameters, self.num_parameters, dtype=self.dtype, device=self._scale.device)
                for rows in self._rows():
                    H.addmm_(rows.T, rows)
            self._held["normal"] = None, H
        return self._held["normal"][1]

    @torch.no_grad()
    def diagonal(self) -> torch.Tensor:
        """diag(J^T J), (P,); with `fused` or `block_bytes`."""
        factor = self._uniform()
        if factor is not None:
            return self.base.diagonal() * factor
        return sum((rows.square().sum(0) for rows in self._rows()), self._scale.new_zeros(self.num_parameters))

    def _rows(self):
        """The rows of J in blocks, no more at once than the base would make."""
        if self.block_bytes is None:
            yield self.dense()
            return
        for first, rows in self.base.row_blocks():
            yield rows * self._column[first : first + len(rows)]

    def _uniform(self) -> float | None:
        """The square of the scale where that is one number, else None."""
        if "uniform" not in self._held:
            same = len(self._scale) > 0 and bool((self._scale == self._scale[0]).all())
            self._held["uniform"] = (float(self._scale[0]) ** 2 if same else None,)
        return self._held["uniform"][0]
