"""Operations that write or add elements of one input to places of another."""

from __future__ import annotations

import math

import torch

from .gathers import in_planes, indexed_rows
from .pointwise import coefficient
from .scatters import scatter, table_of
from .structural import slice_window
from .table import RULES, Keyed, OwnBackward, Rule, plain, rule, signed


def writes(*nodes: str, saved: str, source: int = 1, reshaped: bool = False):
    """Register `function(shape, *saved)` for nodes of these names.

    shape: the output's. It returns (targets, lead, expanded, alpha, accumulate): the rows of the output that rows of the
    values, input number `source`, go to; over how many dimensions of the values, broadcast to the shape `expanded`, rows are
    counted; the values' factor; are they added to input 0, or written over it? Without such an input source is 0. reshaped: the
    values have that shape in another form.
    """
    names = tuple("_saved_" + name for name in saved.split())

    def register(function):
        def read(node):
            shape, device = tuple(node._input_metadata[0].shape), node._input_metadata[0].device
            wanted = [edge[0] is not None for edge in node.next_functions]
            values = [plain(getattr(node, name)) for name in names]
            if not wanted[source] and any(value is None for value in values):   # places are saved only where they matter
                return Keyed((None, None), (None, 0, (), 1)), shape
            targets, lead, expanded, alpha, accumulate = function(shape, *values)
            rows = math.prod(shape) // max(math.prod(expanded[lead:]), 1)
            table = table_of(targets, rows) if wanted[source] else None
            mask = None
            if source and wanted[0] and not accumulate:
                mask = torch.ones(rows, dtype=torch.bool, device=device)
                mask[targets[targets >= 0]] = False
                mask = mask.repeat_interleave(math.prod(shape) // max(rows, 1)).view(shape)
            key = None if table is None else tuple(table.shape), lead, tuple(expanded), alpha
            return Keyed((table, mask), key), shape

        def apply(op, found, shape):
            (table, mask), (_, lead, expanded, alpha) = found.value, found.key
            if op.needs[source]:
                values = source
                if reshaped:
                    op.reshape(source, expanded, out="reshaped")
                    values = "reshaped"
                op.temporary("values", expanded)
                op.add(values, alpha, out="values")
                scatter(op, "values", table, shape, lead)
            if source and op.needs[0]:
                op.add(0) if mask is None else op.scale(0, mask)
            elif not op.needs[source]:
                op.nothing()

        for node in nodes:
            RULES[node] = Rule(apply, names, read)
        return function

    return register


def _numbers(sizes, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(math.prod(sizes), device=like.device).view(sizes)


def _rows_along(shape, dim, index: torch.Tensor):
    """Numbers of the rows, over the dimensions up to `dim`, that an index along it names."""
    if not shape:
        return torch.zeros_like(index.reshape(-1)), (index.numel(),)
    dim = signed(dim) % len(shape)
    targets = _numbers(shape[: dim + 1], index).index_select(dim, index.reshape(-1))
    return targets, (*targets.shape, *shape[dim + 1 :])


@writes("IndexAddBackward0", saved="dim index alpha")
def index_add(shape, dim, index, alpha):
    targets, expanded = _rows_along(shape, dim, index)
    return targets, targets.dim(), expanded, alpha, True


@writes("IndexCopyBackward0", saved="dim index")
def index_copy(shape, dim, index):
    targets, expanded = _rows_along(shape, dim, index)
    return targets, targets.dim(), expanded, 1, False


@writes("IndexPutBackward0", "IndexPutImplBackward0", "UnsafeIndexPutBackward0", saved="indices accumulate")
def index_put(shape, indices, accumulate):
    targets, dims = indexed_rows(indices, shape)
    return targets, targets.dim(), (*targets.shape, *shape[dims:]), 1, accumulate


def _elements_along(shape, dim, index: torch.Tensor) -> torch.Tensor:
    """Numbers of the elements [.., index[.., i, ..], ..] along a dimension."""
    if not shape:
        return torch.zeros_like(index)
    dim = signed(dim) % len(shape)
    targets = torch.zeros_like(index)
    for d, n in enumerate(index.shape):
        places = index if d == dim else torch.arange(n, device=index.device).view(-1, *[1] * (len(shape) - d - 1))
        targets = targets + places * math.prod(shape[d + 1 :])
    return targets


@writes("ScatterAddBackward0", saved="dim index")
def scatter_add(shape, dim, index):
    return _elements_along(shape, dim, index), index.dim(), tuple(index.shape), 1, True


@writes("ScatterBackward0", saved="dim index")
def scatter_values(shape, dim, index):
    return _elements_along(shape, dim, index), index.dim(), tuple(index.shape), 1, False


@writes("PutBackward0", saved="accumulate index", reshaped=True)
def put(shape, accumulate, index):
    targets = torch.where(index < 0, index + math.prod(shape), index).reshape(-1)
    return targets, 1, (len(targets),), 1, accumulate


@writes("MaskedScatterBackward0", saved="mask source_sym_sizes")
def masked_scatter(shape, mask, sizes):
    places = mask.expand(shape).reshape(-1).nonzero()[:, 0]
    targets = torch.full((math.prod(sizes),), -1, dtype=torch.int64, device=mask.device)
    targets[: len(places)] = places
    return targets.view(sizes), len(sizes), tuple(sizes), 1, False


@rule("MaskedScatterBackwardBackward0", saved="mask", own=True)
def masked_scatter_backward(op, mask, backward):
    """The elements under a mask one after the other, zeros behind them."""
    ones = backward(backward.ones())[0]
    places = mask.expand(ones.shape).reshape(-1).nonzero()[:, 0]
    rows = torch.full((math.prod(backward.outputs[0].shape),), -1, dtype=torch.int64, device=mask.device)
    rows[: len(places)] = places[: len(rows)]
    op.gather(0, rows, None)


@writes("MaxUnpool2DBackward0", saved="indices", source=0)
@writes("MaxPool2DWithIndicesBackwardBackward0", "AdaptiveMaxPool2DBackwardBackward0", "FractionalMaxPool2DBackwardBackward0",
        saved="indices", source=0)
def unpool2d(shape, index):
    return in_planes(index, shape, 2), index.dim(), tuple(index.shape), 1, True


@writes("MaxUnpool3DBackward0", saved="indices", source=0)
@writes("MaxPool3DWithIndicesBackwardBackward0", "AdaptiveMaxPool3DBackwardBackward0", "FractionalMaxPool3DBackwardBackward0",
        saved="indices", source=0)
def unpool3d(shape, index):
    return in_planes(index, shape, 3), index.dim(), tuple(index.shape), 1, True


@writes("EmbeddingDenseBackwardBackward0", saved="indices padding_idx", source=0)
def embedding_backward(shape, index, padding):
    padding = signed(padding)
    targets = index if padding < 0 else index.masked_fill(index == padding, -1)
    return targets, index.dim(), (*index.shape, *shape[1:]), 1, True


# Reductions: each value goes to one place, with a weight that the node's own backward gives.


def _read_reduction(node, targets: torch.Tensor):
    backward = OwnBackward(node)
    kept, values = [None if g is None else g.contiguous() for g in backward(backward.ones())]
    shape = tuple(backward.outputs[0].shape)
    table = None if values is None else table_of(targets, math.prod(shape))
    key = None if table is None else (tuple(table.shape), tuple(values.shape))
    return Keyed((table, kept, values), key), shape


def _read_scatter_reduce(node):
    shape = tuple(node._input_metadata[0].shape)
    return _read_reduction(node, _elements_along(shape, node._saved_dim, node._saved_index))


def _read_index_reduce(node):
    shape, index = tuple(node._input_metadata[0].shape), node._saved_index
    rows, expanded = _rows_along(shape, node._saved_dim, index)
    width = math.prod(expanded[rows.dim() :])
    return _read_reduction(node, rows.reshape(-1, 1) * width + torch.arange(width, device=index.device))


def _reduction(op, found, shape):
    table, kept, values = found.value
    if op.needs[1]:
        op.temporary("values", values.shape)
        op.scale(1, values, out="values")
        scatter(op, "values", table, shape, None)
    if op.needs[0]:
        op.scale(0, kept)


RULES["ScatterReduceBackward0"] = Rule(_reduction, ("_saved_dim", "_saved_index"), _read_scatter_reduce)
RULES["IndexReduceBackward0"] = Rule(_reduction, ("_saved_dim", "_saved_index"), _read_index_reduce)


# Windows and numbers written over the first input.


def _written(op, backward: OwnBackward, window):
    if op.needs[1]:
        op.add(1, where=window)
    if op.needs[0]:
        kept = coefficient(backward(backward.ones())[0], backward)
        op.scale(0, kept.real.contiguous() if kept.is_complex() else kept)


@rule("SliceScatterBackward0", saved="dim start end step", own=True)
def slice_scatter(op, dim, start, end, step, backward):
    _written(op, backward, slice_window(dim, start, end, step))


@rule("SelectScatterBackward0", saved="dim index", own=True)
def select_scatter(op, dim, index, backward):
    _written(op, backward, lambda y: y.select(signed(dim), signed(index)))


@rule("DiagonalScatterBackward0", saved="dim1 dim2 offset", own=True)
def diagonal_scatter(op, dim1, dim2, offset, backward):
    _written(op, backward, lambda y: y.diagonal(signed(offset), signed(dim1), signed(dim2)))


@rule("MaskedFillBackward1", saved="mask")
def masked_fill(op, mask):
    if op.needs[0]:
        op.scale(0, ~mask)
    if op.needs[1]:
        op.scale(1, mask)


@rule("IndexFillBackward1", saved="dim index", shape=True)
def index_fill(op, dim, index, shape, device):
    mask = torch.zeros(shape, dtype=torch.bool, device=device).index_fill(signed(dim), index, True)
    if op.needs[0]:
        op.scale(0, ~mask)
    if op.needs[1]:
        op.scale(1, mask)


@rule("CopyBackwards")
def copy(op):
    if op.needs[1]:
        op.add(1)
    else:
        op.scale(0, 0.0)


@rule("FillBackward0", "FillBackward1", "FillBackward2", "FillBackward3")
def fill(op):
    if len(op.needs) > 1 and op.needs[1]:
        op.add(1)
    else:
        op.scale(0, 0.0)
