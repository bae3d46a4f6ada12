"""Kernels of a chain: products by the whole program, J and the Gram matrix by its parts.

Index legend: M residuals, P parameters, Q shared quantities, B residuals in the border.
"""

from __future__ import annotations

import itertools

import torch

from ..kernels.protocol import Traits
from .chain import Chain


class Chained(Traits):
    """What kernels.protocol.Kernels asks of kernels that are fused without direct solves of their own.

    whole: the kernels of the program, which has all products and iterative solves. make: Part -> kernels.
    """

    fused = batches = True

    def __init__(self, whole, chain: Chain, make):
        self.name, self.dtype, self.device = whole.name, whole.dtype, whole.device
        self.num_residuals, self.num_parameters, self.flops = whole.num_residuals, whole.num_parameters, whole.flops
        self.has_cg, self.has_lsmr, self.has_multishift = whole.has_cg, whole.has_lsmr, whole.has_multishift
        self._chain, self._whole = chain, whole
        self._main = make(chain.main.program)
        self._main.set_rows(chain.layout)
        self._sub = None
        if chain.sub is not None:
            self._sub = make(chain.sub.program)
            self._sub.set_rows(chain.sub_layout)
        self.arena_size = whole.arena_size + self._main.arena_size + (self._sub.arena_size if self._sub else 0)
        self._constants, self._bound, self._held = None, set(), {}
        self._sizes = [size for role, size in chain.main.program.buffers if role == 0]
        self._own = len(self._sizes) - chain.quantities - len(chain.scaled)   # parameters; shared quantities follow
        self._rest = list(range(len(self._sizes) - chain.quantities, len(self._sizes)))
        # Parameters on which the residuals depend beside sub: read by main, or as multiples.
        self._read = {op.x for op in chain.main.program.instructions} | {s.parameter for s in chain.scaled}
        self._kept, self._border = (torch.from_numpy(a).to(self.device) for a in (chain.kept, chain.border))

    def bind(self, constants: list) -> None:
        """Use these constants from now on; parts take theirs when they are needed."""
        self._forget()
        self._whole.bind(constants)
        self._constants = constants

    def adopt(self, constants: list) -> None:
        """Use the constants that the whole program's kernels are bound to."""
        self._forget()
        self._constants = constants

    def release(self) -> None:
        """Forget the constants; bind others before the next product."""
        self._forget()
        self._whole.release()
        for kernels in (self._main, self._sub):
            if kernels is not None:
                kernels.release()

    def _forget(self) -> None:
        self._constants, self._held = None, {}
        self._bound.clear()

    def _part(self, name: str):
        """The kernels "main" or "sub", bound."""
        kernels, part = (self._main, self._chain.main) if name == "main" else (self._sub, self._chain.sub)
        if name not in self._bound:
            kernels.bind([self._constants[k] for k in part.constants])
            self._bound.add(name)
        return kernels

    # --- products: the whole program's ----------------------------------------------------------------------------------------

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """J v, (M,)."""
        return self._whole.jvp(v)

    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        """J^T u, (P,); of u (K, M): (K, P)."""
        return _pulled(self._whole, u) if u.dim() == 2 else self._whole.vjp(u)

    def cg(self, *given):
        """See kernels.protocol.Kernels."""
        return self._whole.cg(*given)

    def lsmr(self, *given):
        """See kernels.protocol.Kernels."""
        return self._whole.lsmr(*given)

    def multishift(self, *given):
        """See kernels.protocol.Kernels."""
        return self._whole.multishift(*given)

    # --- J and its products with itself ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def dense(self) -> torch.Tensor:
        """J, (M, P)."""
        main = self._part("main")
        J = self._direct(main, list(range(self._own)))
        starts = [0, *itertools.accumulate(self._sizes)]
        if self._sub is not None:
            pulled, start = self._chained(main), 0
            for p in self._chain.owned:
                J[:, starts[p] : starts[p + 1]] += pulled[:, start : start + self._sizes[p]]
                start += self._sizes[p]
        if len(self._border) == 0:
            return J
        rows, kept = self._border_rows(), J
        J = kept.new_empty(self.num_residuals, self.num_parameters)
        J[self._kept], J[self._border] = kept, rows
        return J

    def _direct(self, main, parameters: list[int]) -> torch.Tensor:
        """The columns of these parameters without what comes through sub."""
        J, start = main.columns(parameters), 0
        for p in parameters:
            for number, (scaled, factor) in enumerate(zip(self._chain.scaled, self._factors(), strict=True)):
                if scaled.parameter == p:
                    J[:, start : start + self._sizes[p]] += main.columns([self._own + number]).mul_(factor)
            start += self._sizes[p]
        return J

    def _chained(self, main) -> torch.Tensor:
        """J_q Q over the parameters of sub, of the residuals that are kept."""
        J_q, sub = main.columns(self._rest), self._part("sub")
        if self._chain.elementwise is not None:
            return self._multiplied(J_q, sub)
        return _pulled(sub, J_q) if self._chain.by_rows else J_q @ sub.dense()

    def _multiplied(self, J_q: torch.Tensor, sub) -> torch.Tensor:
        """The same where each element of q depends on one element of each of its parameters, in the same place."""
        owned = {p: self._sizes[p] for p in self._chain.owned}
        if [[p] for p in owned] == [list(parameters) for parameters in self._chain.elementwise]:
            return J_q.mul_(sub.jvp(torch.ones(sub.num_parameters, dtype=self.dtype, device=self.device)))
        parts: dict[int, torch.Tensor] = {}
        for p in owned:
            v = torch.cat([torch.full((n,), float(o == p), dtype=self.dtype, device=self.device) for o, n in owned.items()])
            slopes, start = sub.jvp(v), 0
            for number, parameters in enumerate(self._chain.elementwise):
                end = start + self._sizes[self._rest[number]]
                if p in parameters:
                    part = J_q[:, start:end] * slopes[start:end]
                    parts[p] = parts[p] + part if p in parts else part
                start = end
        # None of them where the quantities are sums of nothing.
        return torch.cat([J_q[:, :0], *parts.values()], 1) if len(parts) != 1 else parts[self._chain.owned[0]]

    def _factors(self) -> list[float]:
        """Of every scaled quantity the number that its parameter is multiplied with."""
        return [scaled.factor(self._constants) for scaled in self._chain.scaled]

    def _border_rows(self) -> torch.Tensor:
        units = torch.zeros(len(self._border), self.num_residuals, dtype=self.dtype, device=self.device)
        units[torch.arange(len(self._border), device=self.device), self._border] = 1
        return _pulled(self._whole, units)

    @torch.no_grad()
    def gram(self, weights: list[float] | None = None) -> torch.Tensor:
        """J W J^T, (M, M), W one number per parameter or None. Kept for further dampings: not to be changed."""
        key = None if weights is None else tuple(weights)
        if self._held.get("weights", ()) != key or "gram" not in self._held:
            self._held.pop("gram", None)
            self._held["weights"], self._held["gram"] = key, self._gram(weights)
        return self._held["gram"]

    def _gram(self, weights) -> torch.Tensor:
        w = [1.0] * self._own if weights is None else list(weights)
        K = self._kept_gram(w)
        if len(self._border) == 0:
            return K
        rows = self._border_rows() * self._spread(w, range(self._own))
        columns = _pushed(self._whole, rows)
        corner = columns[self._border]
        columns[self._border] = 0.5 * (corner + corner.T)   # symmetric to the last bit
        full = K.new_empty(self.num_residuals, self.num_residuals)
        full[self._kept[:, None], self._kept] = K
        full[:, self._border], full[self._border] = columns, columns.T
        return full

    def _kept_gram(self, w: list[float]) -> torch.Tensor:
        """The same of the residuals that are kept: main's, and what the parameters of sub add.

        With few shared quantities (J_t + J_q Q) W (J_t + J_q Q)^T is J_t W J_t^T + T J_q^T + J_q T^T with T = J_t W Q^T +
        1/2 J_q Q W Q^T, by a product with main's J for each. With many the columns of sub's parameters come apart.
        """
        main, owned = self._part("main"), self._chain.owned
        def gram(w):
            scaled = [w[s.parameter] * f * f for s, f in zip(self._chain.scaled, self._factors(), strict=True)]
            return main.gram(w + scaled + [0.0] * len(self._rest))

        if self._sub is None or self._chain.few:
            K = gram(w)
            K = K if main.has_direct else K.clone()   # those keep theirs
            if self._sub is not None:
                T, J_q = self._few(main, w)
                change = T @ J_q.T
                K += change + change.T
            return K
        K = gram([0.0 if p in owned else x for p, x in enumerate(w)])
        J = self._chained(main)
        if not self._read.isdisjoint(owned):
            J += self._direct(main, owned)
        if any(w[p] != 1 for p in owned):
            J *= self._spread(w, owned).sqrt()
        return main.squared(J).add_(K)

    def _few(self, main, w: list[float]):
        """T and J_q."""
        J_q, sub, owned = main.columns(self._rest), self._part("sub"), self._chain.owned
        apart = self._read.isdisjoint(owned)
        if apart and self._chain.sub_layout is not None:
            return 0.5 * (J_q @ sub.gram([w[p] for p in owned])), J_q
        Q = sub.dense()
        weighed = Q * self._spread(w, owned)
        inner = 0.5 * (weighed @ Q.T)
        if apart:
            return J_q @ inner, J_q
        spread = Q.new_zeros(len(Q), self.num_parameters)
        starts, start = [0, *itertools.accumulate(self._sizes)], 0
        for p in owned:
            spread[:, starts[p] : starts[p + 1]] = weighed[:, start : start + self._sizes[p]]
            start += self._sizes[p]
        scaled = [
            f * spread[:, starts[s.parameter] : starts[s.parameter + 1]]
            for s, f in zip(self._chain.scaled, self._factors(), strict=True)
        ]
        return _pushed(main, torch.cat([spread, *scaled, inner], 1)), J_q

    def _spread(self, weights, parameters) -> torch.Tensor:
        """One number per parameter tensor as one for each element of these."""
        sizes = torch.tensor([self._sizes[p] for p in parameters], device=self.device)
        values = torch.tensor([weights[p] for p in parameters], dtype=self.dtype, device=self.device)
        return values.repeat_interleave(sizes)
    @torch.no_grad()
    def normal(self) -> torch.Tensor:
        """J^T J, (P, P). Kept for further dampings: not to be changed."""
        if "normal" not in self._held:
            J = self.dense()
            self._held["normal"] = self._main.squared(J, transposed=True)
        return self._held["normal"]

    @torch.no_grad()
    def diagonal(self) -> torch.Tensor:
        """diag(J^T J), (P,)."""
        return self.dense().square_().sum(0)


def _pulled(kernels, U: torch.Tensor) -> torch.Tensor:
    """The rows of U through J^T, (K, P)."""
    return kernels.vjp(U.contiguous()) if kernels.batches else torch.stack([kernels.vjp(u) for u in U])


def _pushed(kernels, V: torch.Tensor) -> torch.Tensor:
    """The rows of V through J, as columns, (M, K)."""
    return torch.stack([kernels.jvp(v) for v in V], 1)
