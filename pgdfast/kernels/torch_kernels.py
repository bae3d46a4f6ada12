"""The program run by PyTorch's own operators, on any device and floating dtype."""

from __future__ import annotations

import math

import torch

LIMITS = "real floating-point tensors"
_FUNCTIONS = {"c": lambda c: c, "1 - c^2": lambda c: 1 - c * c, "c - c^2": lambda c: c - c * c}
_CHUNK = 64   # Jacobian rows per batched sweep


def available() -> str | None:
    """Always available."""
    return None


def applies(device: torch.device, dtype: torch.dtype) -> bool:
    """Runs wherever PyTorch does."""
    return dtype.is_floating_point


class Kernels:
    """The same products as the native core; batches of K tangents have shape (K, P), cotangents (K, M)."""

    name = "torch"
    fused = False
    batches = True   # products with (K, P) and (K, M)

    def __init__(self, program, dtype: torch.dtype):
        self._program, self.dtype = program, dtype
        self._parameters = program.sizes(0)
        self._residuals = program.sizes(1)
        self.num_parameters = sum(self._parameters)
        self.num_residuals = sum(self._residuals)
        self.flops = float(sum(_flops(op) for op in program.instructions))
        self.arena_size = sum(program.sizes(2))
        self._constants: list = []

    def bind(self, constants: list) -> None:
        """Use these constants from now on."""
        self._constants = [
            _prepared(c, self.dtype, function) if isinstance(c, torch.Tensor) and function != "positions" else c
            for c, function in zip(constants, self._program.functions, strict=True)
        ]

    def release(self) -> None:
        """Forget the constants; bind others before the next product."""
        self._constants = []

    def set_rows(self, rows) -> None:
        """No row structure is used here."""

    @torch.no_grad()
    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """J v: (P,) -> (M,), or (K, P) -> (K, M)."""
        buffers = self._memory(v, self._parameters, 0)
        for op in self._program.instructions:
            self._run(op, buffers[op.x], op.x_offset, buffers[op.y], op.y_offset, adjoint=False)
        return self._gather(buffers, 1, v)

    @torch.no_grad()
    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        """J^T u: (M,) -> (P,), or (K, M) -> (K, P)."""
        buffers = self._memory(u, self._residuals, 1)
        for op in reversed(self._program.instructions):
            self._run(op, buffers[op.y], op.y_offset, buffers[op.x], op.x_offset, adjoint=True)
        return self._gather(buffers, 0, u)

    def dense(self) -> torch.Tensor:
        """J, (M, P), in batched sweeps."""
        eye = torch.eye(self.num_residuals, dtype=self.dtype, device=self._device())
        return torch.cat([self.vjp(rows) for rows in eye.split(_CHUNK)]) if len(eye) else eye.new_empty(0, self.num_parameters)

    def _device(self):
        tensors = [c for c in self._constants if isinstance(c, torch.Tensor)]
        return tensors[0].device if tensors else None

    def _memory(self, given: torch.Tensor, sizes: list[int], role: int) -> list[torch.Tensor]:
        batch = given if given.dim() == 2 else given.unsqueeze(0)
        parts = iter(batch.split(sizes, dim=1))
        return [
            next(parts).contiguous() if r == role else batch.new_zeros(len(batch), size)
            for r, size in self._program.buffers
        ]

    def _gather(self, buffers, role: int, given: torch.Tensor) -> torch.Tensor:
        parts = [b for b, (r, _) in zip(buffers, self._program.buffers, strict=True) if r == role]
        result = torch.cat(parts, dim=1)
        return result if given.dim() == 2 else result[0]

    def _run(self, op, source, source_offset, target, target_offset, *, adjoint: bool) -> None:
        constant = None if op.constant < 0 else self._constants[op.constant]
        if op.kind == 1:
            b, m, n, k, *strides = op.extents[0]
            a, *outer = strides[9:]
            ys, xs, cs = ((o, *strides[3 * j : 3 * j + 3]) for j, o in enumerate(outer))
            c = _constant(constant, (a, b, k, n), cs, op.c_offset)
            if adjoint:
                value = _window(source, (a, b, m, n), ys, source_offset) @ c.mT
                _accumulate(target, (a, b, m, k), xs, target_offset, op.alpha * value)
            else:
                value = _window(source, (a, b, m, k), xs, source_offset) @ c
                _accumulate(target, (a, b, m, n), ys, target_offset, op.alpha * value)
            return
        if op.kind == 2:
            rows, width, y_row, x_row, count = op.extents[0]
            xs, ys = (count, width, (x_row, 1)), (rows, width, (y_row, 1))
            if adjoint:
                value = _window(source, ys[:2], ys[2], source_offset)
                _add_rows(_window(target, xs[:2], xs[2], target_offset), constant, op.alpha * value)
            else:
                value = _take_rows(_window(source, xs[:2], xs[2], source_offset), constant)
                _accumulate(target, ys[:2], ys[2], target_offset, op.alpha * value)
            return
        if op.kind == 3:
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
            return
        shape, ys, xs, cs = op.extents
        ss, ts = (ys, xs) if adjoint else (xs, ys)
        value = op.alpha * _window(source, shape, ss, source_offset)
        if isinstance(constant, torch.Tensor):
            value = value * _constant(constant, shape, cs, op.c_offset)
        elif constant is not None:
            value = value * constant
        _accumulate(target, shape, ts, target_offset, value)


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
    kept = positions >= 0
    positions, value = positions[kept], value[:, kept]
    if x.device.type == "cpu":
        x.index_add_(1, positions, value)
    else:   # index_add_ adds atomically there, in any order; this sorts
        x.transpose(0, 1).index_put_((positions,), value.transpose(0, 1), accumulate=True)


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
