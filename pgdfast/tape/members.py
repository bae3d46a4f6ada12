"""The program of an ensemble cut into that of one member.

The tape of B stacked networks is B times the same work at regular distances in memory. Where every instruction has a
dimension that runs over members, that dimension is taken out: what is left is the program of one member, run B times over
constants that lie a fixed number of elements further on for each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .program import GATHER, MATMUL, PARAMETER, PROJECT, RESIDUAL, Instruction, Program, UnsupportedStructure, coalesce


@dataclass(slots=True)
class Members:
    """One member's program; `sources`, `shifts` and `spans` say where its constants lie.

    count: B. sources: per constant, its number in the program of all members. shifts: elements from a member's constant to the
    next member's, 0 where members share it; spans: elements that a member reads, from its constant's first on. Layouts of
    constants are those of all members together. residual_forms: per residual buffer of all members (outer, inner), its
    elements being ordered outer, member, inner.
    """

    program: Program
    count: int
    sources: list[int]
    shifts: list[int]
    spans: list[int]
    residual_forms: list[tuple[int, int]]


def cut(program: Program, count: int) -> Members | None:
    """The program of one of `count` members, or None where instructions do not separate by strides.

    Every parameter has the members as its first dimension.
    """
    try:
        return _Cutter(program, count).run()
    except _NotSeparable:
        return None


def order_of(cut: Members) -> torch.Tensor | None:
    """Where the residuals of one member after the other stand among those of all, (B M,); None where they stand so."""
    if len(cut.residual_forms) == 1 and cut.residual_forms[0][0] == 1:
        return None
    start, rows = 0, []
    for outer, inner in cut.residual_forms:
        size = outer * cut.count * inner
        places = torch.arange(start, start + size).view(outer, cut.count, inner)
        rows.append(places.transpose(0, 1).reshape(cut.count, -1))
        start += size
    return torch.cat(rows, 1).reshape(-1) if rows else None


def forms_by_shape(shapes, count: int) -> list[tuple[int, int]] | None:
    """Residual forms where only shapes are known: members are the first dimension of their number; None where there is none."""
    try:
        inner = [_inner_by_shape(shape, count) for shape in shapes]
    except _NotSeparable:
        return None
    return [(math.prod(shape) // (count * i) if i else 0, i) for shape, i in zip(shapes, inner, strict=True)]


class _NotSeparable(Exception):
    pass


@dataclass(slots=True)
class _Dimension:
    """One dimension of an index space: its size and a stride per operand."""

    size: int
    strides: list[int]


class _Cutter:
    def __init__(self, program: Program, count: int):
        self.program, self.count = program, count
        # Elements of a member between two of the next: a buffer's elements are ordered outer, member, inner.
        self.inner = [size // count if role == PARAMETER else None for role, size in program.buffers]
        self.members = Program(program.dtype)
        self.sources: list[int] = []
        self.shifts: list[int] = []
        self._number: dict[tuple[int, int], int] = {}

    def run(self) -> Members:
        if any(size % self.count for role, size in self.program.buffers if role == PARAMETER):
            raise _NotSeparable
        instructions = [self._cut(op) for op in self.program.instructions]
        forms, shapes = [], iter(self.program.residual_shapes)
        for k, (role, size) in enumerate(self.program.buffers):
            if size % self.count:
                raise _NotSeparable
            self.members.add_buffer(role, size // self.count)
            self.members.live.append(self.program.live[k] // self.count)
            if role == RESIDUAL:
                shape = next(shapes)
                inner = self.inner[k] if self.inner[k] is not None else _inner_by_shape(shape, self.count)
                forms.append((size // (self.count * inner) if inner else 0, inner))
                self.members.residual_shapes.append(_without(shape, inner, self.count))
        self.members.instructions = instructions
        self.members.layouts = [self.program.layouts[k] for k in self.sources]
        self.members.functions = [self.program.functions[k] for k in self.sources]
        return Members(self.members, self.count, self.sources, self.shifts, _spans(self.members), forms)

    def _constant(self, source: int, shift: int) -> int:
        """The number of a constant with this distance between members; -1 stays."""
        if source < 0:
            return source
        shift = 0 if self.program.layouts[source] is None else shift
        if (source, shift) not in self._number:
            self._number[source, shift] = len(self.sources)
            self.sources.append(source)
            self.shifts.append(shift)
        return self._number[source, shift]

    def _cut(self, op: Instruction) -> Instruction:
        if op.kind == GATHER:
            raise _NotSeparable   # positions name rows of all members
        dims = _dimensions(op)
        if self.count == 1:
            d, outer, within = None, 1, 1
        else:
            d, outer, within = self._member_dimension(op, dims)
        before, shifts = [], [0] * len(dims[0].strides) if dims else []
        for k, dim in enumerate(dims):
            if k != d:
                before.append([dim])
                continue
            shifts = [within * s for s in dim.strides]
            parts = [_Dimension(outer, [self.count * s for s in shifts]), _Dimension(within, dim.strides)]
            before.append(parts)
        self._form(op.y, shifts[0] if shifts else 1)
        y_offset = self._placed(op.y, op.y_offset, before, 0)
        x_offset = self._placed(op.x, op.x_offset, before, 1)
        return _rebuilt(op, before, y_offset, x_offset, shifts, self._constant)

    def _member_dimension(self, op, dims):
        """(d, outer, within): dimension d counts outer x members x within."""
        inner = self.inner[op.x]
        if inner is None or inner == 0:
            raise _NotSeparable
        for d, dim in enumerate(dims):
            stride = dim.strides[1]
            if stride == 0 or inner % stride:
                continue
            within = inner // stride
            if dim.size % (within * self.count) == 0 and dim.strides[0] != 0:
                return d, dim.size // (within * self.count), within
        raise _NotSeparable

    def _form(self, buffer: int, inner: int) -> None:
        """Note how a buffer's elements are ordered, and that all who write it agree."""
        if self.count == 1:
            inner = self.program.buffers[buffer][1]
        if self.inner[buffer] is None:
            self.inner[buffer] = inner
        if self.inner[buffer] != inner or inner == 0 or self.program.buffers[buffer][1] % (inner * self.count):
            raise _NotSeparable

    def _placed(self, buffer: int, offset: int, dims: list[list[_Dimension]], operand: int) -> int:
        """Turn the strides of an operand into those within one member's buffer; its offset there."""
        inner = self.inner[buffer]
        period, reach = inner * self.count, offset % (inner * self.count)
        for dim in (part for group in dims for part in group):
            stride = dim.strides[operand]
            if stride % period == 0:
                dim.strides = list(dim.strides)
                dim.strides[operand] = stride // self.count
            else:
                reach += (dim.size - 1) * stride
        if reach >= inner:   # it would touch the elements of another member
            raise _NotSeparable
        return offset // period * inner + offset % period


