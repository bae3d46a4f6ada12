"""Bags of embeddings: rows of a table that are gathered and summed.

The rows of a bag are padded to the longest, so that their positions form a matrix; the longest belongs to the structure.
"""

from __future__ import annotations

import torch

from ..program import UnsupportedStructure
from .table import RULES, Rule, reader, signed

_MEAN, _MAX = 1, 2   # modes of an embedding bag


def _lists(rows: torch.Tensor, count: int) -> torch.Tensor:
    """(count, length): the numbers k with rows[k] = i, for each i in order, -1 behind them. rows ascend."""
    counts = torch.bincount(rows, minlength=count)
    length = int(counts.max()) if count else 0
    places = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    lists = torch.full((count, length), -1, dtype=torch.int64, device=rows.device)
    lists[rows, places] = torch.arange(len(rows), device=rows.device)
    return lists


def _picked(values: torch.Tensor, lists: torch.Tensor, otherwise) -> torch.Tensor:
    """values[lists], with another number where there is none."""
    if not len(values):
        return values.new_full(lists.shape, otherwise)
    return values[lists.clamp(min=0)].masked_fill(lists < 0, otherwise)


def _sum_of_rows(op, i, shape, positions: torch.Tensor, weights, alpha=1.0) -> None:
    """out[r] += alpha * sum over l of weights[r, l] * in_i[positions[r, l]], in_i of rows of this shape."""
    op.temporary("picked", (*positions.shape, *shape))
    op.gather(i, positions, 1, out="picked")
    if weights is not None:
        weights = weights.view(*weights.shape, *[1] * len(shape))
    op.sum("picked", (1,), False, c=weights, alpha=alpha)


_BAG = tuple("_saved_" + name for name in (
    "indices", "offsets", "mode", "padding_idx", "per_sample_weights", "result3", "scale_grad_by_freq", "weight",
))
_saved_of_bag = reader(_BAG)


def _read_bag(node) -> tuple:
    indices, offsets, mode, padding, weights, largest, by_frequency, table = _saved_of_bag(node)
    count, width = node._input_metadata[0].shape
    if by_frequency:
        raise UnsupportedStructure("an embedding bag with scale_grad_by_freq")
    indices, padding = indices.long(), signed(padding)
    ends = torch.cat([offsets.long(), offsets.new_tensor([len(indices)]).long()])[: count + 1]
    lists = _lists(torch.repeat_interleave(torch.arange(count, device=indices.device), ends[1:] - ends[:-1]), count)
    if padding >= 0:
        lists = lists.masked_fill(_picked(indices, lists, padding) == padding, -1)
    if mode == _MAX:
        empty = (lists < 0).all(1, keepdim=True)
        positions = largest * width + torch.arange(width, device=largest.device)
        return mode, positions.masked_fill(empty, -1), None, None, None, width
    shares = rows = None
    if mode == _MEAN:
        shares = (1 / (lists >= 0).sum(1, keepdim=True).clamp(min=1).to(torch.float64)).expand(lists.shape)
    elif weights is not None:
        shares = _picked(weights, lists, 0.0)
    if table is not None and table.numel():
        rows = table[_picked(indices, lists, 0)].masked_fill((lists < 0)[..., None], 0.0)
    return mode, _picked(indices, lists, -1), shares, lists, rows, width


def embedding_bag(op, mode, positions, shares, lists, rows, width):
    """Sums, means or maxima of rows of an embedding; sums may have weights."""
    if mode == _MAX:
        op.gather(0, positions, 2)
        return
    if op.needs[0]:
        _sum_of_rows(op, 0, (width,), positions, shares)
    if op.needs[1]:
        op.temporary("weights", lists.shape)
        op.gather(1, lists, 1, out="weights")
        op.view("weights", lambda t: t[..., None].expand(-1, -1, width), out="weights")
        op.sum("weights", (1,), False, c=rows)


RULES["EmbeddingBagBackward0"] = Rule(embedding_bag, _BAG, _read_bag)
