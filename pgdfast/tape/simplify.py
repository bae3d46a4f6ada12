"""What a new program can do without: additions that only rename, and work on elements that reach no residual.

A model that reads its logits off the last token computes, in its last layer, mostly values that nothing reads. Both
sweeps skip them: index spaces are cut down to the elements that matter.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .program import (
    GATHER,
    MATMUL,
    MULADD,
    PARAMETER,
    PROJECT,
    RESIDUAL,
    WORKSPACE,
    Program,
    UnsupportedStructure,
    coalesce,
    fits_blas,
)

_WIDE = 16   # columns from which on a product of their own is worth a call


def simplify(program: Program) -> None:
    """Rewrite a recorded program in place; its constants keep their numbers."""
    _read_parameters(program)
    _merge_sums(program)
    trim(program)


def windows(array: np.ndarray, shape, strides, offset: int) -> np.ndarray:
    """A strided window on a flat array, without a copy; it may be written where strides do not repeat elements."""
    size = array.itemsize
    return np.lib.stride_tricks.as_strided(array[offset:], shape, [s * size for s in strides])


def _read_parameters(program: Program) -> None:
    """Let readers of a plain copy of a parameter read the parameter: its rows separate, those of what is shared do not.

    No use of a parameter may write a residual itself or project (csrc/cpu/rows.h).
    """
    writes: dict[int, int] = {}
    kept_apart = set()
    for op in program.instructions:
        writes[op.y] = writes.get(op.y, 0) + 1
        if program.buffers[op.y][0] == RESIDUAL or op.kind not in (MULADD, MATMUL):
            kept_apart.add(op.x)
    name = list(range(len(program.buffers)))
    kept = []
    for op in program.instructions:
        op.x = name[op.x]
        roles = program.buffers[op.x][0], program.buffers[op.y][0]
        if roles == (PARAMETER, WORKSPACE) and writes[op.y] == 1 and op.y not in kept_apart and _renames(program, op):
            name[op.y] = op.x
            program.buffers[op.y] = (WORKSPACE, 0)
        else:
            kept.append(op)
    program.instructions[:] = kept


def _merge_sums(program: Program) -> None:
    """Let what is only ever added to a sum write into the sum: y += x with no other reader of x makes x another name of y."""
    first_read, last_write, reads = {}, {}, {}
    for i, op in enumerate(program.instructions):
        first_read.setdefault(op.x, i)
        last_write[op.y] = i
        reads[op.x] = reads.get(op.x, 0) + 1
    name = list(range(len(program.buffers)))
    kept = []
    for i, op in enumerate(program.instructions):
        roles = program.buffers[op.x][0], program.buffers[op.y][0]
        if (
            roles == (WORKSPACE, WORKSPACE) and reads[op.x] == 1 and _renames(program, op)
            and last_write.get(op.x, i) < i and first_read.get(op.y, i + 1) > last_write[op.y]
        ):
            name[op.x] = op.y
            program.buffers[op.x] = (WORKSPACE, 0)
        else:
            kept.append(op)
    for op in kept:
        op.y, op.x = _resolve(name, op.y), _resolve(name, op.x)
    program.instructions[:] = kept


def _resolve(name: list[int], buffer: int) -> int:
    while name[buffer] != buffer:
        buffer = name[buffer]
    return buffer


def _renames(program: Program, op) -> bool:
    """Say whether an instruction adds the whole of one buffer to the whole of another, element by element."""
    size = program.buffers[op.x][1]
    return (
        op.kind == MULADD and op.constant < 0 and op.alpha == 1 and op.x_offset == op.y_offset == 0
        and size == program.buffers[op.y][1] and op.extents[:3] in ([[size], [1], [1]], [[], [], []])
    )


def trim(program: Program) -> None:
    """Cut every instruction's index space down to elements of y that reach a residual."""
    live = [
        None if role == PARAMETER else np.full(size, role == RESIDUAL, bool) for role, size in program.buffers
    ]
    exact = [True] * len(live)   # do instructions touch nothing but live elements of a buffer?
    kept = []

    def mask_of(op):
        return windows(live[op.y], *index_space(op), op.y_offset)

    for whole in reversed(program.instructions):
        for op in _split(whole, mask_of(whole)):
            mask = mask_of(op)
            if not mask.any():
                continue
            if not mask.all():
                op = _cut(op, mask)
                mask = mask_of(op)
                if not mask.all():
                    exact[op.x] = exact[op.y] = False
            kept.append(op)
            if live[op.x] is not None:
                _reach(op, mask, live[op.x])
    program.instructions[:] = reversed(kept)
    program.live = []
    for k, (role, size) in enumerate(program.buffers):
        count = size if live[k] is None or not exact[k] else int(live[k].sum())
        program.live.append(count)
        if role == WORKSPACE and count == 0:
            program.buffers[k] = (role, 0)


