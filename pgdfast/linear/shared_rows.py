"""Rows that meet: residuals of several tensors over the same points, made one row with several outputs.

The strict pass of rows.py gives every residual tensor rows of its own, and up on the first element that feeds two of them.
Here such conflicts are collected instead. Two rows that share an element become one, as long as rows stay small. A row that
meets very many others (a mean beside the data) is set aside: the border. An element that one instruction hands to very many
rows (a quantity computed from parameters alone, a batch statistic) is no part of any of them: its reading is cut. Or all
readings are cut of whatever feeds several rows (a solution on a grid, of which residuals take differences).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..tape.program import GATHER, PARAMETER, PROJECT, RESIDUAL, Program
from ..tape.simplify import index_space, windows
from .rows import RowLayout, _uses, operands

BORDER = 32           # rows that may be set aside
_OUTPUTS = 32         # of a merged row at most, or twice those that a row has by itself
_SPREADS = (16, 1, 0)   # an instruction that hands an element to more rows is cut; 0: no element may feed two rows
_PASSES = 24
_RUN = 16             # rows from which on those with equally many outputs are a block of their own


@dataclass(slots=True)
class Pattern:
    """What separates a program's residuals into rows.

    splits: (rows, outputs) of every residual tensor, the finest rows. group: for each of those the row that it belongs to,
    named by one of its members; -1 in the border. labels: the same of every buffer element, -1 where it reaches none. cuts:
    instructions whose reading is cut. outputs: the most of one row.
    """

    splits: list[tuple[int, int]]
    group: np.ndarray
    labels: dict[int, np.ndarray]
    cuts: list[int] = field(default_factory=list)
    outputs: int = 1

    def border(self) -> np.ndarray:
        """The residuals in the border, in their order."""
        return np.flatnonzero(residual_rows(self.splits, self.group) < 0)


@dataclass(slots=True)
class Obstacle:
    """Why residuals do not separate: a residual, how many rows it meets, or an operation that mixes rows."""

    residual: int
    rows: int
    mixes: bool = False


def residual_rows(splits, group: np.ndarray) -> np.ndarray:
    """Of every residual the row that it belongs to."""
    start, parts = 0, [np.zeros(0, group.dtype)]
    for rows, outputs in splits:
        parts.append(np.repeat(group[start : start + rows], outputs))
        start += rows
    return np.concatenate(parts)


def patterns(program: Program, constants, cutting: bool):
    """Every Pattern that a way to split the residuals leads to, or the Obstacle that it met.

    cutting: may there be cuts and a border?
    """
    shapes = program.residual_shapes
    sizes = [shape.numel() for shape in shapes]
    seen = set()
    for depth in range(max((len(shape) for shape in shapes), default=0), 0, -1):
        rows = [min(int(np.prod(shape[:depth])), size) for shape, size in zip(shapes, sizes, strict=True)]
        splits = tuple((n, size // n if n else 1) for n, size in zip(rows, sizes, strict=True))
        if splits in seen:
            continue
        seen.add(splits)
        for spread in _SPREADS if cutting else (None,):
            yield _separate(program, list(splits), constants, spread)


def _separate(program: Program, splits, constants, spread: int | None):
    total = sum(rows for rows, _ in splits)
    weight = np.concatenate([np.full(rows, outputs) for rows, outputs in splits])
    most = max(_OUTPUTS, 2 * int(weight.max(initial=1)))
    group = np.arange(total)
    for _ in range(_PASSES):
        labels, pairs, cuts, mixes = _push(program, residual_rows(splits, group), constants, spread)
        if mixes >= 0:
            return Obstacle(_first_residual(splits, group, mixes), 0, mixes=True)
        if len(pairs) == 0:
            outputs = np.bincount(group[group >= 0], weight[group >= 0]).max(initial=1)
            return Pattern(splits, group, labels, cuts, int(outputs))
        met = np.bincount(pairs.reshape(-1), minlength=total)
        hubs = np.flatnonzero(met > most)
        if len(hubs):
            hub = int(met.argmax())
            group[np.isin(group, hubs)] = -1
            if spread is None or int(weight[group < 0].sum()) > BORDER:
                return Obstacle(_first_residual(splits, np.arange(total), hub), int(met[hub]))
            continue
        group = _joined(group, pairs)
        sizes = np.bincount(group[group >= 0], weight[group >= 0])
        if sizes.max(initial=0) > most:
            return Obstacle(_first_residual(splits, group, int(sizes.argmax())), int(sizes.max()))
    return Obstacle(0, 0, mixes=True)


def _first_residual(splits, group, row: int) -> int:
    return int(np.argmax(residual_rows(splits, group) == row))


def _joined(group: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Rows that any pairs connect get the least of their names."""
    least = np.arange(len(group))
    while True:
        low = np.minimum(least[pairs[:, 0]], least[pairs[:, 1]])
        before = least.copy()
        np.minimum.at(least, pairs[:, 0], low)
        np.minimum.at(least, pairs[:, 1], low)
        while not np.array_equal(least, least[least]):
            least = least[least]
        if np.array_equal(before, least):
            return np.where(group < 0, -1, least[group])


