"""A program cut in two: quantities q that many rows share as parameters of their own, and how q depends on the parameters.

    main   (theta, q) -> residuals, without the border's; its rows separate
    sub    theta -> q

J = J_theta + J_q Q with Q = dq/dtheta. Each takes a part of the whole program's instructions and constants.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch

from ..tape.program import GATHER, MATMUL, MULADD, PARAMETER, PROJECT, RESIDUAL, WORKSPACE, Instruction, Program
from ..tape.simplify import trim
from .rows import RowLayout, row_layout
from .shared_rows import Pattern, merged_layout, patterns

_CALL = 2e4        # operations that starting one instruction costs as much as
_WORTH = 0.7       # of the cost of J by products alone: up to here a chain is taken


@dataclass(slots=True)
class Part:
    """A program with the numbers of the constants it takes from the whole one."""

    program: Program
    constants: list[int]

    @property
    def cost(self) -> float:
        """Operations of a sweep, with what it takes to start its instructions."""
        return sum(max(_flops(op), _CALL) for op in self.program.instructions)


@dataclass(slots=True)
class Scaled:
    """A quantity that is a parameter tensor times a number: alpha times one element of each of these constants (and where)."""

    parameter: int
    alpha: float
    constants: list[tuple[int, int]]

    def factor(self, constants) -> float:
        """That number."""
        product = self.alpha
        for k, offset in self.constants:
            c = constants[k]
            product *= float(c.as_strided((), (), c.storage_offset() + offset) if isinstance(c, torch.Tensor) else c)
        return product


@dataclass(slots=True)
class Chain:
    """The parts of a whole program, with the rows of main; sub is None where no quantity needs one.

    kept, border: numbers of residuals. owned: the parameter tensors of sub. scaled: the quantities that are multiples of one
    parameter tensor each; those of sub, `quantities` tensors of `shared` elements, follow them among main's parameters.
    by_rows: J_q Q comes by sub's adjoint on the rows of J_q, not by Q. few: the Gram matrix is main's, corrected for q;
    else the columns of sub's parameters come apart. elementwise: of every quantity of sub its parameters, where each of its
    elements depends on the same element of those alone; else None. cost: of J in operations.
    """

    main: Part
    layout: RowLayout
    sub: Part | None
    sub_layout: RowLayout | None
    kept: np.ndarray
    border: np.ndarray
    owned: list[int]
    scaled: list[Scaled]
    quantities: int
    shared: int
    by_rows: bool = False
    few: bool = True
    elementwise: list[set[int]] | None = None
    cost: float = 0.0

    def rows(self, program: Program) -> RowLayout:
        """What predictions of cost and memory take for the whole program's row layout."""
        M, P = sum(program.sizes(RESIDUAL)), sum(program.sizes(PARAMETER))
        sweeps = max(1, math.ceil(self.cost / max(_cost(program), 1.0)))
        columns = self.shared if self.few else sum(self.sub.program.sizes(PARAMETER))
        return dataclasses.replace(
            self.layout, max_outputs=max(sweeps, self.layout.max_outputs), flops=self.layout.flops + float(M) * M * columns,
            packed=self.layout.packed + 2 * M * columns, explicit_columns=min(P, self.layout.explicit_columns + columns),
            largest=max(self.layout.largest, 2 * M * columns),
        )


def chain(program: Program, pattern: Pattern, constants) -> Chain | None:
    """The chain of a pattern with cuts or a border, or None where it would not pay."""
    border = pattern.border()
    M, P = sum(program.sizes(RESIDUAL)), sum(program.sizes(PARAMETER))
    kept = np.setdiff1d(np.arange(M), border)
    if len(kept) == 0:
        return None
    windows = _windows(program, pattern.cuts)
    scaled = _scaled(program, windows, set(pattern.cuts), constants)
    rest = {k: window for k, window in windows.items() if k not in scaled}
    sub, owned = _sub(program, rest) if rest else (None, [])
    main = _main(program, set(pattern.cuts), {k: windows[k] for k in (*scaled, *rest)}, border)
    cost = pattern.outputs * main.cost + len(border) * _cost(program) + 2.0 * len(kept) * P
    sub_layout = None
    shared, by_rows, few, elementwise = sum(high - low + 1 for low, high in rest.values()), False, True, None
    if sub is not None:
        sub_layout = row_layout(sub.program, [constants[k] for k in sub.constants])
        taken = sum(sub.program.sizes(PARAMETER))
        sweeps = min(shared, taken) if sub_layout is None else sub_layout.max_outputs
        rows = len(kept) * (sub.cost + shared)
        matrix = sweeps * sub.cost + 2.0 * shared * taken + 0.5 * len(kept) * shared * taken   # a product is fast
        elementwise = _elementwise(program, rest)
        cost, by_rows = cost + min(rows, matrix) + 2.0 * len(kept) * shared, rows < matrix
        read = {op.x for op in main.program.instructions} | {s.parameter for s in scaled.values()}
        pushed = 0.0 if read.isdisjoint(owned) else main.cost
        few = shared * (pushed + 4.0 * len(kept) ** 2) < float(len(kept)) ** 2 * taken
    if cost > _WORTH * min(M, P) * _cost(program):
        return None
    layout = shared_layout(main.program, [constants[k] for k in main.constants])
    if layout is None:
        return None
    return Chain(
        main, layout, sub, sub_layout, kept, border, owned, list(scaled.values()), len(rest), shared, by_rows, few, elementwise,
        cost,
    )


