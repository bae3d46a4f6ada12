"""Products, matrices and direct solves of parts: each part's own, summed or put together.

| form | of a part | combined by |
|---|---|---|
| J v | J_b v | put one behind the other |
| J^T u, J^T J v, diagonal | that of its rows | sum |
| J^T J | J_b^T J_b, added to one matrix | sum |
| J J^T | factors of its rows, packed | K by blocks, block rows spread over processes |

Index legend: M residuals, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..kernels import native
from ..kernels.memory import memory_limit
from ..kernels.protocol import Outcome, Traits
from .cholesky import SHARED_FROM, shared_factor
from .factors import gram_of_factors
from .failures import settled

_REDUCED_AT_ONCE = 1 << 22   # numbers of a matrix that one sum over processes takes
_SURELY_FITS = 64e6          # bytes up to which the memory that is available is not asked for
_BLOCK_BYTES = 64 << 20      # of J that kernels make at once for J^T J; see native.Kernels.add_normal


class PartsKernels(Traits):
    """What kernels.protocol.Kernels asks, of a Parts linearization."""

    fused = batches = has_product = True
    name = "parts"
    block_bytes = _BLOCK_BYTES

    def __init__(self, lin):
        self._lin, self._group = lin, lin.group
        facts = [fact for fact in lin.facts if fact.size] or lin.facts
        self.dtype, self.device = lin.dtype, lin.device
        self.num_residuals, self.num_parameters = lin.num_residuals, lin.num_parameters
        self.flops, self.swept = sum(fact.flops for fact in facts), sum(fact.arena for fact in facts)
        self.arena_size = max(fact.arena for fact in facts)
        # Of tapes that are not kept: to run the closure and to read its tape take about four sweeps.
        self.remake = 4.0 * self.flops * (1 - lin.kept / max(lin.count, 1))
        self._packs = all(fact.packs for fact in facts)
        self.has_direct = all(fact.adds_normal for fact in facts) and (self._packs or lin.row_layout() is None)
        self._held: tuple = None, None

    def release(self) -> None:
        """Let go of matrices."""
        self._held = None, None

    def _summed(self, shape: tuple, each: Callable) -> torch.Tensor:
        """The sum over parts and processes of each(part, its kernels), of a shape."""
        with self._group.adding(shape, self.dtype, self.device) as found:
            def add(part, lin):
                if part.size:
                    found.add_(each(part, lin.kernels()))

            self._lin.visit(add)
        return found

    # --- products ---------------------------------------------------------------------------------------------------------

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """J v, (P,) -> (M,), or (K, P) -> (K, M); sends M numbers, or K M."""
        if v.dim() == 2:
            return torch.stack([self.jvp(row) for row in v])
        with self._group.section():
            own = self._lin.visit(lambda part, lin: lin.kernels().jvp(v))
        return self._lin.joined(own)

    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        """J^T u, (M,) -> (P,), or (K, M) -> (K, P); sums P numbers, or K P."""
        def each(part, kernels):
            own = u[..., part.rows].contiguous()
            return torch.stack([kernels.vjp(row) for row in own]) if u.dim() == 2 and not kernels.batches else kernels.vjp(own)

        return self._summed((*u.shape[:-1], self.num_parameters), each)

    def product(self, v: torch.Tensor) -> torch.Tensor:
        """J^T J v, (P,) -> (P,), or (K, P) of each: both products of a part, then the next; sums P numbers."""
        def each(part, kernels):
            rows = v if v.dim() == 2 else v[None]
            return torch.stack([kernels.vjp(kernels.jvp(row)) for row in rows]).view(v.shape)

        return self._summed(v.shape, each)

    def diagonal(self) -> torch.Tensor:
        """diag(J^T J), (P,); sums P numbers."""
        def each(part, kernels):
            return kernels.diagonal() if kernels.fused or kernels.block_bytes is not None else kernels.dense().square().sum(0)

        return self._summed((self.num_parameters,), each)

    def dense(self) -> torch.Tensor:
        """J, (M, P), in every process; sends M P numbers."""
        return self._group.joined(self._own_rows(), self._lin.sizes)

    def _own_rows(self) -> torch.Tensor:
        with self._group.section():
            own = self._lin.visit(lambda part, lin: lin.dense())
        return torch.cat([torch.empty(0, self.num_parameters, dtype=self.dtype, device=self.device), *own])

    # --- J^T J ------------------------------------------------------------------------------------------------------------

    def normal(self) -> torch.Tensor:
        """J^T J, (P, P), kept for further dampings; sums P^2 / 2 numbers."""
        return self._kept("normal", self._normal)

    def primal(self, r, d, q) -> Outcome:
        """Delta = (diag(d) + J^T J)^-1 (J^T r + q)."""
        if self._held[0] == "normal":
            matrix, g = self._held[1], self.vjp(r)
        else:   # in one pass through the parts
            g = r.new_zeros(self.num_parameters)
            matrix = self._kept("normal", lambda: self._normal(r, g))
            g = self._group.total(g)
        g = g if q is None else g + q
        factor, step, trace = self._solved(matrix, d, g)
        if factor is None:
            return Outcome(torch.zeros_like(g), "not_positive_definite", trace=trace)
        wide = step.double()
        return Outcome(
            step, "solved", 0, 0.0, float(torch.dot(g.double(), wide)), float(torch.dot(wide, wide)), trace, 0.0, factor
        )

    def _solved(self, H: torch.Tensor, added, b: torch.Tensor, positions: list[int] | None = None) -> tuple:
        """(the factor of H + diag(added), None where that is not positive definite; its solution x of b; the trace).

        Of large matrices the work is shared by the ranks.
        """
        shared = self._group.size > 1 and len(H) > SHARED_FROM
        factor, trace = shared_factor(self._group, H, added, positions) if shared else (None, 0.0)
        with self._group.section():
            if not shared:
                factor, trace = native.factor(H, added, positions)
            x = None if factor is None else factor.solve(b)
        return factor, None if x is None else self._group.same(x), trace   # to the bit, whatever the processors

    def _kept(self, what: str, make: Callable) -> torch.Tensor:
        if self._held[0] != what:
            self._held = None, None   # its memory serves the other
            self._held = what, make()
        return self._held[1]

    def _normal(self, r: torch.Tensor | None = None, g: torch.Tensor | None = None) -> torch.Tensor:
        """J^T J; the J^T r of this process is added to g."""
        P = self.num_parameters
        H = native.normal_matrix(P, self.dtype) if self.has_direct else torch.zeros(P, P, dtype=self.dtype, device=self.device)

        def add(part, lin):
            kernels = lin.kernels()
            if not part.size:
                return
            if r is not None:
                g.add_(kernels.vjp(r[part.rows]))
            if self.has_direct:
                kernels.add_normal(H)
            elif kernels.fused and not kernels.has_direct or kernels.block_bytes is not None:
                H.add_(kernels.normal())
            else:
                J = kernels.dense()
                H.addmm_(J.T, J)

        with self._group.section():
            self._lin.visit(add)
        if self._group.size > 1:
            self._sum_triangle(H)
        return H

    def _sum_triangle(self, H: torch.Tensor) -> None:
        """Sum the upper triangle over processes, by blocks of rows, each from its first diagonal element on."""
        P = self.num_parameters
        rows = max(1, min(_REDUCED_AT_ONCE // P, P // 8))
        for first in range(0, P, rows):
            block = H[first : min(first + rows, P), first:P]
            block.copy_(self._group.total(block.contiguous()))
            if not self.has_direct:
                H[first:P, first : min(first + rows, P)].copy_(block.T)

    # --- J J^T ------------------------------------------------------------------------------------------------------------

    def gram(self, weights: list[float] | None = None) -> torch.Tensor:
        """J W J^T, (M, M), W one number per parameter or None, kept for further dampings."""
        if self.has_direct:
            K, order = self._blocks(weights)
            return native.symmetric(K)[order][:, order]
        return self._kept(("rows", weights and tuple(weights)), lambda: self._gram_of_rows(weights))

    def dual(self, r, weights, shift: float, q) -> Outcome:
        """Delta = W (J^T y + q / s), (s I + J W J^T) y = r - J W q / s, W one number per parameter tensor."""
        listed, spread = None, 1.0
        if weights is not None:
            sizes = torch.tensor([p.numel() for p in self._lin.params], device=self.device)
            listed, spread = weights.tolist(), weights.to(self.device, self.dtype).repeat_interleave(sizes)
        K, order = self._blocks(listed)
        b = r if q is None else r - self.jvp(spread * q / shift)
        factor, y, trace = self._solved(K, shift, b, order.tolist())
        if factor is None:
            return Outcome(r.new_zeros(self.num_parameters), "not_positive_definite", trace=trace)
        factor.dual_vector = y
        step = self.vjp(y)
        step = spread * (step if q is None else step + q / shift)
        gain, wide = float(torch.dot(r.double(), r.double() - shift * y.double())), step.double()
        if q is not None:
            gain += float(torch.dot(q.double(), wide))
        return Outcome(step, "solved", 0, 0.0, gain, float(torch.dot(wide, wide)), trace, 0.0, factor)

    def _blocks(self, weights: list[float] | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(J W J^T as native.gram_matrix has it, of every residual its row), kept for further dampings.

        All processes get the factors of all rows, in place of the rows of J; each then makes an equal share of K, whole rows
        of its upper triangle, of which all get a copy. Sends the factors and M^2 / 2 numbers.
        """
        def make():
            self._check_memory(self._lin.row_layout().packed, "the factors of all their rows")
            return gram_of_factors(self._lin, weights)

        return self._kept(("factors", weights and tuple(weights)), make)

    def _gram_of_rows(self, weights) -> torch.Tensor:
        """J W J^T from explicit rows: sends M P / R numbers of R processes, and sums M^2."""
        self._check_memory(2 * max(self._lin.sizes) * self.num_parameters, "their rows of J")
        J = self._own_rows()
        if weights is not None:
            sizes = [p.numel() for p in self._lin.params]
            J *= torch.cat([J.new_full((n,), w) for n, w in zip(sizes, weights, strict=True)]).sqrt()
        if self._group.size == 1:
            return J @ J.T
        columns = self._group.columns_of(J, self._lin.sizes)
        return self._group.total(columns @ columns.T)

    def _check_memory(self, numbers: float, what: str) -> None:
        """Raise MemoryError, in all processes, where K and so many numbers beside do not fit into the free memory of one.

        numbers: the same in all processes, since these ask each other, unless it is little.
        """
        M, P, need = self.num_residuals, self.num_parameters, self.dtype.itemsize * (1.5 * self.num_residuals**2 + numbers)
        if need < _SURELY_FITS:
            return
        limit = self._group.least(memory_limit(self.device))
        if need > limit:
            raise settled(MemoryError(
                f"pgdfast.LM: the dual solve needs J J^T of all {M:,} residuals and {what}, {need / 1e9:.1f} GB in each "
                f"process, and {limit / 1e9:.1f} GB may be used; use solver='cg', or 'primal' where {P:,} x {P:,} numbers fit."
            ))
