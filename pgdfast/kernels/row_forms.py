"""Whole solves and the Gram matrix from the rows of J, in PyTorch; what the torch and the Triton kernels have in common.

Index legend: O sections (outputs of a row), M residuals in the order of the residual vector: row by row, section by section.
A use of a weight is y[m, n] += x[m, k] c[k, n], n running over rows; one sweep with unit cotangents per section leaves its
cotangents Y (M, m), and its rows of J are the outer products Y_i (x) C_i. csrc/cpu/{rows,factors,gram,solve}.cpp are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .limits import WIDE_FACTOR
from .protocol import Outcome, TensorFactor, Traits
from .row_tables import FACTORED, PARAMETER, ROWS, Tables


@dataclass(slots=True)
class Factors:
    """The rows of J in one use as outer products, for residuals first .. last - 1.

    cotangents (last - first, m); constants (n, k), one per row; sections: how many residuals each of those rows has, or owner:
    the row of each, where their number varies.
    """

    first: int
    last: int
    m_is_high: bool
    cotangents: torch.Tensor
    constants: torch.Tensor
    sections: int
    owner: torch.Tensor | None

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of x repeated for the residuals of each."""
        if self.owner is not None:
            return x.index_select(0, self.owner)
        return x if self.sections == 1 else x.repeat_interleave(self.sections, 0)


class RowForms(Traits):
    """Gram, dense and diagonal forms, dual and primal solves. A subclass has the products and the sweeps.

    It provides dtype, device, num_residuals, num_parameters, jvp, vjp, dense_by_batches and unit_sweeps(units), which gives
    for every buffer the cotangents (O, size) that the unit residuals `units` (O, M) produce.
    """

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
    def gram(self) -> torch.Tensor:
        """J J^T, (M, M); needs rows."""
        return self._gram(None)

    def _gram(self, weights) -> torch.Tensor:
        """J W J^T, W one number per parameter or None."""
        tables, M = self._tables, self.num_residuals
        buffers = self.unit_sweeps(tables.units(self.dtype, self.device))
        K = torch.zeros(M, M, dtype=self.dtype, device=self.device)
        for parameter, uses in tables.uses.items():
            form, weight = uses[0].form, 1.0 if weights is None else weights[parameter]
            if form == FACTORED:
                bias = uses[0].companion
                shift = 0.0 if bias < 0 else 1.0 if weights is None else weights[bias]
                self.add_factored(K, [self._factors(use, buffers) for use in uses], weight, shift)
            elif form == ROWS:
                J = self._rows_of(parameter, buffers)
                K.addmm_(J, J.T, alpha=weight)
        return self.completed(K)

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
                        rows = block.view(len(p.constants), p.sections, len(q.constants), q.sections)
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
            Y = Y[: use.sections].permute(2, 0, 1).reshape(-1, Y.shape[1])
        else:
            Y = Y[self._tables.on_device(use, "section", self.device), :, owner]
        return Factors(use.first, use.last, use.m_is_high, Y, use.constants(self.constant_of).T, use.sections, owner)

    def _rows_of(self, parameter: int, buffers) -> torch.Tensor:
        """The columns of J that belong to one parameter, (M, size)."""
        size = self._tables.columns[parameter][1]
        J = torch.zeros(self.num_residuals, size, dtype=self.dtype, device=self.device)
        for use in self._tables.uses[parameter]:
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

    @torch.no_grad()
    def dual(self, r, weights, shift, q) -> Outcome:
        """The dual step; needs rows. Its numbers reach the host in one transfer."""
        kept = None if weights is None else weights.tolist()
        if self._held is None or self._held[:2] != ("gram", kept):
            self.forget()
            self._held = "gram", kept, self._gram(kept)
        K = self._held[2]
        by_entry = None if weights is None else self._by_entry(kept)
        rhs = r if q is None else r - self.jvp(by_entry * q / shift)
        lower, bad = self._factorise(K, shift)
        y = TensorFactor(lower).solve(rhs)
        step = self.vjp(y)
        step = step if q is None else step + q / shift
        step = step if by_entry is None else by_entry * step
        # J delta = r - s y: the predicted reduction needs no further product.
        gain = torch.dot(r.double(), r.double() - shift * y.double())
        if q is not None:
            gain = gain + torch.dot(q.double(), step.double())
        return self._outcome(step, bad, gain, K.diagonal().sum(dtype=torch.float64) / shift, TensorFactor(lower, y))

    @torch.no_grad()
    def primal(self, r, d, q) -> Outcome:
        """The primal step, by Cholesky of diag(d) + J^T J."""
        if self._held is None or self._held[0] != "normal":
            self.forget()
            J = self.dense()
            self._held = "normal", None, J.T @ J
        H = self._held[2]
        g = self.vjp(r) if q is None else self.vjp(r) + q
        lower, bad = self._factorise(H, d)
        factor = TensorFactor(lower)
        step = factor.solve(g)
        gain = torch.dot(g.double(), step.double())
        return self._outcome(step, bad, gain, (H.diagonal().double() / d.double()).sum(), factor)

    def _by_entry(self, weights: list[float]) -> torch.Tensor:
        sizes = [size for role, size in self._program.buffers if role == PARAMETER]
        parts = [torch.full((n,), w, dtype=self.dtype, device=self.device) for n, w in zip(sizes, weights, strict=True)]
        return torch.cat(parts)

    def _factorise(self, matrix: torch.Tensor, added) -> tuple[torch.Tensor, torch.Tensor]:
        """The factor of matrix + diag(added), and a device flag that is not 0 where there is none."""
        wide = self.dtype == torch.float64 or len(matrix) <= WIDE_FACTOR
        damped = matrix.to(torch.float64 if wide else torch.float32, copy=True)
        damped.diagonal().add_(added)
        return torch.linalg.cholesky_ex(damped)

    @staticmethod
    def _outcome(step, bad, gain, trace, factor) -> Outcome:
        step = torch.where(bad == 0, step, 0)
        numbers = torch.stack([bad.double(), gain, step.double().square().sum(), trace]).tolist()
        if numbers[0] != 0:
            return Outcome(step, "not_positive_definite", trace=numbers[3])
        return Outcome(step, "solved", 0, 0.0, *numbers[1:], 0.0, factor)