def shared_layout(program: Program, constants) -> RowLayout | None:
    """The rows of a program by themselves or joined where they meet, or None."""
    strict = row_layout(program, constants)
    if strict is not None:
        return strict
    best = None
    for found in patterns(program, constants, cutting=False):
        if isinstance(found, Pattern) and (best is None or found.outputs < best.outputs):
            best = found
    M, P = sum(program.sizes(RESIDUAL)), sum(program.sizes(PARAMETER))
    return None if best is None or 2 * best.outputs > min(M, P) else merged_layout(program, best)


def _windows(program: Program, cuts) -> dict[int, tuple[int, int]]:
    """Of every buffer that a cut instruction reads, the first and the last element that any of them does."""
    found: dict[int, tuple[int, int]] = {}
    for number in cuts:
        op = program.instructions[number]
        low = op.x_offset
        if op.kind == MATMUL:
            b, m, _, k, _, _, _, xb, xm, xk, _, _, _, a, _, xa, _ = op.extents[0]
            dims = ((a, xa), (b, xb), (m, xm), (k, xk))
        elif op.kind == GATHER:
            _, width, _, x_row, count = op.extents[0]
            dims = ((count, x_row), (width, 1))
        else:
            dims = tuple(zip(op.extents[0], op.extents[2], strict=True))
        high = low + sum((n - 1) * s for n, s in dims)
        before = found.get(op.x, (low, high))
        found[op.x] = min(low, before[0]), max(high, before[1])
    return found


def _scaled(program: Program, windows, cuts: set[int], given) -> dict[int, Scaled]:
    """Which of these buffers are a parameter tensor times numbers, all of it, where nothing else reads that."""
    writers: dict[int, list[Instruction]] = {}
    readers: dict[int, int] = {}
    for i, op in enumerate(program.instructions):
        writers.setdefault(op.y, []).append(op)
        if i not in cuts:
            readers[op.x] = readers.get(op.x, 0) + 1
    found: dict[int, Scaled] = {}
    for k, window in windows.items():
        buffer, alpha, constants, size = k, 1.0, [], program.buffers[k][1]
        while program.buffers[buffer][0] == WORKSPACE and len(ops := writers.get(buffer, [])) == 1:
            op = ops[0]
            if readers.get(buffer, 0) or not _in_place(program, op):
                break
            if not _is_number(program, op, given):
                break
            buffer, alpha, constants = op.x, alpha * op.alpha, constants + [(op.constant, op.c_offset)] * (op.constant >= 0)
        if program.buffers[buffer][0] == PARAMETER and window == (0, size - 1) and readers[buffer] == 1:
            found[k] = Scaled(buffer, alpha, constants)
    return found


def _in_place(program: Program, op) -> bool:
    """Whether an instruction takes all of a buffer to all of another, element by element."""
    size = program.buffers[op.y][1]
    same = program.buffers[op.x][1] == size and op.x_offset == op.y_offset == 0
    return op.kind == MULADD and same and op.extents[:3] in ([[size], [1], [1]], [[], [], []])


def _elementwise(program: Program, windows) -> list[set[int]] | None:
    """Of every buffer the parameters on which it depends element by element, or None where one depends in other ways."""
    found = []
    for k, window in windows.items():
        roots, needed = set(), {k}
        for op in reversed(program.instructions):
            if op.y in needed:
                if not _in_place(program, op):
                    return None
                (roots if program.buffers[op.x][0] == PARAMETER else needed).add(op.x)
        if window != (0, program.buffers[k][1] - 1):
            return None
        found.append(roots)
    return found


def _is_number(program: Program, op, constants) -> bool:
    """Whether a muladd multiplies with one number, known without waiting for a device."""
    if op.constant < 0 or not isinstance(constants[op.constant], torch.Tensor):
        return True
    plain = program.functions[op.constant] == "c" and constants[op.constant].device.type == "cpu"
    return plain and not any(op.extents[3])