def _push(program: Program, rows: np.ndarray, constants, spread: int | None):
    """Row labels pushed backward: (labels, pairs of rows that met, cut instructions, the row that a projection mixes or -1).

    Where rows meet, the label that came first stays.
    """
    labels = {k: np.full(size, -1, np.int32) for k, (role, size) in enumerate(program.buffers) if role != PARAMETER}
    start = 0
    for k, (role, size) in enumerate(program.buffers):
        if role == RESIDUAL:
            labels[k][:] = rows[start : start + size]
            start += size
    met, cuts, given_up = [np.zeros((0, 2), np.int64)], [], set()
    for number in range(len(program.instructions) - 1, -1, -1):
        op = program.instructions[number]
        if program.buffers[op.x][0] == PARAMETER:
            continue
        if op.x in given_up:
            continue   # all its readers come before its writers
        if op.y in given_up:
            continue
        if op.kind == GATHER:
            element, label, target = _gathered(op, labels, constants[op.constant])
        else:
            seen, target, merged = operands(op, labels)
            element, label = _received(seen, merged)
        if len(element) == 0:
            continue
        again = np.flatnonzero(element[1:] == element[:-1]) + 1   # a further row of the same element
        if len(again):
            if spread == 0:
                given_up.add(op.x)
                continue
            if spread is not None and _longest(element) > spread:
                if op.kind == PROJECT:
                    return labels, met[0], cuts, int(label[0])
                cuts.append(number)
                continue
            met.append(np.stack([label[again - 1], label[again]], 1))
            kept = np.ones(len(element), bool)
            kept[again] = False
            element, label = element[kept], label[kept]
        # Elements of the summed index space stand for windows on x: compare and write there.
        shape = _summed(seen.shape, merged) if op.kind != GATHER else target.shape
        new = np.full(int(np.prod(shape)), -1, np.int32)
        new[element] = label
        new = np.broadcast_to(new.reshape(shape), target.shape)
        both = (new >= 0) & (target >= 0) & (new != target)
        if spread == 0 and both.any():
            given_up.add(op.x)
            continue
        if both.any():
            met.append(np.stack([target[both], new[both]], 1))
        np.copyto(target, new, where=(new >= 0) & (target < 0))
    if given_up:
        cuts = [i for i, op in enumerate(program.instructions) if op.x in given_up and _reaches(op, labels)]
        for k in given_up:
            labels[k][:] = -1
        if any(program.instructions[i].kind == PROJECT for i in cuts):
            return labels, met[0], cuts, 0
        return labels, met[0], cuts, -1
    pairs = np.unique(np.sort(np.concatenate(met), 1), axis=0) if len(met) > 1 else met[0]
    return labels, pairs.astype(np.int64), cuts[::-1], -1


def _reaches(op, labels) -> bool:
    return bool((windows(labels[op.y], *index_space(op), op.y_offset) >= 0).any())


def _summed(shape, merged):
    return tuple(1 if d in merged else n for d, n in enumerate(shape))


def _longest(element: np.ndarray) -> int:
    starts = np.flatnonzero(np.diff(element, prepend=-1))
    return int(np.diff(np.append(starts, len(element))).max())


def _received(seen: np.ndarray, merged):
    """(element, label), sorted and each pair once: the rows that the elements of the summed index space are handed to."""
    if seen.size == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    if not merged:
        flat = seen.reshape(-1)
        element = np.flatnonzero(flat >= 0)
        return element, flat[element].astype(np.int64)
    axes = tuple(d % seen.ndim for d in merged)
    kept = [d for d in range(seen.ndim) if d not in axes]
    table = seen.transpose(*kept, *axes).reshape(int(np.prod([seen.shape[d] for d in kept])), -1)
    highest, lowest = table.max(1), np.where(table < 0, np.iinfo(np.int32).max, table).min(1)
    if ((highest < 0) | (lowest == highest)).all():
        element = np.flatnonzero(highest >= 0)
        return element, highest[element].astype(np.int64)
    table = np.sort(table, 1)
    new = np.ones(table.shape, bool)
    new[:, 1:] = table[:, 1:] != table[:, :-1]
    element, place = np.nonzero(new & (table >= 0))
    return element, table[element, place].astype(np.int64)


