"""The program run by PyTorch's own operators, on any device and floating dtype."""

from __future__ import annotations

import math

import torch

from .row_forms import RowForms
from .row_tables import PARAMETER, RESIDUAL

LIMITS = "real floating-point tensors"
_FUNCTIONS = {"c": lambda c: c, "1 - c^2": lambda c: 1 - c * c, "c - c^2": lambda c: c - c * c}
_CHUNK = 64   # Jacobian rows per batched sweep


def available() -> str | None:
    """Always available."""
    return None


def applies(device: torch.device, dtype: torch.dtype) -> bool:
    """Runs wherever PyTorch does."""
    return dtype.is_floating_point


class Kernels(RowForms):
    """The same products as the native core; batches of K tangents have shape (K, P), cotangents (K, M)."""

    name = "torch"
    fused = True
    batches = True   # products with J take (K, P), too
    rows_per_sweep = _CHUNK

    def __init__(self, program, dtype: torch.dtype):
        self._program, self.dtype = program, dtype
        self.num_parameters, self.num_residuals = sum(program.sizes(PARAMETER)), sum(program.sizes(RESIDUAL))
        self.flops = float(sum(_flops(op) for op in program.instructions))
        self.arena_size = sum(program.sizes(2))
        self._constants: list = []
        self.device = torch.device("cpu")   # kernels_for says where

    def bind(self, constants: list) -> None:
        """Use these constants from now on."""
        self._constants = [
            _prepared(c, self.dtype, function) if isinstance(c, torch.Tensor) and function != "positions" else c
            for c, function in zip(constants, self._program.functions, strict=True)
        ]
        self.forget()

    def release(self) -> None:
        """Forget the constants; bind others before the next product."""
        self._constants = []
        self.forget()

    def constant_of(self, op):
        """An instruction's constant: a tensor, a number, or None."""
        return None if op.constant < 0 else self._constants[op.constant]

    @torch.no_grad()
    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """J v: (P,) -> (M,), or (K, P) -> (K, M)."""
        buffers, result = self._memory(v, PARAMETER)
        for op in self._program.instructions:
            self._run(op, buffers[op.x], op.x_offset, buffers[op.y], op.y_offset, adjoint=False)
        return result

    @torch.no_grad()
    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        """J^T u: (M,) -> (P,), or (K, M) -> (K, P)."""
        buffers, result = self._memory(u, RESIDUAL)
        for op in reversed(self._program.instructions):
            self._run(op, buffers[op.y], op.y_offset, buffers[op.x], op.x_offset, adjoint=True)
        return result

    def unit_sweeps(self, units: torch.Tensor) -> list[torch.Tensor]:
        """The cotangents (O, size) of every buffer but the parameters', by the residuals' (O, M)."""
        buffers, _ = self._memory(units, RESIDUAL)
        for op in reversed(self._program.instructions):
            if self._program.buffers[op.x][0] != PARAMETER:
                self._run(op, buffers[op.y], op.y_offset, buffers[op.x], op.x_offset, adjoint=True)
        return buffers

    def dense_by_batches(self) -> torch.Tensor:
        """J, (M, P), a batch of its rows per sweep, or of its columns where those are fewer."""
        J = torch.empty(self.num_residuals, self.num_parameters, dtype=self.dtype, device=self.device)
        forward = self.num_parameters < self.num_residuals
        lines, product = (J.T, self.jvp) if forward else (J, self.vjp)
        for first in range(0, len(lines), _CHUNK):
            part = lines[first : first + _CHUNK]
            units = torch.zeros(len(part), len(lines), dtype=self.dtype, device=self.device)
            units.diagonal(first).fill_(1)
            part.copy_(product(units))
        return J

    def _memory(self, given: torch.Tensor, role: int, clear: bool = True) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Every buffer as (K, size): windows on what is given, on the result, which is zero, and on one arena.

        clear: the arena is zero, too.
        """
        batch = given if given.dim() == 2 else given.unsqueeze(0)
        sizes = {r: self._program.sizes(r) for r in (0, 1, 2)}
        result = batch.new_zeros(len(batch), sum(sizes[1 - role]))
        arena = (batch.new_zeros if clear else batch.new_empty)(len(batch), self.arena_size)
        parts = {r: iter(x.split(sizes[r], dim=1)) for r, x in ((role, batch), (1 - role, result), (2, arena))}
        buffers = [next(parts[r]) for r, _ in self._program.buffers]
        return buffers, result if given.dim() == 2 else result[0]

    def _run(self, op, source, source_offset, target, target_offset, *, adjoint: bool) -> None:
        """Add an instruction's image of the source buffer to the target buffer; adjoint: from y to x."""
        run = (self._muladd, self._matmul, self._gather, self._project)[op.kind]
        run(op, source, source_offset, target, target_offset, adjoint)

    def _muladd(self, op, source, source_offset, target, target_offset, adjoint):
        constant = self.constant_of(op)
        shape, ys, xs, cs = op.extents
        ss, ts = (ys, xs) if adjoint else (xs, ys)
        value = op.alpha * _window(source, shape, ss, source_offset)
        if isinstance(constant, torch.Tensor):
            value = value * _constant(constant, shape, cs, op.c_offset)
        elif constant is not None:
            value = value * constant
        _accumulate(target, shape, ts, target_offset, value)

    def _matmul(self, op, source, source_offset, target, target_offset, adjoint, overwrite=False):
        b, m, n, k, *strides = op.extents[0]
        a, *outer = strides[9:]
        ys, xs, cs = ((o, *strides[3 * j : 3 * j + 3]) for j, o in enumerate(outer))
        c = _constant(self.constant_of(op), (a, b, k, n), cs, op.c_offset)
        c, ss, ts, inner, width = (c.mT, ys, xs, n, k) if adjoint else (c, xs, ys, k, n)
        x = _window(source, (a, b, m, inner), ss, source_offset)
        if a == b == len(source) == 1 and not _sums((m, width), ts[2:]):
            _window(target, (m, width), ts[2:], target_offset)[0].addmm_(
                x[0, 0, 0], c[0, 0], alpha=op.alpha, beta=0 if overwrite else 1
            )
            return
        if overwrite:   # what stands there may be anything
            target.zero_()
        value = x @ c
        _accumulate(target, (a, b, m, width), ts, target_offset, value if op.alpha == 1 else op.alpha * value)

    def _gather(self, op, source, source_offset, target, target_offset, adjoint):
        positions = self.constant_of(op)
        rows, width, y_row, x_row, count = op.extents[0]
        xs, ys = (count, width, (x_row, 1)), (rows, width, (y_row, 1))
        if adjoint:
            value = _window(source, ys[:2], ys[2], source_offset)
            _add_rows(_window(target, xs[:2], xs[2], target_offset), positions, op.alpha * value)
        else:
            value = _take_rows(_window(source, xs[:2], xs[2], source_offset), positions)
            _accumulate(target, ys[:2], ys[2], target_offset, op.alpha * value)

    def _project(self, op, source, source_offset, target, target_offset, adjoint):
        shape, ys, xs, *strides, numbers, offsets = op.extents
        a, *terms = (
            None if number < 0 else _constant(self._constants[number], shape, s, offset)
            for number, s, offset in zip(numbers, strides, offsets, strict=True)
        )
        pairs = list(zip(terms[::2], terms[1::2], strict=True))
        if adjoint:
            z = _times(_window(source, shape, ys, source_offset), a)
            value = z - op.alpha * sum(_times(_times(z, left).sum(-1, keepdim=True), right) for left, right in pairs)
            _accumulate(target, shape, xs, target_offset, value)
        else:
            x = _window(source, shape, xs, source_offset)
            value = x - op.alpha * sum(_times(_times(x, right).sum(-1, keepdim=True), left) for left, right in pairs)
            _accumulate(target, shape, ys, target_offset, _times(value, a))


