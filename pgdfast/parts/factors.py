"""K = J W J^T of all parts from the factors of their rows: what is sent are these, M (m + k) numbers of a weight m x k.

The rows of J themselves would be M m k numbers. Every process makes an equal share of K, whole rows of its upper triangle, and
gets the others'.
"""

from __future__ import annotations

import math

import torch

from ..kernels import native

_ROWS_AT_ONCE = 64   # of K, sent from the first of their diagonal elements on


def gram_of_factors(lin, weights: list[float] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(K as native.gram_matrix has it, of every residual its row there), in every process.

    lin: a Parts linearization, of kernels that pack. weights: W, one number per parameter tensor, None for ones.
    """
    group, M = lin.group, lin.num_residuals
    packs, orders = _of_all_processes(lin)
    starts = [0]
    for one in packs:
        starts.append(starts[-1] + one.num_residuals)
    order = torch.cat([torch.tensor(own, dtype=torch.long) + first for own, first in zip(orders, starts, strict=False)])
    cuts = [round(M * (1 - math.sqrt(1 - r / group.size))) for r in range(group.size + 1)]   # into equal areas
    with group.section():
        K = native.gram_matrix(M, lin.dtype)
        low, high = cuts[group.rank], cuts[group.rank + 1]
        for a, at in zip(packs, starts, strict=False):
            first, last = max(low - at, 0), min(high - at, a.num_residuals)
            for b, column in zip(packs, starts, strict=False):
                if first < last and column >= at:
                    native.gram_rows(a, b, first, last, K, at + first, column, weights)
    if group.size > 1:
        _share_rows(group, K, M, cuts)
    return K, order


def _of_all_processes(lin) -> tuple[list, list]:
    """The packed factors of every part with rows; of every residual of a part its row there."""
    group = lin.group
    with group.section():
        own = lin.visit(lambda part, one: _packed(one.kernels()) if part.size else None)
        own = [one for one in own if one is not None]
    if group.size == 1:
        return [one for one, _ in own], [order for _, order in own]
    told = group.objects([(one.header(), one.tensor().numel(), order) for one, order in own])
    numbers = torch.cat([torch.empty(0, dtype=lin.dtype), *(one.tensor() for one, _ in own)])
    everything = group.gather(numbers, [sum(count for _, count, _ in each) for each in told])
    packs = []
    for each, whole in zip(told, everything, strict=True):
        parts = whole.split([count for _, count, _ in each])
        packs += [native.packed(header, part) for (header, _, _), part in zip(each, parts, strict=True)]
    return packs, [order for each in told for _, _, order in each]


def _packed(kernels) -> tuple:
    return kernels.pack(), list(kernels.gram_order)


def _share_rows(group, K: torch.Tensor, M: int, cuts: list[int]) -> None:
    """Give all processes the rows of the upper triangle that each has made, in blocks from their first diagonal on."""
    blocks = [
        [(first, min(first + _ROWS_AT_ONCE, high)) for first in range(low, high, _ROWS_AT_ONCE)]
        for low, high in zip(cuts[:-1], cuts[1:], strict=True)
    ]
    sizes = [sum((last - first) * (M - first) for first, last in each) for each in blocks]
    own = [K[first:last, first:M].reshape(-1) for first, last in blocks[group.rank]]
    everything = group.gather(torch.cat([K.new_empty(0), *own]), sizes)
    for each, numbers in zip(blocks, everything, strict=True):
        at = 0
        for first, last in each:
            count = (last - first) * (M - first)
            K[first:last, first:M] = numbers[at : at + count].view(last - first, M - first)
            at += count