def _gathered(op, labels, positions):
    rows, width, y_row, x_row, count = op.extents[0]
    positions = positions.numpy(force=True)
    kept = positions >= 0
    seen = windows(labels[op.y], (rows, width), (y_row, 1), op.y_offset)[kept].astype(np.int64)
    target = windows(labels[op.x], (count, width), (x_row, 1), op.x_offset)
    element = positions[kept][:, None] * width + np.arange(width)
    here = seen >= 0
    pairs = np.unique(np.stack([element[here], seen[here]], 1), axis=0)
    return pairs[:, 0], pairs[:, 1], target


# --- the layout of merged rows ----------------------------------------------------------------------------------------------


def merged_layout(program: Program, pattern: Pattern) -> RowLayout:
    """The row layout of a pattern without cuts or border.

    Rows are numbered along the tensors with most rows first, so that products over the points of those go over rows in order;
    so are the outputs of a row.
    """
    splits, group = pattern.splits, pattern.group
    starts = np.cumsum([0, *(rows for rows, _ in splits)])
    sizes = [rows * outputs for rows, outputs in splits]
    first = np.cumsum([0, *sizes])
    order = sorted(range(len(splits)), key=lambda k: -splits[k][0])
    walked = np.concatenate([group[starts[k] : starts[k + 1]] for k in order])
    _, at = np.unique(walked, return_index=True)
    names = walked[np.sort(at)]
    number = np.full(len(group), -1)
    number[names] = np.arange(len(names))
    row_of = number[residual_rows(splits, group)]
    residuals = np.concatenate([np.arange(first[k], first[k + 1]) for k in order])
    by_row = residuals[np.argsort(row_of[residuals], kind="stable")]
    counts = np.bincount(row_of, minlength=len(names))
    output_of = np.empty(len(row_of), np.int64)
    output_of[by_row] = np.arange(len(by_row)) - np.repeat(np.cumsum(counts) - counts, counts)
    outputs = int(counts.max(initial=1))
    place = np.full((len(names), outputs), -1)
    blocks, base = [], 0
    for r0, rows, count, first_output, listed in _blocks(counts):
        ours = np.asarray(listed) if listed else np.arange(r0, r0 + rows)
        place[ours, first_output : first_output + count] = base + np.arange(count * rows).reshape(count, rows).T
        blocks.append((r0, rows, count, base, first_output, listed))
        base += rows * count
    k_of = place[row_of, output_of]
    labels = {k: np.where(a < 0, -1, number[a]).astype(np.int32) for k, a in pattern.labels.items()}
    uses, flops, packed, columns, largest = _uses(program, labels, len(row_of), outputs, counts)
    return RowLayout(
        len(names), outputs, output_of.tolist(), k_of.tolist(), blocks, uses,
        {u: labels[u] for u in {program.instructions[i].y for i, *_ in uses}}, flops, packed, columns, largest,
    )


def _blocks(counts: np.ndarray):
    """(r0, rows, outputs, first output, rows listed) of blocks that hold all outputs of all rows.

    Long runs of rows with equally many outputs are blocks; elsewhere those that all rows have are one, and of each further
    output the rows that have it are listed.
    """
    edges = np.concatenate([[0], np.flatnonzero(np.diff(counts)) + 1, [len(counts)]])
    lengths = np.diff(edges)
    part = 0
    while part < len(lengths):
        end = part + 1
        while end < len(lengths) and min(lengths[end - 1], lengths[end]) < _RUN:
            end += 1
        a, b = int(edges[part]), int(edges[end])
        ours = counts[a:b]
        least = int(ours.min())
        yield a, b - a, least, 0, ()
        for output in range(least, int(ours.max())):
            rows = a + np.flatnonzero(ours > output)
            run = rows[-1] - rows[0] + 1 == len(rows)
            yield int(rows[0]), len(rows), 1, output, () if run else tuple(rows.tolist())
        part = end
