"""Which residuals each use of a parameter reaches, as tables: made once per structure, copied to a device when asked for.

A row layout (pgdfast/linear/rows.py) names the row of every element that a use writes. Its residuals stand row by row.
"""

from __future__ import annotations

import numpy as np
import torch

PARAMETER, RESIDUAL, WORKSPACE = 0, 1, 2   # roles of buffers and kinds of instructions: pgdfast/tape/program.py
MULADD, MATMUL, GATHER, PROJECT = 0, 1, 2, 3
ROWS, FACTORED, COMPANION = 0, 1, 2   # Form in csrc/plan/plan.h
_PIECE = 1 << 24   # elements of the products that one scatter adds


class Use:
    """One use of a parameter: its instruction, the windows on its operands, and the residuals of its rows."""

    def __init__(self, op, form: int, row0: int, m_is_high: bool, fused_bias: int, row_per_n: bool, labels, layout):
        self.op, self.form, self.fused_bias, self.m_is_high = op, form, fused_bias, m_is_high
        self.labels = labels
        self.tables: dict = {}   # name -> host array, and (name, device) -> tensor
        self.grouped = False
        if op.kind == MATMUL:
            b, m, n, k, *strides = op.extents[0]
            a, *outer = strides[9:]
            self.shape = a, b, m, n, k
            self.y, self.x, self.c = ((o, *strides[3 * j : 3 * j + 3]) for j, o in enumerate(outer))
            if a == b == 1 and (form == FACTORED or row_per_n):
                self._group(_window(labels, (n,), (self.y[3],), op.y_offset), layout)
        if form == FACTORED:
            self._span(row0, layout)

    def _span(self, row0: int, layout) -> None:
        n, counts = self.shape[3], layout.counts
        self.first, self.last = int(layout.starts[row0]), int(layout.starts[row0 + n])
        ours = counts[row0 : row0 + n]
        self.outputs, self.owner = int(ours[0]), None
        if (ours != ours[0]).any():
            self.owner = self.tables["owner"] = np.repeat(np.arange(n), ours)
            self.tables["output"] = layout.output_of[layout.order[self.first : self.last]]

    def _group(self, rows: np.ndarray, layout) -> None:
        """Positions along n by row, (R, T), filled up with -1; and the residuals (R, O) of those rows, or -1."""
        kept = np.flatnonzero(rows >= 0)
        order = kept[np.argsort(rows[kept], kind="stable")]
        ours, first, counts = np.unique(rows[order], return_index=True, return_counts=True)
        width = int(counts.max(initial=1))
        # Rows of very different length would be mostly filling.
        if len(ours) * width > 2 * len(order) + 16:
            return
        table = np.full((len(ours), width), -1)
        for j in range(width):
            has = counts > j
            table[has, j] = order[first[has] + j]
        self.grouped, self.count, self.width = True, len(ours), width
        self.in_order = bool((table.reshape(-1) == np.arange(table.size)).all()) and table.size == len(rows)
        self.tables["positions"] = table.reshape(-1)
        element = self.tables["element"] = layout.element[ours].reshape(-1)
        in_order = element.size > 0 and (element == element[0] + np.arange(element.size)).all()
        self.run = int(element[0]) if in_order else -1

    def cotangents(self, buffers) -> torch.Tensor:
        """Y, (O, m, n), of a use without batch dimensions."""
        buffer, (_, _, m, n, _) = buffers[self.op.y], self.shape
        return buffer.as_strided(
            (len(buffer), m, n), (buffer.stride(0), *self.y[2:]), buffer.storage_offset() + self.op.y_offset
        )

    def constants(self, constant_of) -> torch.Tensor:
        """C, (k, n)."""
        c, (_, _, _, n, k) = constant_of(self.op), self.shape
        return c.as_strided((k, n), self.c[2:], c.storage_offset() + self.op.c_offset)

    def window(self, part: torch.Tensor) -> torch.Tensor:
        """The elements (m, k) of the parameter, a view of all of it (..., size), with the leading dimensions kept."""
        _, _, m, _, k = self.shape
        return part.as_strided(
            (*part.shape[:-1], m, k), (*part.stride()[:-1], *self.x[2:]), part.storage_offset() + self.op.x_offset
        )


class _Layout:
    """Residuals of every row: counts, and element[row, output] or -1; order: of the residuals, row by row.

    starts: where each row begins in that order. in_order: it is that of the residual vector.
    """

    def __init__(self, rows):
        at = np.full((rows.num_rows, rows.max_outputs), -1)
        for r0, count, outputs, base, first_output, listed in rows.blocks:
            ours = np.asarray(listed) if listed else np.arange(r0, r0 + count)
            at[ours, first_output : first_output + outputs] = base + np.arange(outputs * count).reshape(outputs, count).T
        residual = np.argsort(np.asarray(rows.k_of))
        self.element = np.where(at < 0, -1, residual[at]) if len(residual) else at
        self.counts = (at >= 0).sum(1)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self.order = self.element[self.element >= 0]
        self.in_order = bool((np.diff(self.order) == 1).all())
        self.output_of = np.asarray(rows.output_of)