def _dimensions(op: Instruction) -> list[_Dimension]:
    """The index space of an instruction; strides of y, x, then of its constants."""
    if op.kind == MATMUL:
        b, m, n, k, yb, ym, yn, xb, xm, xk, cb, ck, cn, a, ya, xa, ca = op.extents[0]
        return [
            _Dimension(a, [ya, xa, ca]), _Dimension(b, [yb, xb, cb]), _Dimension(m, [ym, xm, 0]), _Dimension(n, [yn, 0, cn]),
            _Dimension(k, [0, xk, ck]),
        ]
    shape, *strides = op.extents[: -2 if op.kind == PROJECT else None]
    return [_Dimension(size, list(s)) for size, *s in zip(shape, *strides, strict=True)]


def _rebuilt(op: Instruction, groups, y_offset: int, x_offset: int, shifts: list[int], constant) -> Instruction:
    """The instruction over the dimensions that are left."""
    if op.kind == MATMUL:
        (a, b, m, n, k) = (_one(group) for group in groups)
        extents = [[
            b.size, m.size, n.size, k.size, b.strides[0], m.strides[0], n.strides[0], b.strides[1], m.strides[1], k.strides[1],
            b.strides[2], k.strides[2], n.strides[2], a.size, *a.strides,
        ]]
        number = constant(op.constant, shifts[2])
        return Instruction(MATMUL, op.y, y_offset, op.x, x_offset, number, op.alpha, extents, op.c_offset)
    if op.kind == PROJECT:
        numbers, offsets = op.extents[-2:]
        numbers = [constant(k, shift) for k, shift in zip(numbers, shifts[2:], strict=True)]
        row = _one(groups[-1])
        dims = [dim for group in groups[:-1] for dim in group]
        extents = _merged(dims, 2 + len(numbers))
        extents = [[*extents[0], row.size], *([*s, r] for s, r in zip(extents[1:], row.strides, strict=True)), numbers, offsets]
        return Instruction(PROJECT, op.y, y_offset, op.x, x_offset, op.constant, op.alpha, extents, op.c_offset)
    extents = _merged([dim for group in groups for dim in group], 3)
    number = constant(op.constant, shifts[2] if shifts else 0)
    return Instruction(op.kind, op.y, y_offset, op.x, x_offset, number, op.alpha, extents, op.c_offset)


def _spans(program: Program) -> list[int]:
    """Per constant, how far into it the instructions read."""
    spans = [0] * len(program.layouts)
    for op in program.instructions:
        dims, offsets = _dimensions(op), [op.c_offset]
        numbers = [op.constant]
        if op.kind == PROJECT:
            numbers, offsets = op.extents[-2:]
        for k, (number, offset) in enumerate(zip(numbers, offsets, strict=True)):
            if number >= 0:
                last = offset + sum((dim.size - 1) * dim.strides[2 + k] for dim in dims)
                spans[number] = max(spans[number], last + 1)
    return spans


def _merged(dims: list[_Dimension], operands: int) -> list[list[int]]:
    try:
        return coalesce([dim.size for dim in dims], *([dim.strides[k] for dim in dims] for k in range(operands)))
    except UnsupportedStructure:
        raise _NotSeparable from None


def _one(group: list[_Dimension]) -> _Dimension:
    """The one dimension of a group that counts more than one index; a product has room for no more."""
    counting = [dim for dim in group if dim.size != 1] or group[-1:]
    if len(counting) > 1:
        raise _NotSeparable
    return counting[0]


def _strides(shape) -> list[int]:
    return [math.prod(shape[d + 1 :]) for d in range(len(shape))]


def _inner_by_shape(shape, count: int) -> int:
    for size, stride in zip(shape, _strides(shape), strict=True):
        if size == count:
            return stride
    raise _NotSeparable


def _without(shape, inner: int, count: int) -> torch.Size:
    """A shape without its dimension of members."""
    for d, (size, stride) in enumerate(zip(shape, _strides(shape), strict=True)):
        if count > 1 and size == count and stride == inner:
            return torch.Size([*shape[:d], *shape[d + 1 :]])
    return torch.Size(shape) if count == 1 else torch.Size([math.prod(shape) // count])