def index_space(op):
    """Shape and strides of the elements of y that an instruction writes."""
    if op.kind == MATMUL:
        b, m, n, _, yb, ym, yn = op.extents[0][:7]
        return [op.extents[0][13], b, m, n], [op.extents[0][14], yb, ym, yn]
    if op.kind == GATHER:
        rows, width, y_row = op.extents[0][:3]
        return [rows, width], [y_row, 1]
    return op.extents[0], op.extents[1]


def _reach(op, mask: np.ndarray, live: np.ndarray) -> None:
    """Mark the elements of x that the marked elements of y are computed from."""
    if op.kind == GATHER:   # whichever rows the positions name
        _, width, _, x_row, count = op.extents[0]
        windows(live, (count, width), (x_row, 1), op.x_offset)[...] |= mask.any(0)
        return
    if op.kind == MATMUL:
        b, m, _, k = op.extents[0][:4]
        shape, strides = [op.extents[0][13], b, m, k], [op.extents[0][15], *op.extents[0][7:10]]
        mask = mask.any(-1, keepdims=True)
    else:
        shape, strides = op.extents[0], op.extents[2]
        if op.kind == PROJECT:
            mask = mask.any(-1, keepdims=True)
    shared = tuple(d for d, s in enumerate(strides) if s == 0 and shape[d] > 1)
    if shared:
        mask = mask.any(shared, keepdims=True)
    target = windows(live, [1 if d in shared else n for d, n in enumerate(shape)], strides, op.x_offset)
    target |= mask


@dataclasses.dataclass(slots=True)
class _Range:
    """Elements of one dimension: `runs` runs of `length`, `step` apart, from `start`."""

    start: int
    runs: int
    step: int
    length: int


