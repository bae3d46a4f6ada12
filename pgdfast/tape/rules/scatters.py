"""Transposed gathers: rows that are added up at places.

Out row r is the sum of the input's rows whose target is r. As the program gathers and sums, a table holds, per row of the
output, the numbers of those rows, filled up with -1.
"""

from __future__ import annotations

import math

import torch

from ..program import UnsupportedStructure

_MOST_REPEATED = 64   # how many times longer than its input a table may be


def table_of(targets: torch.Tensor, rows: int, exact: bool = False) -> torch.Tensor:
    """(rows, K) numbers of the targets that name each row, -1 behind the last.

    K is the next power of two, so that other targets seldom make another structure; `exact`: as small as it can be.
    """
    targets = targets.reshape(-1).to(torch.int64)
    kept = targets >= 0
    order = targets.masked_fill(~kept, rows).argsort(stable=True)[: int(kept.sum())]
    counts = torch.bincount(targets[kept], minlength=rows)
    most = int(counts.max()) if rows else 0
    most = max(most if exact else 1 << max(most - 1, 0).bit_length(), 1)
    if rows * most > _MOST_REPEATED * max(len(targets), rows):
        raise UnsupportedStructure("adding many elements to a few places and few to all others")
    table = torch.full((rows, most), -1, dtype=torch.int64, device=targets.device)
    rank = torch.arange(len(order), device=targets.device) - (counts.cumsum(0) - counts)[targets[order]]
    table[targets[order], rank] = order
    return table


def scatter(op, i, table: torch.Tensor, shape, lead: int | None, fixed: bool = False):
    """Out of this shape = sum of rows of in_i by a table; rows are those of `gather`."""
    rows, most = table.shape
    width = math.prod(shape) // rows if rows else 0
    if most == 1:
        op.temporary("rows", (rows, width))
        op.gather(i, table, lead, out="rows", fixed=fixed)
    else:
        op.temporary("parts", (rows, most, width))
        op.gather(i, table, lead, out="parts", fixed=fixed)
        op.temporary("rows", (rows, width))
        op.sum("parts", (1,), False, out="rows")
    op.reshape("rows", shape, out=0)
