"""The program run by Triton's kernels between PyTorch's matrix products, and whole solves on them."""

from __future__ import annotations

import functools

import torch

from .. import torch_kernels
from ..row_tables import GATHER, MATMUL, MULADD, PARAMETER, PROJECT, RESIDUAL, WORKSPACE
from . import epilogue, gather, krylov, muladd, project
from .gram import gram
from .launch import Space

_SHARED = 1 << 24   # elements of the products that residuals of a row share, at most, or a quarter of K


def _on_its_device(method):
    """Launch on the device of the tensors, which need not be the current one."""

    @functools.wraps(method)
    def run(self, *arguments):
        if self.device.type != "cuda":
            return method(self, *arguments)
        with torch.cuda.device(self.device):
            return method(self, *arguments)

    return run


class _Step:
    """An instruction, or a bias with the coefficient that follows it, in one direction of a sweep."""

    def __init__(self, op, number: int, space=None, then=None):
        self.op, self.number, self.space, self.then = op, number, space, then
        self.overwrite, self.keep = False, True


class Kernels(torch_kernels.Kernels):
    """The same products as the native core, batches included; what stands in PyTorch alone is inherited."""

    name = "triton"
    has_cg = True

    def __init__(self, program, dtype: torch.dtype):
        super().__init__(program, dtype)
        forward = self._steps(adjoint=False)
        backward = self._steps(adjoint=True)
        units = [s for s in self._steps(adjoint=True, pairs=False) if program.buffers[s.op.x][0] != PARAMETER]
        # Per direction: the steps, and whether memory must be cleared for them.
        self._sweeps = {name: (steps, self._overwrites(steps, adjoint)) for name, steps, adjoint in (
            ("forward", forward, False), ("backward", backward, True), ("units", units, True))}
        self._numbers = self._values = None
        self._sorted: dict = {}
        self._small: dict = {}

    def bind(self, constants: list) -> None:
        """Use these constants from now on."""
        super().bind(constants)
        self._sorted.clear()
        # Alpha of every instruction, times its constant where that is one number, side by side for the kernels to read.
        values = []
        for op in self._program.instructions:
            c = self.constant_of(op)
            values.append(op.alpha * c if isinstance(c, (int, float)) else op.alpha)
        if values != self._values:
            self._values = values
            self._numbers = torch.tensor(values or [0.0], dtype=torch.float64).to(self.device)

    def _steps(self, *, adjoint: bool, pairs: bool = True) -> list[_Step]:
        ops, steps, i = self._program.instructions, [], 0
        while i < len(ops):
            op = ops[i]
            then = ops[i + 1] if pairs and i + 1 < len(ops) and self._is_epilogue(op, ops[i + 1]) else None
            space = None
            if op.kind == MULADD and then is None:
                shape, ys, xs, cs = op.extents
                space = Space(shape, xs, ys, cs) if adjoint else Space(shape, ys, xs, cs)
            elif op.kind == PROJECT:
                space = self._rows_of_project(op, adjoint)
            step = _Step(op, i, space, then)
            if then is not None:
                step.keep = any(other.x == op.y for k, other in enumerate(ops) if k > i + 1)
            steps.append(step)
            i += 1 if then is None else 2
        return steps[::-1] if adjoint else steps

    def _is_epilogue(self, bias, coefficient) -> bool:
        """y[r, j] += alpha b[j], then z[r, j] += beta c[r, j] y[r, j], over the same y and all of it in one piece."""
        if bias.kind != MULADD or coefficient.kind != MULADD or bias.constant >= 0 or coefficient.x != bias.y:
            return False
        buffers = self._program.buffers
        if buffers[bias.x][0] != PARAMETER or buffers[bias.y][0] != WORKSPACE:
            return False
        if len(bias.extents[0]) != 2 or len(coefficient.extents[0]) != 1 or coefficient.x_offset != bias.y_offset:
            return False
        (rows, columns), ys, xs, _ = bias.extents
        (count,), z, y, c = coefficient.extents
        return ys == [columns, 1] and xs == [0, 1] and count == rows * columns and z == y == [1] and c in ([0], [1])

    def _overwrites(self, steps: list[_Step], adjoint: bool) -> bool:
        """Mark the steps that write a buffer first and wholly; whether any buffer is left that must be zero before."""
        written, read_early = set(), False
        for step in steps:
            read_early |= self._note(step, adjoint, written)
        return read_early or bool({k for k, (role, _) in enumerate(self._program.buffers) if role == WORKSPACE} - written)

    def _note(self, step, adjoint, written) -> bool:
        op, then = step.op, step.then
        if then is not None:   # forward y is read and z written; adjoint z is read and y written
            first, target = (op.y, then.y) if not adjoint else (then.y, op.y)
            size = self._program.buffers[target][1]
            fills = (then.y_offset if not adjoint else op.y_offset) == 0 and then.extents[0][0] == size
            needs_zero = not self._given(first, adjoint) and first not in written
        else:
            source, target = (op.x, op.y) if not adjoint else (op.y, op.x)
            fills = self._fills(op, target, adjoint)
            needs_zero = not self._given(source, adjoint) and source not in written
        step.overwrite = fills and target not in written and self._program.buffers[target][0] == WORKSPACE
        needs_zero |= not step.overwrite and target not in written and self._program.buffers[target][0] == WORKSPACE
        written.add(target)
        return needs_zero

    def _given(self, buffer, adjoint) -> bool:
        return self._program.buffers[buffer][0] == (RESIDUAL if adjoint else PARAMETER)

    def _fills(self, op, target, adjoint) -> bool:
        """Say whether an instruction writes every element of its target once."""
        if (op.x_offset if adjoint else op.y_offset) != 0 or op.kind == PROJECT or (op.kind == GATHER and adjoint):
            return False
        if op.kind == MATMUL:
            b, m, n, k, yb, ym, yn, xb, xm, xk = op.extents[0][:10]
            if b != 1 or op.extents[0][13] != 1:
                return False
            shape, strides = ((m, k), (xm, xk)) if adjoint else ((m, n), (ym, yn))
        elif op.kind == GATHER:
            rows, width, y_row, _, _ = op.extents[0]
            shape, strides = (rows, width), (y_row, 1)
        else:
            shape, strides = op.extents[0], op.extents[2 if adjoint else 1]
        reach = 1
        for s, n in sorted(zip(strides, shape, strict=True)):
            if n != 1:
                if s != reach:
                    return False
                reach *= n
        return reach == self._program.buffers[target][1]

    @_on_its_device
    def _sweep(self, name: str, given: torch.Tensor, role: int):
        steps, clear = self._sweeps[name]
        buffers, result = self._memory(given, role, clear)
        for step in steps:
            self._take(step, buffers, role == RESIDUAL)
        return buffers, result

    @torch.no_grad()
    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """J v: (P,) -> (M,), or (K, P) -> (K, M)."""
        return self._sweep("forward", v, PARAMETER)[1]

    @torch.no_grad()
    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        """J^T u: (M,) -> (P,), or (K, M) -> (K, P)."""
        return self._sweep("backward", u, RESIDUAL)[1]

    def unit_sweeps(self, units: torch.Tensor) -> list[torch.Tensor]:
        """The cotangents (O, size) of every buffer but the parameters', by the residuals' (O, M)."""
        return self._sweep("units", units, RESIDUAL)[0]

    def _take(self, step, buffers, adjoint: bool) -> None:
        op = step.op
        if step.then is not None:
            self._epilogue(step, buffers, adjoint)
            return
        x, y = buffers[op.x][:, op.x_offset :], buffers[op.y][:, op.y_offset :]
        source, target = (y, x) if adjoint else (x, y)
        number = self._numbers[step.number :]
        if op.kind == MULADD:
            muladd.muladd(target, source, self._tensor(op), number, step.space, step.overwrite)
        elif op.kind == GATHER:
            rows, width, y_row, x_row, count = op.extents[0]
            if adjoint:
                order, starts = self._order(op, count)
                gather.adjoint(x, y, order, starts, number, width, y_row, x_row)
            else:
                gather.forward(y, x, self.constant_of(op), number, rows, width, y_row, x_row, step.overwrite)
        elif op.kind == PROJECT and step.space is not None:
            project.project(target, source, self._coefficients(op, adjoint), number, step.space, len(op.extents[-2]) // 2)
        else:
            ends = (buffers[op.y], op.y_offset, buffers[op.x], op.x_offset)
            ends = ends if adjoint else ends[2:] + ends[:2]
            if op.kind == MATMUL:
                self._matmul(op, *ends, adjoint, step.overwrite)
            else:
                self._project(op, *ends, adjoint)

    def _epilogue(self, step, buffers, adjoint):
        bias, coefficient = step.op, step.then
        rows, columns = bias.extents[0]
        y = buffers[bias.y][:, bias.y_offset :]
        b, z = buffers[bias.x][:, bias.x_offset :], buffers[coefficient.y][:, coefficient.y_offset :]
        c, numbers = self._tensor(coefficient), self._numbers[step.number :]
        if c is not None and coefficient.extents[3] == [0]:
            c = c[:1]
        if adjoint:
            epilogue.adjoint(y, b[:, :columns], z, c, numbers, rows, columns, step.overwrite)
        else:
            epilogue.forward(z, y, b, c, numbers, rows, columns, step.keep, step.overwrite)

    def _tensor(self, op):
        """An instruction's constant from its offset on, or None where that is a number or nothing."""
        c = self.constant_of(op)
        if not isinstance(c, torch.Tensor):
            return None
        return _from(c, op.c_offset)

    def _order(self, op, count):
        if op.constant not in self._sorted:
            self._sorted[op.constant] = {}
        known = self._sorted[op.constant]
        if count not in known:
            known[count] = gather.sorted_positions(self.constant_of(op), count)
        return known[count]

    def _rows_of_project(self, op, adjoint):
        """The kernel's index space, or None where the target's rows overlap and PyTorch sums them."""
        shape, ys, xs, a, *terms = op.extents[:-2]
        target = xs if adjoint else ys
        if any(s == 0 and n != 1 for n, s in zip(shape, target, strict=True)):
            return None
        none = [0] * len(shape)
        terms = [*terms, none, none][:4]
        if adjoint:   # left and right change places
            terms = [terms[1], terms[0], terms[3], terms[2]]
            return project.Rows(shape, [xs, ys, a, none, *terms])
        return project.Rows(shape, [ys, xs, none, a, *terms])

    def _coefficients(self, op, adjoint):
        *_, numbers, offsets = op.extents
        a, *terms = (
            None if n < 0 else _from(self._constants[n], offset) for n, offset in zip(numbers, offsets, strict=True)
        )
        terms = [*terms, None, None][:4]
        if adjoint:
            return [a, None, terms[1], terms[0], terms[3], terms[2]]
        return [None, a, *terms]

    @_on_its_device
    def add_factored(self, K, factors, weight, shift) -> None:
        """Into the upper tiles of K; see row_forms.py."""
        alike = all(f.m_is_high == factors[0].m_is_high for f in factors)
        total = sum(len(f.constants) for f in factors)
        shares = alike and any(f.outputs != 1 or f.owner is not None for f in factors)
        shares = shares and total * total <= max(_SHARED, K.numel() // 4)
        first, second, owners, ranges, start, rows = [], [], [], [], 0, 0
        for f in factors:
            C = f.constants if shares else f.spread(f.constants)
            A, B = (f.cotangents, C) if alike or f.m_is_high else (C, f.cotangents)
            first.append(A)
            second.append(B)
            ranges.append((f.first, f.last, start))
            if shares:
                owner = f.owner
                if owner is None:
                    owner = torch.arange(f.last - f.first, device=K.device) // f.outputs
                owners.append(owner + rows)
            start, rows = start + f.last - f.first, rows + len(f.constants)
        A, B = torch.cat(first).contiguous(), torch.cat(second).contiguous()
        B = B @ B.T if shares else B
        gram(K, A, B, torch.cat(owners) if shares else None, self._ranges(ranges), self._pair(weight, shift), len(factors))

    def completed(self, K):
        """Both halves, from the upper one."""
        upper = K.triu()
        return upper + upper.triu(1).T

    def _ranges(self, ranges):
        key = tuple(ranges)
        if key not in self._small:
            self._small[key] = torch.tensor(ranges, dtype=torch.int64).to(self.device)
        return self._small[key]

    def _pair(self, *numbers):
        if len(self._small) > 256:   # weights change with the damping where there is a penalty
            self._small.clear()
        if numbers not in self._small:
            self._small[numbers] = torch.tensor(numbers, dtype=torch.float64).to(self.device)
        return self._small[numbers]

    @torch.no_grad()
    @_on_its_device
    def cg(self, r, d, q, preconditioner, start, path, options):
        """A whole CG solve on the device: the same result as `dual`, and the iterates kept in `path`."""
        return krylov.solve(self, r, d, q, preconditioner, start, path, options)


def _from(c: torch.Tensor, offset: int) -> torch.Tensor:
    """All of a strided constant's memory from an element on, flat."""
    start = c.storage_offset() + offset
    span = 1 + sum((n - 1) * s for n, s in zip(c.shape, c.stride(), strict=True)) - offset if c.numel() else 0
    return c.as_strided((max(span, 0),), (1,), start)