def _range(mask: np.ndarray) -> _Range:
    """The smallest such set that holds all marked positions, with one run if no regular ones are found."""
    places = np.flatnonzero(mask)
    first, last = int(places[0]), int(places[-1])
    edges = np.flatnonzero(np.diff(places) != 1)
    starts = places[np.concatenate([[0], edges + 1])]
    lengths = np.diff(np.concatenate([[0], edges + 1, [len(places)]]))
    steps = np.diff(starts)
    if len(steps) and (lengths == lengths[0]).all() and (steps == steps[0]).all():
        return _Range(first, len(starts), int(steps[0]), int(lengths[0]))
    step = int(np.gcd.reduce(np.diff(places))) if len(places) > 1 else 1
    if step > 1:
        return _Range(first, (last - first) // step + 1, step, 1)
    return _Range(first, 1, 1, last - first + 1)


def _split(op, mask: np.ndarray) -> list:
    """A product whose columns need different rows (or the other way round) as one product for each; else itself.

    Queries, keys and values are often one product, of which the last token needs all keys and values but one query.
    """
    if op.kind != MATMUL or mask.all() or not mask.any():
        return [op]
    for d in (2, 3):
        along = np.moveaxis(mask, d, 0).reshape(mask.shape[d], -1)
        edges = [0, *(np.flatnonzero((along[1:] != along[:-1]).any(1)) + 1).tolist(), mask.shape[d]]
        if 2 < len(edges) <= 5 and min(np.diff(edges)) >= _WIDE:
            return [_cut_matmul(op, _whole(mask.shape, d, a, b)) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return [op]


def _whole(shape, d: int, a: int, b: int) -> list:
    """The ranges of an index space that is cut to [a, b) in one dimension."""
    return [_Range(a, 1, 1, b - a) if k == d else _Range(0, 1, 1, n) for k, n in enumerate(shape)]


def _cut(op, mask: np.ndarray):
    """The instruction over the part of its index space that the marks need, as nearly as strides can say."""
    if op.kind == GATHER:
        return op
    dims = mask.ndim - (op.kind == PROJECT)   # a projection's row stays whole
    ranges = [_range(mask.any(tuple(k for k in range(mask.ndim) if k != d))) for d in range(dims)]
    if op.kind == MATMUL:
        return _cut_matmul(op, ranges)
    shape, *strides = op.extents if op.kind == MULADD else op.extents[:-2]
    offsets = [0] * len(strides)
    new_shape: list[int] = []
    new_strides: list[list[int]] = [[] for _ in strides]

    def add(n, step, d):
        new_shape.append(n)
        for k, s in enumerate(strides):
            new_strides[k].append(step * s[d])

    for d, n in enumerate(shape):
        r = ranges[d] if d < dims else _Range(0, 1, 1, n)
        for k, s in enumerate(strides):
            offsets[k] += r.start * s[d]
        if r.runs > 1:
            add(r.runs, r.step, d)
        if r.length > 1 or r.runs == 1:
            add(r.length, 1, d)
    if op.kind == MULADD:
        try:
            extents = coalesce(new_shape, *new_strides)
        except UnsupportedStructure:
            return op
        return dataclasses.replace(
            op, y_offset=op.y_offset + offsets[0], x_offset=op.x_offset + offsets[1], c_offset=op.c_offset + offsets[2],
            extents=extents,
        )
    try:
        outer, *merged = coalesce(new_shape[:-1], *(s[:-1] for s in new_strides))
    except UnsupportedStructure:
        return op
    numbers, starts = op.extents[-2:]
    starts = [a + b for a, b in zip(starts, offsets[2:], strict=True)]
    extents = [[*outer, new_shape[-1]], *([*m, s[-1]] for m, s in zip(merged, new_strides, strict=True)), numbers, starts]
    return dataclasses.replace(op, y_offset=op.y_offset + offsets[0], x_offset=op.x_offset + offsets[1], extents=extents)


def _cut_matmul(op, ranges):
    b, m, n, k, yb, ym, yn, xb, xm, xk, cb, ck, cn, outer, yo, xo, co = op.extents[0]
    sizes = [outer, b, m, n]
    y, x, c = [yo, yb, ym, yn], [xo, xb, xm, 0], [co, cb, 0, cn]   # strides along those
    y_offset, x_offset, c_offset = op.y_offset, op.x_offset, op.c_offset
    for d, r in enumerate(ranges):
        step = r.step if r.length == 1 and r.runs > 1 else 1
        if step > 1 and d >= 2:
            # A BLAS wants unit strides in one direction of every operand; else the whole range is taken.
            ys, xs, cs = [y[2], y[3]], [x[2], xk], [ck, c[3]]
            ys[d - 2] *= step
            xs[0] *= step if d == 2 else 1
            cs[1] *= step if d == 3 else 1
            count = [r.runs if j == d else sizes[j] for j in (2, 3)]
            fits = fits_blas(count, ys) and fits_blas((count[0], k), xs) and fits_blas((k, count[1]), cs)
            step = step if fits else 1
        if step > 1:
            sizes[d] = r.runs
        else:
            sizes[d] = r.step * (r.runs - 1) + r.length if r.runs > 1 else r.length
        y_offset, x_offset, c_offset = y_offset + r.start * y[d], x_offset + r.start * x[d], c_offset + r.start * c[d]
        y[d], x[d], c[d] = y[d] * step, x[d] * step, c[d] * step
    extents = [[
        sizes[1], sizes[2], sizes[3], k, *y[1:], x[1], x[2], xk, c[1], ck, c[3], sizes[0], y[0], x[0], c[0],
    ]]
    return dataclasses.replace(op, y_offset=y_offset, x_offset=x_offset, c_offset=c_offset, extents=extents)


__all__ = ["index_space", "simplify", "trim", "windows"]