def _main(program: Program, cuts: set[int], windows, border: np.ndarray) -> Part:
    """The instructions between (theta, q) and the residuals that are kept."""
    main = Program(program.dtype)
    name: dict[int, int] = {}
    for k, (role, size) in enumerate(program.buffers):
        if role == PARAMETER:
            name[k] = main.add_buffer(PARAMETER, size)
    shared = {k: main.add_buffer(PARAMETER, high - low + 1) for k, (low, high) in windows.items()}
    direct = {program.instructions[i].y for i in cuts}
    last: list[Instruction] = []
    start = at = 0
    for k, (role, size) in enumerate(program.buffers):
        if role == WORKSPACE:
            name[k] = main.add_buffer(WORKSPACE, size)
        if role != RESIDUAL:
            continue
        shape = program.residual_shapes[at]
        out = border[(border >= start) & (border < start + size)] - start
        start, at = start + size, at + 1
        if len(out) == 0 and k not in direct:
            name[k] = main.add_buffer(RESIDUAL, size)
            main.residual_shapes.append(shape)
            continue
        name[k] = main.add_buffer(WORKSPACE, size)   # copied to what is kept of it
        edges = [-1, *out.tolist(), size]
        for a, b in zip(edges[:-1], edges[1:], strict=True):
            if b - a > 1:
                residual = main.add_buffer(RESIDUAL, b - a - 1)
                main.residual_shapes.append(_part_of(shape, a + 1, b))
                last.append(_copied(residual, 0, name[k], a + 1, b - a - 1))
    for i, op in enumerate(program.instructions):
        if i in cuts:
            x, offset = shared[op.x], op.x_offset - windows[op.x][0]
        else:
            x, offset = name[op.x], op.x_offset
        main.instructions.append(dataclasses.replace(op, y=name[op.y], x=x, x_offset=offset))
    main.instructions += last
    return _finished(main, program)


def _part_of(shape, first: int, end: int):
    """The shape of elements first .. end - 1 of a tensor: of whole rows where they are such, else flat."""
    width = math.prod(shape[1:])
    if len(shape) > 1 and width and first % width == 0 and end % width == 0:
        return type(shape)([(end - first) // width, *shape[1:]])
    return type(shape)([end - first])


def _sub(program: Program, windows) -> tuple[Part, list[int]]:
    """The instructions between theta and q, and the numbers of the parameter tensors that they read."""
    needed, read, instructions = set(windows), set(), []
    for op in reversed(program.instructions):
        if op.y in needed:
            instructions.append(op)
            (read if program.buffers[op.x][0] == PARAMETER else needed).add(op.x)
    sub = Program(program.dtype)
    name: dict[int, int] = {}
    for k, (role, size) in enumerate(program.buffers):
        if role == PARAMETER and k in read:
            name[k] = sub.add_buffer(PARAMETER, size)
        elif k in needed:
            name[k] = sub.add_buffer(WORKSPACE, size)
    for op in reversed(instructions):
        sub.instructions.append(dataclasses.replace(op, y=name[op.y], x=name[op.x]))
    for k, (low, high) in windows.items():
        size = high - low + 1
        residual = sub.add_buffer(RESIDUAL, size)
        sub.residual_shapes.append(type(program.residual_shapes[0])([size]))
        sub.instructions.append(_copied(residual, 0, name[k], low, size))
    return _finished(sub, program), sorted(read)   # parameters are the first buffers


def _copied(y: int, y_offset: int, x: int, x_offset: int, size: int) -> Instruction:
    return Instruction(MULADD, y, y_offset, x, x_offset, -1, 1.0, [[size], [1], [1], [0]])


def _finished(part: Program, whole: Program) -> Part:
    """Drop what reaches no residual, and number the constants that are left."""
    trim(part)
    used = sorted({n for op in part.instructions for n in _constants_of(op)})
    number = {old: new for new, old in enumerate(used)}
    for i, op in enumerate(part.instructions):
        extents = op.extents
        if op.kind == PROJECT:
            extents = [*extents[:-2], [number.get(n, -1) for n in extents[-2]], extents[-1]]
        part.instructions[i] = dataclasses.replace(op, constant=number.get(op.constant, -1), extents=extents)
    part.layouts = [whole.layouts[k] for k in used]
    part.functions = [whole.functions[k] for k in used]
    return Part(part, used)


def _constants_of(op) -> list[int]:
    numbers = op.extents[-2] if op.kind == PROJECT else [op.constant]
    return [n for n in numbers if n >= 0]


def _cost(program: Program) -> float:
    return sum(max(_flops(op), _CALL) for op in program.instructions)


def _flops(op) -> float:
    if op.kind == MATMUL:
        return 2.0 * math.prod(op.extents[0][:4]) * op.extents[0][13]
    return 2.0 * math.prod(op.extents[0][:2] if op.kind == GATHER else op.extents[0])
