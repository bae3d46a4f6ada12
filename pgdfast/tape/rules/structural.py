"""Reshapes, windows, joins and sums: views where a view exists, else one strided copy or reduction."""

from __future__ import annotations

import dataclasses

from .table import RULES, Keyed, OwnBackward, Rule, reduced, rule, signed


@rule("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "ReshapeCopyBackward0", saved="self_sym_sizes")
def view(op, sizes):
    op.reshape(0)


@rule("TBackward0", "TBackward1")
def t(op):
    op.view(0, lambda x: x.t())


@rule("TransposeBackward0", "TransposeBackward1", saved="dim0 dim1")
def transpose(op, dim0, dim1):
    op.view(0, lambda x: x.transpose(signed(dim0), signed(dim1)))


@rule("PermuteBackward0", saved="dims")
def permute(op, dims):
    op.view(0, lambda x: x.permute([signed(d) for d in dims]))


@rule("ExpandBackward0", saved="self_sym_sizes")
def expand(op, sizes):
    op.expand(0)


@rule("UnsqueezeBackward0", "UnsqueezeBackward1", saved="dim")
def unsqueeze(op, dim):
    op.view(0, lambda x: x.unsqueeze(signed(dim)))


@rule("SqueezeBackward0", "SqueezeBackward3", saved="self_sym_sizes")
def squeeze(op, sizes):
    op.view(0, lambda x: x.squeeze())


@rule("SqueezeBackward1", "SqueezeBackward4", saved="dim self_sym_sizes")
def squeeze_dim(op, dim, sizes):
    op.view(0, lambda x: x.squeeze(signed(dim)))


@rule("SqueezeBackward2", "SqueezeBackward5", saved="dim self_sym_sizes")
def squeeze_dims(op, dims, sizes):
    op.view(0, lambda x: x.squeeze(tuple(signed(d) for d in dims)))


@rule("SliceBackward0", saved="dim start end step")
def slice_(op, dim, start, end, step):
    op.view(0, slice_window(dim, start, end, step))


def slice_window(dim, start, end, step):
    """The function x[start:end:step] along a dimension."""
    dim, start, end = signed(dim), signed(start or 0), end if end is None else signed(end)

    def window(x):
        d = dim % x.dim()
        return x[(slice(None),) * d + (slice(start, end, step),)]

    return window


@rule("NarrowCopyBackward0", saved="dim start length")
def narrow_copy(op, dim, start, length):
    op.view(0, lambda x: x.narrow(signed(dim), start, length))


@rule("SelectBackward0", saved="dim index")
def select(op, dim, index):
    op.view(0, lambda x: x.select(signed(dim), signed(index)))


@rule("DiagonalBackward0", saved="dim1 dim2 offset")
def diagonal(op, dim1, dim2, offset):
    op.view(0, lambda x: x.diagonal(signed(offset), signed(dim1), signed(dim2)))


@rule("SliceBackwardBackward0", saved="dim start end step")
def slice_backward(op, dim, start, end, step):
    """f(g) = zeros with g in the window."""
    op.add(0, where=slice_window(dim, start, end, step))


@rule("SelectBackwardBackward0", saved="dim index")
def select_backward(op, dim, index):
    """f(g) = zeros with g in the window."""
    op.add(0, where=lambda x: x.select(signed(dim), signed(index)))


@rule("SplitBackward0", "UnsafeSplitBackward0", saved="dim split_size self_sym_sizes")
def split(op, dim, size, sizes):
    dim = signed(dim) % len(sizes)
    for k, start in enumerate(range(0, max(sizes[dim], 1), max(size, 1))):   # of no elements there is one part
        op.view(0, lambda x, a=start: x.narrow(dim, a, min(size, sizes[dim] - a)), out=k)


@rule("SplitWithSizesBackward0", "UnsafeSplitWithSizesBackward0", saved="dim split_sizes self_sym_sizes")
def split_with_sizes(op, dim, parts, sizes):
    start = 0
    for k, size in enumerate(parts):
        op.view(0, lambda x, a=start, n=size: x.narrow(signed(dim), a, n), out=k)
        start += size


@rule("UnbindBackward0", saved="dim")
def unbind(op, dim):
    op.unbind(0, signed(dim))


@rule("CatBackward0", saved="dim")
def cat(op, dim):
    op.join(signed(dim), stacked=False)


def _read_sizes(node):
    dim, backward = signed(node._saved_dim), OwnBackward(node)
    sizes = tuple([g.shape[dim] if g.dim() == len(backward.outputs[0].shape) else 0 for g in backward(backward.ones())])
    return (Keyed(None, (dim, sizes)),)


def cat_by_sizes(op, found):
    """Pieces that no parameter reaches leave no sizes on the tape: of several only the node's backward knows."""
    dim, sizes = found.key
    op.join(dim, stacked=False, sizes=sizes)


def _several_constants(structure, position):
    return Rule(cat_by_sizes, (), _read_sizes) if structure.edges[position].count(None) > 1 else None


RULES["CatBackward0"] = dataclasses.replace(RULES["CatBackward0"], specialize=_several_constants)


@rule("StackBackward0", saved="dim")
def stack(op, dim):
    op.join(signed(dim), stacked=True)


@rule("RepeatBackward0", saved="repeats self_sym_sizes")
def repeat(op, repeats, sizes):
    op.tile(0, tuple(repeats))


@rule("SumBackward0", saved="self_sym_sizes")
def sum_all(op, sizes):
    op.sum(0, None, False)


@rule("SumBackward1", saved="dim keepdim self_sym_sizes")
def sum_dims(op, dims, keepdim, sizes):
    op.sum(0, reduced(dims, len(sizes)), keepdim)


@rule("MeanBackward0", saved="self_sym_numel self_sym_sizes")
def mean_all(op, numel, sizes):
    op.sum(0, None, False, alpha=1 / max(numel, 1))


@rule("MeanBackward1", saved="dim keepdim self_sym_sizes")
def mean_dims(op, dims, keepdim, sizes):
    dims = reduced(dims, len(sizes))
    count = 1
    for d in dims:
        count *= sizes[d]
    op.sum(0, dims, keepdim, alpha=1 / max(count, 1))


@rule("torch.nn.parallel.distributed._DDPSinkBackward")   # what a model returned, watched by DistributedDataParallel
def ddp_sink(op):
    for k, needed in enumerate(op.needs):
        if needed:
            op.view(k, lambda x: x, out=k)
