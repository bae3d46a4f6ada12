"""The CUDA kernels: the interface of the native core, on a GPU, without waiting for it inside a solve."""

from __future__ import annotations

import contextlib
import ctypes

import torch

from . import cuda_library as lib
from . import cuda_members
from .encoding import encoded, encoded_rows
from .limits import DOUBLE_FACTOR
from .protocol import STATUS, Outcome, TensorFactor, Traits

LIMITS = "on NVIDIA GPUs of compute capability 8.0 and later in float32 and float64"

available = lib.unusable


def applies(device: torch.device, dtype: torch.dtype) -> bool:
    """Runs on CUDA tensors in float32 and float64."""
    return device.type == "cuda" and dtype in (torch.float32, torch.float64)


class Kernels(Traits):
    """A program's plan on one GPU (kernels.protocol.Kernels). Results are on the constants' device.

    library: the kernels to use; the emulated ones of the tests take CPU tensors. Nothing waits for the GPU but what hands
    numbers back: one transfer per solve.
    """

    name = "native"
    fused = has_direct = has_cg = solves_members = True

    def __init__(self, program, dtype: torch.dtype, library: lib.Library | None = None):
        self.library = library or lib.library()
        self.dtype, self._program = dtype, program
        self._wide = dtype == torch.float64
        words, alphas = encoded(program)
        alphas = torch.tensor(alphas, dtype=torch.float64)
        self.plan = self.library.new(self._wide, words.data_ptr(), len(words), alphas.data_ptr(), len(alphas))
        if not self.plan:
            raise RuntimeError(f"pgdfast's CUDA kernels: {self.library.error().decode()}")
        self.num_residuals, self.num_parameters, self.arena_size, self._scratch_size = map(self._info, range(4))
        self.flops = self.library.flops(self.plan)
        self.parameter_sizes, self.device = program.sizes(0), None
        self._rows = self._members = None
        self._tables: dict[int, torch.Tensor] = {}
        self._own: dict[int, torch.Tensor] = {}   # constants that are not the tape's own tensors
        self._forget()

    def __del__(self):
        if getattr(self, "plan", None):
            self.library.free(self.plan)

    def _info(self, what: int) -> int:
        return self.library.info(self.plan, what)

    def _forget(self) -> None:
        self._constants = self._memory = self._matrix = self._held = None

    # --- constants and rows -------------------------------------------------------------------------------------------------

    def bind(self, constants: list) -> None:
        """Point the plan at these constants, which it keeps alive."""
        self._forget()
        tensors = [c for c in constants if isinstance(c, torch.Tensor)]
        if tensors:
            self._on(tensors[0].device)
        count = len(constants)
        data, positions, values = [0] * count, (ctypes.c_char * count)(), (ctypes.c_double * count)()
        with self.here():
            layouts, functions = self._program.layouts, self._program.functions
            for i, (c, layout, function) in enumerate(zip(constants, layouts, functions, strict=True)):
                if layout is None:
                    values[i] = c
                    continue
                if c.device != self.device:
                    raise RuntimeError(
                        f"pgdfast: the closure's tensors are on {self.device} and {c.device}; move data and model "
                        "to one device."
                    )
                if c.shape != layout[0] or (function != "positions" and c.stride() != layout[1]):
                    raise RuntimeError(
                        "pgdfast: a tape of known structure holds tensors of another layout; please report this."
                    )
                positions[i] = function == "positions"
                # Positions were in range when PyTorch used them in the forward pass; looking again would wait for the GPU.
                c = c.contiguous() if function == "positions" else self._evaluated(i, c, function)
                data[i] = c.data_ptr()
                tensors.append(c)
        self._constants, self.bound = tensors, (data, positions, values)
        self.select(0)

    def set_members(self, count: int, shifts: list[int], spans: list[int]) -> None:
        """Say that constants are those of `count` members: see tape.members.Members; spans are not needed here."""
        self._members = shifts, count

    def select(self, member: int) -> None:
        """Let products and solves be those of one member."""
        data, positions, values = self.bound
        sizes = [8 if p == b"\1" else self.dtype.itemsize for p in positions]
        at = [d + member * s * size if d else None for d, s, size in zip(data, self.shifts, sizes, strict=True)]
        self.library.bind(self.plan, len(at), (ctypes.c_void_p * len(at))(*at), positions, values)
        self._matrix = None

    def _evaluated(self, i: int, c: torch.Tensor, function: str) -> torch.Tensor:
        """function(c) in the plan's dtype under the strides of c: c itself, or memory of the plan's own."""
        if function == "c" and c.dtype == self.dtype:
            return c
        if c.dtype not in (self.dtype, torch.float32):
            raise RuntimeError(f"pgdfast: a constant of {c.dtype} in a program of {self.dtype}; please report this.")
        span = 1 + sum((n - 1) * s for n, s in zip(c.shape, c.stride(), strict=True)) if c.numel() else 0
        own = self._own.get(i)
        if own is None or len(own) < span or own.device != self.device:
            own = self._own[i] = self._new(span)
        number = ("c", "1 - c^2", "c - c^2").index(function)
        self.library.evaluate(
            self._wide, number, span, c.data_ptr(), c.dtype == torch.float32, own.data_ptr(), self.stream
        )
        return own

    def release(self) -> None:
        """Forget the constants; bind others before the next product."""
        self._forget()

    def set_rows(self, rows) -> None:
        """Give the plan the row structure that Gram and dense forms need, or take it away with None."""
        self._rows, self._tables, self._matrix = rows, {}, None
        if rows is None:
            self.library.set_rows(self.plan, None, 0)
            return
        words = encoded_rows(rows)
        self.library.set_rows(self.plan, words.data_ptr(), len(words))

    @property
    def shifts(self) -> list[int]:
        """Per constant, elements from one member's to the next one's."""
        return self._members[0] if self._members else [0] * len(self.bound[0])

    # --- where things are ---------------------------------------------------------------------------------------------------

    def _on(self, device: torch.device) -> None:
        if device != self.device:
            self.device, self._tables, self._own, self._memory = device, {}, {}, None

    def here(self):
        """A context in which the constants' device is the current one."""
        if self.device is None or self.device.type != "cuda":
            return contextlib.nullcontext()
        self.library.set_device(self.device.index)
        return contextlib.nullcontext() if self.device.index == torch.cuda.current_device() else torch.cuda.device(self.device)

    @property
    def stream(self) -> int:
        """PyTorch's current stream, as a number."""
        return torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0

    def _new(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def _of(self, given: torch.Tensor) -> torch.Tensor:
        """A vector that kernels can read."""
        self._on(given.device)
        return given.detach().to(self.dtype).contiguous()

    def _arena(self) -> tuple[int, int]:
        """Pointers to the arena of one sweep and to scratch memory."""
        if self._memory is None:
            self._memory = self._new(max(self.arena_size, 1)), self._new(self._scratch_size)
        return self._memory[0].data_ptr(), self._memory[1].data_ptr()

    def table(self, kind: int) -> torch.Tensor:
        """The plan's table for the Gram matrix (0), J (1) or an ensemble (2) on the device, made once per row structure."""
        if kind not in self._tables:
            size = self.library.table(self.plan, kind, None)
            if size < 0:
                raise RuntimeError(f"pgdfast's CUDA kernels: {self.library.error().decode()}")
            table = torch.empty(size, dtype=torch.int64)
            self.library.table(self.plan, kind, table.data_ptr())
            self._tables[kind] = table.to(self.device)
        return self._tables[kind]

    # --- products -----------------------------------------------------------------------------------------------------------

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """J v, (M,)."""
        v = self._of(v)
        u = self._new(self.num_residuals)
        with self.here():
            self.library.jvp(self.plan, v.data_ptr(), u.data_ptr(), *self._arena(), self.stream)
        return u

    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        """J^T u, (P,)."""
        u = self._of(u)
        v = self._new(self.num_parameters)
        with self.here():
            self.library.vjp(self.plan, u.data_ptr(), v.data_ptr(), *self._arena(), self.stream)
        return v

    def _unit_sweeps(self, kind: int) -> torch.Tensor:
        """The arenas of unit cotangents, one per output."""
        table = self.table(kind)
        arenas = self._new(max(self.arena_size, 1) * self._rows.max_outputs)
        u, (_, scratch) = self._new(self.num_residuals), self._arena()
        outputs = table.data_ptr() + 8 * self._info(7 + kind)
        self.library.unit_sweeps(self.plan, outputs, arenas.data_ptr(), u.data_ptr(), scratch, self.stream)
        return arenas

    def dense(self) -> torch.Tensor:
        """J, (M, P)."""
        if self._rows is None and self.num_parameters < self.num_residuals:
            units = torch.eye(self.num_parameters, dtype=self.dtype, device=self.device)
            return torch.stack([self.jvp(unit) for unit in units], 1) if len(units) else units.new_empty(self.num_residuals, 0)
        J = self._new(self.num_residuals, self.num_parameters)
        with self.here():
            if self._rows is None:
                u, (arena, scratch) = self._new(self.num_residuals), self._arena()
                self.library.dense(self.plan, None, arena, u.data_ptr(), scratch, J.data_ptr(), self.stream)
            else:
                arenas = self._unit_sweeps(1)
                self.library.dense(
                    self.plan, self.table(1).data_ptr(), arenas.data_ptr(), None, None, J.data_ptr(), self.stream
                )
        return J

    def diagonal(self) -> torch.Tensor:
        """diag(J^T J), (P,)."""
        J, d = self.dense(), self._new(self.num_parameters)
        with self.here():
            self.library.squares(self._wide, *J.shape, J.data_ptr(), d.data_ptr(), self.stream)
        return d

    def gram(self, weights: list[float] | None = None) -> torch.Tensor:
        """J W J^T, (M, M), W one number per parameter or None; needs rows."""
        ones = self._new(len(self.parameter_sizes)).fill_(1)
        return self._gram(ones if weights is None else torch.tensor(weights).to(ones))

    def _gram(self, weights: torch.Tensor) -> torch.Tensor:
        if self._rows is None:
            raise ValueError("pgdfast: gram needs a row layout; call set_rows first.")
        with self.here():
            arenas, table = self._unit_sweeps(0), self.table(0)
            packed, K = self._new(max(self._info(5), 1)), self._new(self.num_residuals, self.num_residuals)
            self.library.gram(
                self.plan, table.data_ptr(), arenas.data_ptr(), weights.data_ptr(), packed.data_ptr(), K.data_ptr(), self.stream
            )
        return K

    def _normal(self) -> torch.Tensor:
        """J^T J, (P, P), in full precision whatever PyTorch's own products are allowed."""
        J = self.dense()
        (M, P), H = J.shape, self._new(self.num_parameters, self.num_parameters)
        shape, strides = (ctypes.c_int64 * 3)(P, P, M), (ctypes.c_int64 * 6)(1, P, P, 1, P, 1)
        with self.here():
            self.library.product(self._wide, shape, strides, J.data_ptr(), J.data_ptr(), H.data_ptr(), self.stream)
        return H

    # --- solves -------------------------------------------------------------------------------------------------------------

    def _factored(self, diagonal) -> tuple[torch.Tensor, torch.Tensor]:
        """The factor of the matrix held plus this diagonal, and the device's flag, 0 where that went well."""
        matrix = self._matrix.to(torch.float64 if len(self._matrix) <= DOUBLE_FACTOR else self.dtype, copy=True)
        matrix.diagonal().add_(diagonal)
        return torch.linalg.cholesky_ex(matrix)

    def _outcome(self, step, info, gain, trace, factor) -> Outcome:
        """The result of a direct solve: the numbers in one transfer, a zero step where there is no factor."""
        good = (info == 0) & torch.isfinite(gain)
        step = torch.where(good, step, torch.zeros((), dtype=step.dtype, device=step.device))
        numbers = torch.stack([good.double(), gain, _dot(step, step), trace]).tolist()
        if not numbers[0]:
            return Outcome(step, "not_positive_definite", trace=numbers[3])
        return Outcome(step, "solved", 0, 0.0, *numbers[1:], 0.0, factor)

    def dual(self, r, weights, shift, q) -> Outcome:
        """The dual step; needs rows."""
        r = self._of(r)
        host = None if weights is None else tuple(weights.tolist()) if weights.device.type == "cpu" else weights
        if self._matrix is None or self._held != ("gram", host):
            ones = self._new(len(self.parameter_sizes)).fill_(1)
            self._matrix = self._gram(ones if weights is None else weights.to(self.device, self.dtype))
            self._held = "gram", host
        W = None
        if weights is not None:
            W = torch.cat([self._new(n).fill_(w) for n, w in zip(self.parameter_sizes, host, strict=True)])
        rhs = r if q is None else r - self.jvp(W * q / shift if W is not None else q / shift)
        lower, info = self._factored(shift)
        y = TensorFactor(lower).solve(rhs)
        step = self.vjp(y)
        step = step if q is None else step + q / shift
        step = step if W is None else W * step
        gain = _dot(r, r.double() - shift * y.double())
        gain = gain if q is None else gain + _dot(q, step)
        return self._outcome(step, info, gain, self._matrix.diagonal().double().sum() / shift, TensorFactor(lower, y))

    def primal(self, r, d, q) -> Outcome:
        """The primal step."""
        r = self._of(r)
        if self._matrix is None or self._held != ("normal", None):
            self._matrix, self._held = self._normal(), ("normal", None)
        g = self.vjp(r)
        g = g if q is None else g + q
        lower, info = self._factored(d)
        factor = TensorFactor(lower)
        step = factor.solve(g)
        return self._outcome(step, info, _dot(g, step), (self._matrix.diagonal().double() / d.double()).sum(), factor)

    def cg(self, r, d, q, preconditioner, start, path, options):
        """A whole CG solve.

        Nothing waits for the GPU before the result. A flag in host memory, which the GPU sets, ends the enqueuing early.
        """
        r, d = self._of(r), self._of(d)
        q, *preconditioner, start = (x if x is None else self._of(x) for x in (q, *preconditioner, start))
        rank = 0 if preconditioner[1] is None else len(preconditioner[1])
        slots = 0 if path is None else len(path)
        P, M, limit = self.num_parameters, self.num_residuals, options.max_iterations
        step, work = self._new(P), self._new(self.library.cg_vectors(P, M, rank))
        scalars = self._new(self.library.cg_scalars(limit), dtype=torch.float64)
        report = self._new(6 + 5 * slots, dtype=torch.float64)
        ended = torch.zeros(1, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        arena, scratch = self._arena()
        pointers = lib.pointers([r, d, q, *preconditioner, start, path, step, work, scalars, report, ended, None, None])
        pointers[13], pointers[14] = arena, scratch
        counts, limits = (ctypes.c_int64 * 3)(rank, slots, limit), (ctypes.c_double * 3)(
            options.tolerance, options.absolute, options.progress
        )
        with self.here():
            self.library.cg(self.plan, pointers, counts, limits, self.stream)
        status, iterations, norm, gain, square, slack, *kept = report.tolist()   # the one wait, after which `ended` may go
        kept = [kept[5 * k : 5 * k + 4] for k in range(slots)]
        found = [(slot, int(i), *rest) for slot, (i, *rest) in enumerate(kept) if i > 0]
        return Outcome(step, STATUS[int(status)], int(iterations), norm, gain, square, 0.0, slack), found

    def members_solve(self, name, listed, r, mu, penalty, scale, q, options, inverse=None, start=None, update=None):
        """Whole solves for the members listed: one launch where each block owns a member.

        update: (parameters (B, ...), rates (B,)), from which rates * step is subtracted in the same launch. "primal", and
        problems with a penalty, scale, q, inverse or start, run one member after the other.
        """
        return cuda_members.solve(self, name, listed, r, mu, penalty, scale, q, options, inverse, start, update)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.dot(a.double(), b.double())
