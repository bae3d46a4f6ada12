"""The row structure of a program: which residuals share a sample, so that unit cotangents can travel together.

If no intermediate element feeds residuals of two different rows, one adjoint sweep with ones in every row (one sweep per
output of a row) leaves, at each use of a parameter, the factors of all Jacobian rows at once. The finest partition of
the residuals into rows for which that holds is found by pushing row labels backward through the program.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..tape.program import GATHER, MATMUL, MULADD, PARAMETER, PROJECT, RESIDUAL, Program
from ..tape.simplify import windows

_ROWS, _FACTORED, _FUSED_BIAS = 0, 1, 2   # Form in csrc/plan/plan.h


@dataclass(slots=True)
class RowLayout:
    """Rows, the order of K, and the uses of parameters, as csrc/plan/plan.h describes them.

    flops: of one Gram matrix. packed: elements of its packed factors, and of the products that outputs share; largest: those
    of one parameter that a pass over the matrix cannot cut (csrc/cpu/factors.h).
    """

    num_rows: int
    max_outputs: int
    output_of: list[int]
    k_of: list[int]
    blocks: list[tuple]
    uses: list[tuple[int, ...]]
    labels: dict[int, np.ndarray]
    flops: float
    packed: int
    explicit_columns: int
    largest: int


def row_layout(program: Program, constants=()) -> RowLayout | None:
    """The finest row structure of a program, or None if its residuals do not separate (batch statistics, say).

    constants: those of the linearization, needed where the program gathers from its workspace: which residuals an element
    reaches depends on their positions there.
    """
    if not any(shape.numel() for shape in program.residual_shapes):
        return None
    for splits in _candidates(program):
        labels = _propagate(program, splits, constants)
        if labels is not None:
            return _layout(program, splits, labels)
    return None


def _candidates(program: Program):
    """(rows, outputs) of every residual block, the finest first.

    Rows are leading dimensions of the residuals. Where those are flat, as function transforms and r.T @ r leave them, an
    instruction may still know how many outputs a row has.
    """
    shapes = program.residual_shapes
    flat = all(shape.numel() == max(shape, default=1) for shape in shapes)
    deepest = max((len(shape) for shape in shapes), default=0)
    leading = [[(math.prod(shape[:depth]), math.prod(shape[depth:])) for shape in shapes] for depth in range(deepest, 0, -1)]
    single = [split for split in leading if all(outputs == 1 for _, outputs in split)]
    yield from single[:1]
    if flat:
        widths = {n for op in program.instructions if op.kind == MATMUL for n in op.extents[0][:4]}
        for width in sorted(widths):
            if width > 1 and all(shape.numel() % width == 0 and shape.numel() > width for shape in shapes):
                yield [(shape.numel() // width, width) for shape in shapes]
    yield from (split for split in leading if split not in single)


def _propagate(program: Program, splits, constants) -> dict[int, np.ndarray] | None:
    """Row label of every buffer element (-1: reaches no residual), or None on a conflict."""
    labels = {
        k: np.full(size, -1, np.int32) for k, (role, size) in enumerate(program.buffers) if role != PARAMETER
    }
    start = 0
    blocks = [k for k, (role, _) in enumerate(program.buffers) if role == RESIDUAL]
    for k, (rows, outputs) in zip(blocks, splits, strict=True):
        labels[k][:] = np.repeat(np.arange(start, start + rows, dtype=np.int32), outputs)
        start += rows
    for op in reversed(program.instructions):
        if program.buffers[op.x][0] == PARAMETER:
            continue
        if op.kind == GATHER:
            if not _scatter(op, labels, constants[op.constant]):
                return None
            continue
        seen, target, merged = operands(op, labels)
        highest = seen.max(axis=merged, keepdims=True) if merged else seen
        lowest = np.where(seen < 0, np.iinfo(np.int32).max, seen)
        lowest = lowest.min(axis=merged, keepdims=True) if merged else lowest
        known = highest >= 0
        if (known & (lowest != highest)).any():
            return None
        if (known & (target >= 0) & (target != highest)).any():
            return None
        np.copyto(target, np.broadcast_to(highest, target.shape), where=np.broadcast_to(known, target.shape))
    return labels


def operands(op, labels):
    """Of a muladd, matmul or project: the labels of what it writes, those of what it reads, and the dimensions it sums over.

    The second is a window that may be written; of a dimension that is summed over it has one index, but of a matmul's last.
    """
    if op.kind == MATMUL:
        b, m, n, k, yb, ym, yn, xb, xm, xk, _, _, _, a, ya, xa, _ = op.extents[0]
        seen = windows(labels[op.y], (a, b, m, n), (ya, yb, ym, yn), op.y_offset)
        target = windows(labels[op.x], (a, b, m, k), (xa, xb, xm, xk), op.x_offset)
        merged = tuple(d for d, (size, s) in enumerate(((a, xa), (b, xb), (m, xm))) if s == 0 and size > 1)
        target = target[tuple(slice(0, 1) if d in merged else slice(None) for d in range(4))]
        if xk == 0 and k > 1:
            target = target[..., :1]
        return seen, target, (*merged, 3)
    shape, ys, xs = op.extents[:3]
    seen = windows(labels[op.y], shape, ys, op.y_offset)
    target = windows(labels[op.x], shape, xs, op.x_offset)
    merged = tuple(d for d, s in enumerate(xs) if s == 0)
    target = target[(..., *(slice(0, 1) if d in merged else slice(None) for d in range(target.ndim)))]
    return seen, target, (*merged, len(shape) - 1) if op.kind == PROJECT else merged


def _scatter(op, labels, positions) -> bool:
    """Push the labels of a gather's rows to the rows they were taken from; False on a conflict."""
    rows, width, y_row, x_row, count = op.extents[0]
    positions = positions.numpy(force=True)
    kept = positions >= 0
    positions, seen = positions[kept], windows(labels[op.y], (rows, width), (y_row, 1), op.y_offset)[kept]
    target = windows(labels[op.x], (count, width), (x_row, 1), op.x_offset)
    highest, lowest = target.copy(), np.where(target < 0, np.iinfo(np.int32).max, target)
    np.maximum.at(highest, positions, seen)
    np.minimum.at(lowest, positions, np.where(seen < 0, np.iinfo(np.int32).max, seen))
    known = highest >= 0
    if (known & (lowest != highest)).any():
        return False
    np.copyto(target, highest, where=known)
    return True


