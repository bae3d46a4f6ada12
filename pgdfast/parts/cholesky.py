"""A Cholesky factor whose work is shared by the ranks of a process group, and held by all of them."""

from __future__ import annotations

import torch

SHARED_FROM = 2048   # matrices of lower orders are factored by every rank for itself
_WIDTH = 256         # of a panel


class SharedFactor:
    """L of a matrix L L^T (kernels.protocol.Factor), the same bits on every rank.

    panels: columns of L, 256 each, from their diagonal block on. positions: of a dual matrix, where each residual stands in it;
    None for a primal one.
    """

    def __init__(self, panels: list[torch.Tensor], positions: torch.Tensor | None):
        self._panels, self._positions = panels, positions
        self.dual_vector: torch.Tensor | None = None

    order = property(lambda self: len(self._panels[0]), doc="M or P.")
    is_dual = property(lambda self: self._positions is not None, doc="True for the matrix of the residuals.")
    bytes = property(lambda self: sum(p.numel() * p.element_size() for p in self._panels), doc="Memory held.")

    def solve(self, b: torch.Tensor) -> torch.Tensor:
        """See kernels.protocol.Factor."""
        x = b.to(self._panels[0].dtype, copy=True)
        if self._positions is not None:
            x[self._positions] = b.to(x.dtype)
        at = [sum(p.shape[1] for p in self._panels[:k]) for k in range(len(self._panels))]
        for first, panel in zip(at, self._panels, strict=True):
            width = panel.shape[1]
            block, below = x[first : first + width], x[first + width :]
            block.copy_(torch.linalg.solve_triangular(panel[:width], block[:, None], upper=False)[:, 0])
            below.addmv_(panel[width:], block, alpha=-1)
        for first, panel in zip(reversed(at), reversed(self._panels), strict=True):
            width = panel.shape[1]
            block, below = x[first : first + width], x[first + width :]
            block.addmv_(panel[width:].T, below, alpha=-1)
            block.copy_(torch.linalg.solve_triangular(panel[:width].T, block[:, None], upper=True)[:, 0])
        return (x if self._positions is None else x[self._positions]).to(b.dtype)


def shared_factor(group, H: torch.Tensor, added, positions: list[int] | None = None) -> tuple[SharedFactor | None, float]:
    """As kernels.native.factor, by all ranks of a group, which all have H; a collective.

    Blocks of columns of the upper triangle are dealt out in turn. Of each block its owner factors what is on the diagonal,
    every rank solves for its own later columns, all get these, and each updates its own. Cost: n^3 / (3 R) operations, half of
    the memory of H for the factor and 1 / (2 R) of it to work in; sends n^2 / 2 (R - 1) / R numbers.

    Source: the right-looking factorisation of ScaLAPACK (Choi et al. 1996), on a grid of 1 x R processes.
    """
    n, R = len(H) - 1, group.size
    blocks = [(first, min(first + _WIDTH, n)) for first in range(0, n, _WIDTH)]
    with group.section():
        shift = torch.as_tensor(added, dtype=torch.float64).expand(n)
        diagonal = H.as_strided((n,), (H.stride(0) + 1,))
        trace = float((diagonal.double() / shift).sum())
        shift = (diagonal.double() + shift).to(H.dtype)
        own = {}
        for first, last in blocks[group.rank :: R]:
            own[first] = column = H[:last, first:last].clone()
            column[first:].as_strided((last - first,), (last - first + 1,), column[first:].storage_offset()).copy_(
                shift[first:last]
            )
        order = None if positions is None else torch.tensor(positions)
    panels = []
    for k, (first, last) in enumerate(blocks):
        width = last - first
        if k % R == group.rank:
            top, failed = torch.linalg.cholesky_ex(own.pop(first)[first:], upper=True)
            top = top.T.tril() if not failed else torch.full((width, width), torch.nan, dtype=H.dtype)
        else:
            top = H.new_empty(width, width)
        top = group.same(top, k % R)
        if not torch.isfinite(top[0, 0]):
            return None, trace
        later = [blocks[k + 1 :][(r - k - 1) % R :: R] for r in range(R)]   # of each rank
        solved = H.new_empty(0, width)
        if own:
            given = torch.cat([column[first:last] for column in own.values()], 1)
            solved = torch.linalg.solve_triangular(top, given, upper=False).T
        everything = group.joined(solved, [sum(b - a for a, b in each) for each in later])
        panel, at = H.new_empty(n - first, width), 0
        panel[:width] = top
        for a, b in (block for each in later for block in each):
            panel[a - first : b - first] = everything[at : at + b - a]
            at += b - a
        panels.append(panel)
        for a, column in own.items():
            b = len(column)
            column[last:].addmm_(panel[width : b - first], panel[a - first : b - first].T, alpha=-1)
    return SharedFactor(panels, order), trace