def _window(buffer: torch.Tensor, shape, strides, offset: int) -> torch.Tensor:
    return buffer.as_strided((len(buffer), *shape), (buffer.stride(0), *strides), buffer.storage_offset() + offset)


def _prepared(c: torch.Tensor, dtype: torch.dtype, function: str) -> torch.Tensor:
    """function(c) in `dtype` under the strides of c, which operators keep for dense tensors only."""
    if c.dtype == dtype and function == "c":
        return c
    span = 1 + sum((n - 1) * s for n, s in zip(c.shape, c.stride(), strict=True)) if c.numel() else 0
    flat = c.detach().as_strided((span,), (1,), c.storage_offset()).to(dtype)
    return _FUNCTIONS[function](flat).as_strided(c.shape, c.stride(), 0)


def _constant(c: torch.Tensor, shape, strides, offset: int) -> torch.Tensor:
    return c.as_strided(shape, strides, c.storage_offset() + offset)


def _times(x: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
    return x if c is None else x * c


def _take_rows(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The rows (dimension 1) of x at these positions, zero where they are negative."""
    taken = x.index_select(1, positions.clamp_min(0)) if x.shape[1] else x.new_zeros(len(x), len(positions), x.shape[2])
    return taken.masked_fill_((positions < 0)[:, None], 0)


def _add_rows(x: torch.Tensor, positions: torch.Tensor, value: torch.Tensor) -> None:
    """Add rows of a value to the rows (dimension 1) of x at these positions, in an order that never changes."""
    if x.device.type == "cpu":
        kept = positions >= 0
        x.index_add_(1, positions[kept], value[:, kept])
    elif x.shape[1]:   # index_add_ adds atomically there, in any order; this sorts. To pick rows by a mask would wait
        value = value.masked_fill((positions < 0)[:, None], 0)
        x.transpose(0, 1).index_put_((positions.clamp_min(0),), value.transpose(0, 1), accumulate=True)


def _sums(shape, strides) -> bool:
    """Say whether several indices write to one element."""
    return any(s == 0 and n != 1 for n, s in zip(shape, strides, strict=True))


def _accumulate(buffer: torch.Tensor, shape, strides, offset: int, value: torch.Tensor) -> None:
    # Zero strides reduce: PyTorch must not write to overlapping windows.
    reduced = [d for d, s in enumerate(strides) if s == 0 and shape[d] != 1]
    if reduced:
        value = value.sum([d + 1 for d in reduced], keepdim=True)
        shape = [1 if d in reduced else n for d, n in enumerate(shape)]
    _window(buffer, shape, strides, offset).add_(value)


def _flops(op) -> int:
    if op.kind == 1:
        factors = (*op.extents[0][:4], op.extents[0][13])
    elif op.kind == 2:
        factors = op.extents[0][:2]
    else:
        factors = op.extents[0]
    return 2 * math.prod(factors)