class Tables:
    """The uses of every parameter with what Gram, dense and diagonal forms ask of them."""

    def __init__(self, program, rows):
        self.layout, self.outputs = _Layout(rows), rows.max_outputs
        self.columns, first = {}, 0
        for number, (role, size) in enumerate(program.buffers):
            if role == PARAMETER:
                self.columns[number] = first, size
                first += size
        self.uses: dict[int, list[Use]] = {}
        for i, parameter, form, row0, m_is_high, fused_bias, row_per_n in rows.uses:
            op = program.instructions[i]
            use = Use(op, form, row0, bool(m_is_high), fused_bias, bool(row_per_n), rows.labels[op.y], self.layout)
            self.uses.setdefault(parameter, []).append(use)
        self._units: dict = {}

    def units(self, dtype, device) -> torch.Tensor:
        """Unit cotangents (O, M): in row o, ones at the residuals that are the o-th of their row."""
        key = dtype, device
        if key not in self._units:
            ours = torch.from_numpy(self.layout.output_of == np.arange(self.outputs)[:, None])
            self._units[key] = ours.to(device, dtype)
        return self._units[key]

    def row_by_row(self, J: torch.Tensor, back: bool = False) -> torch.Tensor:
        """What has one row per residual, in the order of rows; `back`: from there to the order of the residuals."""
        if self.layout.in_order:
            return J
        key = "order", back, J.device
        if key not in self._units:
            order = self.layout.order
            self._units[key] = torch.from_numpy(np.argsort(order) if back else order).to(J.device)
        return J.index_select(0, self._units[key])

    def on_device(self, use: Use, name: str, device) -> torch.Tensor:
        """A table of a use as int64 positions."""
        if (name, device) not in use.tables:
            use.tables[name, device] = torch.from_numpy(use.tables[name].astype(np.int64)).to(device)
        return use.tables[name, device]

    def add_rows(self, J: torch.Tensor, use: Use, buffers, constant_of) -> None:
        """Add the Jacobian rows of one use to the columns of its parameter, (M, size)."""
        if use.grouped:
            self._add_grouped(J, use, buffers, constant_of)
        elif use.op.kind == MATMUL:
            self._add_products(J, use, buffers, constant_of)
        elif use.op.kind == GATHER:
            self._add_gathered(J, use, buffers, constant_of)
        else:
            self._add_elements(J, use, buffers, constant_of)

    def _add_grouped(self, J, use, buffers, constant_of):
        """Row r of J, element (m, k): sum over its positions t of y[m, t] c[k, t]."""
        Y, C = use.cotangents(buffers).transpose(1, 2), use.constants(constant_of).T
        if not use.in_order:
            at = self.on_device(use, "positions", J.device)
            here = (at >= 0).to(J.dtype)[:, None]
            Y, C = Y.index_select(1, at.clamp_min(0)) * here, C.index_select(0, at.clamp_min(0))
        m, k = Y.shape[2], C.shape[1]
        Y, C = Y.reshape(len(Y), use.count, use.width, m), C.reshape(use.count, use.width, k)
        if use.width == 1:
            rows = Y.transpose(2, 3) * C
        else:
            rows = Y.transpose(2, 3) @ C
        rows = rows.transpose(0, 1)   # (R, O, m, k)
        rows = rows if use.op.alpha == 1 else rows * use.op.alpha
        if use.run >= 0:
            _add_window(use.window(J[use.run : use.run + use.count * self.outputs]), rows.flatten(0, 1), use.x[2:])
            return
        apart = torch.zeros(use.count * self.outputs, J.shape[1], dtype=J.dtype, device=J.device)
        _add_window(use.window(apart), rows.flatten(0, 1), use.x[2:])
        self._add_whole(J, apart, use)

    def _add_whole(self, J, apart, use):
        # Every residual stands once in the table, so the order of additions is that of the uses.
        if ("kept", J.device) not in use.tables:
            element = use.tables["element"]
            use.tables["kept"] = np.flatnonzero(element >= 0)
            use.tables["target"] = element[element >= 0]
        J.index_add_(0, self.on_device(use, "target", J.device), apart[self.on_device(use, "kept", J.device)])

    def _elements(self, use, shape, strides, device) -> torch.Tensor:
        """The residual (O, *shape) that each element of a window of y stands for; -1 where there is none."""
        if "index" not in use.tables:
            rows = _window(use.labels, shape, strides, use.op.y_offset)
            use.tables["index"] = np.where(rows < 0, -1, self.layout.element.T[:, rows])
        return self.on_device(use, "index", device)

    def _columns(self, use, shape, strides, device) -> torch.Tensor:
        """The column of J that each element of a window of x stands for."""
        if "columns" not in use.tables:
            use.tables["columns"] = np.asarray(_offsets(shape, strides) + use.op.x_offset)
        return self.on_device(use, "columns", device)

    def _add_elements(self, J, use, buffers, constant_of):
        """A muladd: y[i] += alpha c[i] x[i]."""
        op, (shape, ys, xs, cs) = use.op, use.op.extents
        buffer, c = buffers[op.y], constant_of(op)
        value = op.alpha * _strided(buffer, shape, ys, op.y_offset)
        if isinstance(c, torch.Tensor):
            value = value * c.as_strided(shape, cs, c.storage_offset() + op.c_offset)
        elif c is not None:
            value = value * c
        columns = self._columns(use, shape, xs, J.device)
        _scatter(J, self._elements(use, shape, ys, J.device), columns, value)

    def _add_gathered(self, J, use, buffers, constant_of):
        """A gather: y[i, :] += alpha x[p[i], :]."""
        op = use.op
        rows, width, y_row, x_row, _ = op.extents[0]
        positions = constant_of(op)
        value = op.alpha * _strided(buffers[op.y], (rows, width), (y_row, 1), op.y_offset)
        columns = op.x_offset + positions[:, None] * x_row + torch.arange(width, device=J.device)
        elements = self._elements(use, (rows, width), (y_row, 1), J.device)
        _scatter(J, torch.where(positions[:, None] < 0, -1, elements), columns, value)

    def _add_products(self, J, use, buffers, constant_of):
        """A matmul whose rows lie in any way: every product on its own, a few n at a time."""
        op, (a, b, m, n, k) = use.op, use.shape
        c = constant_of(op)
        Y = _strided(buffers[op.y], (a, b, m, n), use.y, op.y_offset)
        c = c.as_strided((a, b, k, n), (*use.c[:2], *use.c[2:]), c.storage_offset() + op.c_offset)
        elements = self._elements(use, (a, b, m, n), use.y, J.device)
        columns = self._columns(use, (a, b, m, k), use.x, J.device)
        columns = columns[:, :, :, None].expand(a, b, m, n, k)
        piece = max(1, _PIECE // max(1, len(Y) * a * b * m * k))
        for i in range(0, n, piece):
            j = slice(i, i + piece)
            value = op.alpha * Y[..., j, None] * c[:, :, None, :, j].transpose(-1, -2)
            _scatter(J, elements[..., j, None].expand(value.shape), columns[..., j, :], value)


def _window(labels: np.ndarray, shape, strides, offset: int) -> np.ndarray:
    size = labels.itemsize
    return np.lib.stride_tricks.as_strided(labels[offset:], shape, [s * size for s in strides])


def _strided(buffer: torch.Tensor, shape, strides, offset: int) -> torch.Tensor:
    return buffer.as_strided((len(buffer), *shape), (buffer.stride(0), *strides), buffer.storage_offset() + offset)


def _offsets(shape, strides) -> np.ndarray:
    found = np.zeros(tuple(shape), np.int64)
    for d, (n, s) in enumerate(zip(shape, strides, strict=True)):
        found += (np.arange(n) * s).reshape([-1 if j == d else 1 for j in range(len(shape))])
    return np.asarray(found)


def _add_window(window: torch.Tensor, rows: torch.Tensor, strides) -> None:
    """Add rows (R, m, k) to a window; a zero stride sums."""
    for d, s in enumerate(strides):
        if s == 0 and rows.shape[1 + d] != 1:
            rows, window = rows.sum(1 + d, keepdim=True), window.narrow(1 + d, 0, 1)
    window.add_(rows)


def _scatter(J: torch.Tensor, elements: torch.Tensor, columns: torch.Tensor, value: torch.Tensor) -> None:
    """J[elements, columns] += value where elements >= 0, in an order that never changes."""
    here = elements >= 0
    elements, columns = elements.clamp_min(0), columns.expand(elements.shape)
    value = torch.where(here, value, 0).reshape(-1)
    columns = torch.where(here, columns, 0)
    if J.device.type == "cpu" and J.is_contiguous():
        J.view(-1).index_add_(0, (elements * J.shape[1] + columns).reshape(-1), value)
    else:   # index_add_ adds atomically on a GPU, in any order; this sorts
        J.index_put_((elements.reshape(-1), columns.reshape(-1)), value, accumulate=True)