def _layout(program: Program, splits, labels: dict[int, np.ndarray]) -> RowLayout:
    output_of, k_of, blocks = [], [], []
    first_row = base = 0
    for rows, outputs in splits:
        first_row, r0 = first_row + rows, first_row
        if rows * outputs == 0:
            continue
        k_of.append(base + np.arange(rows * outputs).reshape(outputs, rows).T.reshape(-1))
        output_of.append(np.tile(np.arange(outputs), rows))
        blocks.append((r0, rows, outputs, base, 0, ()))
        base += rows * outputs
    output_of, k_of = np.concatenate(output_of).tolist(), np.concatenate(k_of).tolist()
    residuals, outputs = len(k_of), max((s for _, s in splits), default=1)
    uses, flops, packed, columns, largest = _uses(program, labels, residuals, outputs)
    return RowLayout(
        first_row, outputs, output_of, k_of, blocks, uses,
        {u: labels[u] for u in {program.instructions[i].y for i, *_ in uses}}, flops, packed, columns, largest,
    )


def _uses(program: Program, labels, residuals: int, outputs: int, counts=None):
    """Each use as csrc/plan/plan.h's Use; operations, packed elements, explicit columns and `largest` of one Gram matrix.

    counts: residuals of every row where their number varies. Per weight the cheaper of two forms: factored,
    (C C'^T) * (Y Y'^T) over pairs of uses, or explicit rows and one product.
    """
    by_parameter: dict[int, list[int]] = {}
    for i, op in enumerate(program.instructions):
        if program.buffers[op.x][0] == PARAMETER:
            by_parameter.setdefault(op.x, []).append(i)
    candidates = {
        parameter: [_factored(program.instructions[i], labels) for i in instructions]
        for parameter, instructions in by_parameter.items()
    }
    fused_biases = _fused_biases(program, by_parameter, candidates)

    def explicit_cost(parameter: int) -> float:
        size = program.buffers[parameter][1]
        return residuals**2 * size + 2.0 * residuals * size * len(by_parameter[parameter])

    uses, flops, packed, columns, largest = [], 0.0, 0, 0, 0
    joined = set()
    for parameter, instructions in by_parameter.items():
        group = candidates[parameter]
        if group[0] is None or any(c is None or c.window != group[0].window for c in group):
            continue
        bias = fused_biases.get(parameter, -1)
        rows = sum(c.rows for c in group)
        reached = rows * outputs if counts is None else sum(int(counts[c.row0 : c.row0 + c.rows].sum()) for c in group)
        # The elementwise product weighs like some 4 multiply-adds per element of K.
        cost = reached**2 * (group[0].m + 4.0) + rows**2 * group[0].k
        if cost < explicit_cost(parameter) + (explicit_cost(bias) if bias >= 0 else 0):
            joined |= {parameter, bias}
            flops += cost
            packed += rows * group[0].k + reached * group[0].m + (rows**2 if outputs > 1 else 0)
            largest = max(largest, reached * (group[0].k + group[0].m))
            uses += [
                (i, parameter, _FACTORED, c.row0, int(c.m_is_high), bias, 0) for i, c in zip(instructions, group, strict=True)
            ]
            uses += [(i, bias, _FUSED_BIAS, 0, 0, -1, int(_row_per_n(program, i, labels))) for i in by_parameter.get(bias, ())]
    for parameter, instructions in by_parameter.items():
        if parameter in joined:
            continue
        flops += explicit_cost(parameter)
        columns += program.buffers[parameter][1]
        packed += residuals * program.buffers[parameter][1]
        if any(program.instructions[i].kind != MATMUL for i in instructions):
            largest = max(largest, 2 * residuals * program.buffers[parameter][1])
        uses += [(i, parameter, _ROWS, 0, 0, -1, int(_row_per_n(program, i, labels))) for i in instructions]
    return uses, flops, packed, columns, largest


