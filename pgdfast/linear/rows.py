"""The row structure of a program: which residuals share a sample, so that unit cotangents can travel together.

If no intermediate element feeds residuals of two different rows, one adjoint sweep with ones in every row (one sweep per
output of a row) leaves, at each use of a parameter, the factors of all Jacobian rows at once. The finest partition of
the residuals into rows for which that holds is found by pushing row labels backward through the program.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..tape.program import MULADD, PARAMETER, RESIDUAL, Program

_TILE = 128   # residuals per tile of K: two float tiles and their product stay in the second-level cache


@dataclass(slots=True)
class RowLayout:
    """Rows, the order of K, and the uses of parameters, as csrc/plan/plan.h describes them; `flops` of one Gram."""

    num_rows: int
    max_sections: int
    section_of: list[int]
    k_of: list[int]
    tiles: list[tuple[int, int, int, int]]
    uses: list[tuple[int, ...]]
    labels: dict[int, np.ndarray]
    flops: float
    explicit_columns: int


def row_layout(program: Program) -> RowLayout | None:
    """The finest row structure of a program, or None if its residuals do not separate (batch statistics, say)."""
    deepest = max((len(shape) for shape in program.residual_shapes), default=0)
    for depth in range(deepest, 0, -1):
        labels = _propagate(program, depth)
        if labels is not None:
            return _layout(program, depth, labels)
    return None


def _split(shape, depth: int) -> tuple[int, int]:
    """(rows, sections) of a residual block."""
    rows = int(np.prod(shape[:depth], dtype=np.int64))
    return rows, int(np.prod(shape[depth:], dtype=np.int64))


def _windows(array: np.ndarray, shape, strides, offset: int) -> np.ndarray:
    size = array.itemsize
    return np.lib.stride_tricks.as_strided(array[offset:], shape, [s * size for s in strides])


def _propagate(program: Program, depth: int) -> dict[int, np.ndarray] | None:
    """Row label of every buffer element (-1: reaches no residual), or None on a conflict."""
    labels = {
        k: np.full(size, -1, np.int32) for k, (role, size) in enumerate(program.buffers) if role != PARAMETER
    }
    start = 0
    blocks = [k for k, (role, _) in enumerate(program.buffers) if role == RESIDUAL]
    for k, shape in zip(blocks, program.residual_shapes, strict=True):
        rows, sections = _split(shape, depth)
        labels[k][:] = np.repeat(np.arange(start, start + rows, dtype=np.int32), sections)
        start += rows
    for op in reversed(program.instructions):
        if program.buffers[op.x][0] == PARAMETER:
            continue
        if op.kind == MULADD:
            shape, ys, xs, _ = op.extents
            seen = _windows(labels[op.y], shape, ys, op.y_offset)
            target = _windows(labels[op.x], shape, xs, op.x_offset)
            merged = tuple(d for d, s in enumerate(xs) if s == 0)
        else:
            b, m, n, k, yb, ym, yn, xb, xm, xk = op.extents[0][:10]
            seen = _windows(labels[op.y], (b, m, n), (yb, ym, yn), op.y_offset)
            target = _windows(labels[op.x], (b, m, k), (xb, xm, xk), op.x_offset)
            merged = (2,) if xb != 0 or b == 1 else (0, 2)
        highest = seen.max(axis=merged, keepdims=True) if merged else seen
        lowest = np.where(seen < 0, np.iinfo(np.int32).max, seen)
        lowest = lowest.min(axis=merged, keepdims=True) if merged else lowest
        known = highest >= 0
        if (known & (lowest != highest)).any():
            return None
        target = target[tuple(slice(0, 1) if d in merged and op.kind == MULADD else slice(None) for d in range(target.ndim))]
        if op.kind != MULADD and 0 in merged:
            target = target[:1]
        if (known & (target >= 0) & (target != highest)).any():
            return None
        np.copyto(target, np.broadcast_to(highest, target.shape), where=np.broadcast_to(known, target.shape))
    return labels


def _layout(program: Program, depth: int, labels: dict[int, np.ndarray]) -> RowLayout:
    splits = [_split(shape, depth) for shape in program.residual_shapes]
    section_of, k_of, tiles = [], [], []
    first_row = base = 0
    for rows, sections in splits:
        k_block = np.empty((rows, sections), np.int64)
        count = max(1, -(-rows * sections // _TILE)) if rows else 0
        count = min(count, rows)
        edges = np.linspace(0, rows, count + 1).astype(int) if count else []
        for r0, r1 in zip(edges[:-1], edges[1:], strict=True):
            tile = np.arange((r1 - r0) * sections).reshape(sections, r1 - r0)
            k_block[r0:r1] = base + tile.T
            tiles.append((int(first_row + r0), int(r1 - r0), int(sections), int(base)))
            base += (r1 - r0) * sections
        k_of.extend(k_block.reshape(-1).tolist())
        section_of.extend(np.tile(np.arange(sections), rows).tolist())
        first_row += rows
    residuals, sections = len(k_of), max((s for _, s in splits), default=1)
    uses, flops, columns = _uses(program, labels, residuals, sections)
    return RowLayout(
        first_row, sections, section_of, [int(k) for k in k_of], tiles, uses,
        {u: labels[u] for u in {program.instructions[i].y for i, *_ in uses}}, flops, columns,
    )


def _uses(program: Program, labels, residuals: int, sections: int):
    """Each use as (instruction, parameter, factored, row0, m_is_high, rank_one); K's flops; explicit columns."""
    by_parameter: dict[int, list[int]] = {}
    for i, op in enumerate(program.instructions):
        if program.buffers[op.x][0] == PARAMETER:
            by_parameter.setdefault(op.x, []).append(i)
    uses, flops, columns = [], 0.0, 0
    for parameter, instructions in by_parameter.items():
        size = program.buffers[parameter][1]
        candidates = [_factored(program.instructions[i], labels) for i in instructions]
        explicit_cost = residuals**2 * size + 2 * residuals * size * len(instructions)
        same_window = all(c is not None and c[0] == candidates[0][0] for c in candidates) if candidates[0] else False
        factored = False
        if same_window:
            rows = sum(c[1] for c in candidates)
            wide = sum(c[3] for c in candidates) / len(candidates)
            narrow = sum(c[4] for c in candidates) / len(candidates)
            # The elementwise product and its traffic weigh like some 16 multiply-adds per element of K.
            factored_cost = rows**2 * (sections**2 * (wide + 16) + narrow)
            factored = factored_cost < explicit_cost
        flops += factored_cost if factored else explicit_cost
        columns += 0 if factored else size
        for i, c in zip(instructions, candidates, strict=True):
            if factored:
                uses.append((i, parameter, 1, c[2], int(c[5]), 0))
            else:
                uses.append((i, parameter, 0, 0, 0, 0))
    return uses, flops, columns


def _factored(op, labels):
    """(window, rows, row0, m, k, m_is_high) of a use whose Jacobian rows are outer products, else None."""
    if op.kind == MULADD:
        return None
    b, m, n, k, yb, ym, yn, xb, xm, xk = op.extents[0][:10]
    if b != 1:
        return None
    seen = _windows(labels[op.y], (m, n), (ym, yn), op.y_offset)
    rows = seen[0]
    if (seen != rows).any() or rows[0] < 0 or (np.diff(rows) != 1).any():
        return None
    # Unit dimensions have no stride of their own; the dimension with the larger stride is the "high" one.
    sm, sk = (0 if m == 1 else xm), (0 if k == 1 else xk)
    m_is_high = (sm, m) > (sk, k)
    window = (op.x_offset, *((m, sm, k, sk) if m_is_high else (k, sk, m, sm)))
    return window, n, int(rows[0]), m, k, m_is_high
