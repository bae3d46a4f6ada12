"""Bags of embeddings, and products with constant sparse matrices: rows that are gathered and summed.

What is summed into one row of the result is padded to the longest such list, so that its positions form a matrix; the length
of that list belongs to the structure.
"""

from __future__ import annotations

import torch

from ..program import UnsupportedStructure
from .table import RULES, Rule, plain, reader, signed

_DENSE = 1 << 24   # entries of a sparse matrix that may be written out
_WORTH = 4         # a matrix is sparse where its fullest row has fewer than one in so many entries
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


def sparse(matrix):
    """A constant matrix for `multiply_left`: (positions, weights) of the entries in each row, or itself written out."""
    entries = matrix.to_sparse_coo().coalesce()
    rows, columns = entries.indices()
    lists = _lists(rows, matrix.shape[0])
    if lists.shape[1] * _WORTH <= matrix.shape[1]:
        return _picked(columns, lists, -1), _picked(entries.values(), lists, 0.0)
    if matrix.numel() > _DENSE:
        raise UnsupportedStructure("a product with a large sparse matrix")
    return matrix.to_dense()


def reads_sparse(names: tuple[str, ...]):
    """A reader of two factors, of which the one on the left may be sparse; then the shape of the result's rows follows."""
    read = reader(names)

    def read_all(node) -> tuple:
        left = node._saved_self
        if left is None or left.layout is torch.strided:
            return read(node)
        others = tuple([sparse(left) if name == "_saved_self" else plain(getattr(node, name)) for name in names])
        return (*others, tuple(node._input_metadata[0].shape[1:]))

    return read_all


def multiply_left(op, matrix, i, shape, alpha=1.0) -> None:
    """Out += alpha * matrix @ in_i, whose rows are of this shape."""
    if isinstance(matrix, tuple):
        _sum_of_rows(op, i, shape, *matrix, alpha)
    else:
        op.matmul(i, left=matrix, alpha=alpha)


_SPARSE = tuple("_saved_" + name for name in "alpha beta mat1 mat2_sym_sizes".split())


def _read_sparse(node) -> tuple:
    return node._saved_alpha, node._saved_beta, sparse(node._saved_mat1), tuple(node._saved_mat2_sym_sizes[1:])


def sparse_sum_and_product(op, alpha, beta, left, shape):
    """Of a constant sparse matrix: beta * input + alpha * left @ matrix."""
    if op.needs[1]:
        raise UnsupportedStructure("a product with a sparse matrix that depends on parameters")
    if op.needs[2]:
        multiply_left(op, left, 2, shape, alpha)
    if op.needs[0]:
        op.add(0, beta)


RULES["SparseAddmmBackward0"] = Rule(sparse_sum_and_product, _SPARSE, _read_sparse)