@dataclass(frozen=True, slots=True)
class _Outer:
    """A use whose Jacobian rows are outer products of m cotangents and k constants."""

    window: tuple[int, ...]   # offset, size and stride of the high and the low dimension of the weight
    rows: int
    row0: int
    m: int
    k: int
    m_is_high: bool


def _factored(op, labels) -> _Outer | None:
    """The outer-product form of a use, if its n dimension runs over consecutive rows."""
    if op.kind != MATMUL:
        return None
    b, m, n, k, yb, ym, yn, xb, xm, xk = op.extents[0][:10]
    if b != 1 or op.alpha != 1:
        return None
    seen = windows(labels[op.y], (m, n), (ym, yn), op.y_offset)
    rows = seen[0]
    if (seen != rows).any() or rows[0] < 0 or (np.diff(rows) != 1).any():
        return None
    # Unit dimensions have no stride of their own; the dimension with the larger stride is the "high" one.
    sm, sk = (0 if m == 1 else xm), (0 if k == 1 else xk)
    m_is_high = (sm, m) > (sk, k)
    window = (op.x_offset, *((m, sm, k, sk) if m_is_high else (k, sk, m, sm)))
    return _Outer(window, n, int(rows[0]), m, k, m_is_high)


def _fused_biases(program: Program, by_parameter, candidates) -> dict[int, int]:
    """{weight: bias} where every use of the weight has the bias added, plainly and only there, to the same result."""
    added: dict[tuple, list[int]] = {}
    for instructions in by_parameter.values():
        for i in instructions:
            op = program.instructions[i]
            if op.kind == MULADD and op.constant < 0 and op.alpha == 1:
                added.setdefault((op.y, op.y_offset), []).append(i)
    found, taken = {}, set()
    for weight, group in candidates.items():
        if any(c is None or c.m_is_high != group[0].m_is_high for c in group):
            continue
        shared = None
        for i in by_parameter[weight]:
            op = program.instructions[i]
            _, m, n, _, _, ym, yn = op.extents[0][:7]
            matches = [
                program.instructions[j].x
                for j in added.get((op.y, op.y_offset), ())
                if op.alpha == 1 and _is_bias(program, program.instructions[j], m, n, ym, yn)
            ]
            once = {bias for bias in matches if matches.count(bias) == 1}
            shared = once if shared is None else shared & once
        # Of several (a sum of layers) any will do.
        for bias in sorted(shared - taken):
            if len(by_parameter[bias]) == len(group):
                found[weight] = bias
                taken.add(bias)
                break
    return found


def _is_bias(program: Program, op, m: int, n: int, ym: int, yn: int) -> bool:
    """Say whether this muladd is y[m, n] += x[m] over all of x: of two parts of it the products would not meet."""
    if op.x_offset or program.buffers[op.x][1] != m:
        return False
    shape, ys, xs, _ = op.extents
    dims = {(size, y, x) for size, y, x in zip(shape, ys, xs, strict=True)}
    wanted = {(size, y, x) for size, y, x in ((n, yn, 0), (m, ym, 1)) if size != 1}
    return dims == wanted


def _row_per_n(program: Program, i: int, labels) -> bool:
    """Say whether an explicit use's row depends on n alone (matmul), or not on the innermost index (muladd)."""
    op = program.instructions[i]
    if op.kind != MATMUL:
        shape, ys = op.extents[:2] if op.kind == MULADD else (op.extents[0][:2], (op.extents[0][2], 1))
        seen = windows(labels[op.y], shape, ys, op.y_offset)
        return bool(shape) and bool((seen == seen[..., :1]).all())
    b, m, n, _, yb, ym, yn = op.extents[0][:7]
    seen = windows(labels[op.y], (b, m, n), (yb, ym, yn), op.y_offset)
    return bool((seen == seen[:, :1]).all())
