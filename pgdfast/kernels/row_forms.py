"""The Gram matrix and other forms from the rows of J, in PyTorch; what the torch and the Triton kernels have in common.

Index legend: O outputs (outputs of a row), M residuals in the order of the residual vector: row by row, output by output.
A use of a weight is y[m, n] += x[m, k] c[k, n], n running over rows; one sweep with unit cotangents per output leaves its
cotangents Y (M, m), and its rows of J are the outer products Y_i (x) C_i. csrc/cpu/{rows,factors,gram,solve}.cpp are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .protocol import Traits
from .row_tables import FACTORED, ROWS, Tables


@dataclass(slots=True)
class Factors:
    """The rows of J in one use as outer products, for residuals first .. last - 1 in the order of rows.

    cotangents (last - first, m); constants (n, k), one per row; outputs: how many residuals each of those rows has, or owner:
    the row of each, where their number varies.
    """

    first: int
    last: int
    m_is_high: bool
    cotangents: torch.Tensor
    constants: torch.Tensor
    outputs: int
    owner: torch.Tensor | None

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of x repeated for the residuals of each."""
        if self.owner is not None:
            return x.index_select(0, self.owner)
        return x if self.outputs == 1 else x.repeat_interleave(self.outputs, 0)


class RowForms(Traits):
    """Gram, normal, dense and diagonal forms. A subclass has the products and the sweeps.

    It provides dtype, device, num_residuals, num_parameters, jvp, vjp, dense_by_batches and unit_sweeps(units), which gives
    for every buffer the cotangents (O, size) that the unit residuals `units` (O, M) produce.
    """

    has_columns = True
    _tables: Tables | None = None
    _held = None

    def set_rows(self, rows) -> None:
        """Take the row structure that Gram and dense forms need, or drop it with None."""
        self._held = None
        self._tables = None if rows is None else Tables(self._program, rows)

    def forget(self) -> None:
        """Drop what belongs to other constants."""
        self._held = None

    @torch.no_grad()
    def dense(self) -> torch.Tensor:
        """J, (M, P)."""
        tables = self._tables
        if tables is None:
            return self.dense_by_batches()
        buffers = self.unit_sweeps(tables.units(self.dtype, self.device))
        J = torch.zeros(self.num_residuals, self.num_parameters, dtype=self.dtype, device=self.device)
        for parameter, uses in tables.uses.items():
            first, size = tables.columns[parameter]
            for use in uses:
                tables.add_rows(J[:, first : first + size], use, buffers, self.constant_of)
        return J

    @torch.no_grad()
    def gram(self, weights: list[float] | None = None) -> torch.Tensor:
        """J W J^T, (M, M), W one number per parameter or None; needs rows. Kept for further dampings: not to be changed."""
        if self._held is None or self._held[:2] != ("gram", weights):
            self._held = None
            self._held = "gram", weights, self._gram(weights)
        return self._held[2]

    @torch.no_grad()
    def normal(self) -> torch.Tensor:
        """J^T J, (P, P). Kept for further dampings: not to be changed."""
        if self._held is None or self._held[0] != "normal":
            self._held = None
            J = self.dense()
            self._held = "normal", None, J.T @ J
        return self._held[2]

    def _gram(self, weights) -> torch.Tensor:
        tables, M = self._tables, self.num_residuals
        buffers = self.unit_sweeps(tables.units(self.dtype, self.device))
        K = torch.zeros(M, M, dtype=self.dtype, device=self.device)   # row by row; the residuals' order comes last
        for parameter, uses in tables.uses.items():
            form, weight = uses[0].form, 1.0 if weights is None else weights[parameter]
            if form == FACTORED:
                bias = uses[0].fused_bias
                shift = 0.0 if bias < 0 else 1.0 if weights is None else weights[bias]
                self.add_factored(K, [self._factors(use, buffers) for use in uses], weight, shift)
            elif form == ROWS:
                J = tables.row_by_row(self._rows_of(parameter, buffers))
                K.addmm_(J, J.T, alpha=weight)
        K = self.completed(K)
        return K if tables.layout.in_order else tables.row_by_row(tables.row_by_row(K, back=True).T, back=True)

    def squared(self, A: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """A A^T, or A^T A, of any matrix."""
        return A.T @ A if transposed else A @ A.T

    def add_factored(self, K: torch.Tensor, factors: list[Factors], weight: float, shift: float) -> None:
        """K += (weight C C'^T + shift) * (Y Y'^T) over all pairs of uses, elementwise.

        The row of J is y (x) c, and the product of two such rows (y . y') (c . c'); where the roles are exchanged (a weight
        used along and against its rows, as double backward does) the dimensions that meet are (y . c') (c . y').
        """
        for number, p in enumerate(factors):
            for q in factors[number:]:
                if p.m_is_high == q.m_is_high:
                    block = p.cotangents @ q.cotangents.T
                    shared = (p.constants @ q.constants.T).mul_(weight).add_(shift)
                    if p.owner is None and q.owner is None:
                        rows = block.view(len(p.constants), p.outputs, len(q.constants), q.outputs)
                        rows.mul_(shared[:, None, :, None])
                    else:
                        block.mul_(q.spread(p.spread(shared).T).T)
                else:
                    block = (p.cotangents @ q.spread(q.constants).T).mul_(p.spread(p.constants) @ q.cotangents.T).mul_(weight)
                K[p.first : p.last, q.first : q.last] += block
                if q is not p:
                    K[q.first : q.last, p.first : p.last] += block.T

    def completed(self, K: torch.Tensor) -> torch.Tensor:
        """The full matrix, where `add_factored` fills a part of it."""
        return K

    def _factors(self, use, buffers) -> Factors:
        owner = None if use.owner is None else self._tables.on_device(use, "owner", self.device)
        Y = use.cotangents(buffers)   # (O, m, n)
        if owner is None:
            Y = Y[: use.outputs].permute(2, 0, 1).reshape(-1, Y.shape[1])
        else:
            Y = Y[self._tables.on_device(use, "output", self.device), :, owner]
        return Factors(use.first, use.last, use.m_is_high, Y, use.constants(self.constant_of).T, use.outputs, owner)

    @torch.no_grad()
    def columns(self, parameters: list[int]) -> torch.Tensor:
        """The columns of J of these parameter tensors, (M, their elements); needs rows."""
        tables = self._tables
        buffers = self.unit_sweeps(tables.units(self.dtype, self.device))
        parts = [self._rows_of(p, buffers) for p in parameters]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _rows_of(self, parameter: int, buffers) -> torch.Tensor:
        """The columns of J that belong to one parameter, (M, size)."""
        size = self._tables.columns[parameter][1]
        J = torch.zeros(self.num_residuals, size, dtype=self.dtype, device=self.device)
        for use in self._tables.uses.get(parameter, ()):
            self._tables.add_rows(J, use, buffers, self.constant_of)
        return J

    @torch.no_grad()
    def diagonal(self) -> torch.Tensor:
        """diag(J^T J), (P,)."""
        tables = self._tables
        if tables is None:
            return self.dense_by_batches().square_().sum(0)
        buffers = self.unit_sweeps(tables.units(self.dtype, self.device))
        d = torch.zeros(self.num_parameters, dtype=self.dtype, device=self.device)
        for parameter, uses in tables.uses.items():
            first, size = tables.columns[parameter]
            part = d[first : first + size]
            if uses[0].form == FACTORED and len(uses) == 1:
                # Rows are outer products: the squares of their factors make the squares of J, summed by one product.
                squares = uses[0].cotangents(buffers).square().sum(0) @ uses[0].constants(self.constant_of).square().T
                uses[0].window(part).add_(squares)
            else:
                part.copy_(self._rows_of(parameter, buffers).square_().sum(0))
        return d
