"""The verbs in which rules are written, twice: `Record` builds instructions, `Refresh` only collects constants.

A rule runs once with `Record` when a tape's structure is new and once with `Refresh` at every later step, so that one
short function per operation serves both and the two cannot drift apart.
"""

from __future__ import annotations

import contextlib

import torch

from .program import (
    GATHER,
    MATMUL,
    MULADD,
    PARAMETER,
    PROJECT,
    WORKSPACE,
    Instruction,
    Pair,
    Program,
    Slot,
    UnsupportedStructure,
    blas_constant,
    coalesce,
    fits_blas,
    rows_last,
    whole,
)

_MOST_BY_ELEMENT = 1 << 20   # multiplications of a product that is not left to the BLAS


class Refresh:
    """Collects the constants of a tape whose structure is known. All structural verbs do nothing."""

    __slots__ = ("_count", "constants", "dtype", "needs", "parts")

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.constants: list[torch.Tensor | float] = []
        self.needs: tuple[bool, ...] = ()
        self._count = 0
        self.parts: tuple = (None, None)   # of complex inputs and outputs, which the verbs mean: "re" or "im"

    def start(self, inputs, shapes) -> None:
        """Begin a rule inside of another one's: what its inputs depend on the parameters by, or None; its outputs' shapes."""
        self.needs, self.parts = tuple([x is not None for x in inputs]), (None, None)
        self._count = len(shapes)

    def outputs(self) -> dict:
        """By number what the outputs of a rule inside of another one's depend on the parameters by."""
        return dict.fromkeys(range(self._count), True)

    def parameter(self, number: int):
        """What a parameter depends on itself by."""
        return True

    @contextlib.contextmanager
    def nested(self):
        """Let other rules run inside of one's: each after a `start`. Gives a function from an input's number to what it is."""
        needs, parts = self.needs, self.parts
        yield lambda i: True if needs[i] else None
        self.needs, self.parts = needs, parts

    def finish(self, out, x) -> None:
        """Out is what an inner rule's output is, zero for None."""

    def _cast(self, c: torch.Tensor) -> torch.Tensor:
        if c.dtype is self.dtype:
            return c
        if c.is_complex():   # a conversion would drop the imaginary part
            raise UnsupportedStructure("a complex constant")
        return c.to(self.dtype)

    def add(self, i, alpha=1.0, out=0, where=None):
        """out[where] += alpha * in_i, broadcast; alpha belongs to the structure."""

    def scale(self, i, c, out=0, where=None, function="c"):
        """out[where] += function(c) * in_i, broadcast; c is a number or a tensor and may change from step to step.

        The functions of FUNCTIONS are evaluated by the kernels, cheaper than by operators here.
        """
        if isinstance(c, torch.Tensor):
            self.constants.append(self._cast(c))
        else:
            self.constants.append(float(c))

    def sum(self, i, dims, keepdim, c=None, alpha=1.0, out=0):
        """Out += alpha * sum over dims of c * in_i."""
        if c is not None:
            self.scale(i, c)

    def matmul(self, i, left=None, right=None, alpha=1.0, out=0):
        """Out += alpha * left @ in_i, or alpha * in_i @ right; matrices, or stacks of matrices."""
        c = right if left is None else left
        self.constants.append(blas_constant(self._cast(c)))

    def gather(self, i, positions, lead, out=0, fixed=False):
        """Out[r] += in_i[positions[r]], rows being in_i's first `lead` dimensions flattened; -1 gives zero.

        lead: None for all dimensions, negative for all but so many. Positions may change from step to step, unless they are
        `fixed`: part of the structure. They have as many elements as out has rows.
        """
        self.constants.append(positions.to(torch.int64).reshape(-1).contiguous())

    def project(self, i, dims, scale, terms, alpha=1.0, out=0):
        """Out += scale * (in_i - alpha * sum over terms (l, r) of l * <r, in_i>), inner products over `dims` of in_i.

        scale, l and r are tensors of in_i's dimensions, broadcast, or None for ones; they may change from step to step.
        """
        for c in (scale, *(c for term in terms for c in term)):
            if c is not None:
                self.constants.append(rows_last(self._cast(c), dims))

    def view(self, i, window, out=0):
        """Out is a window on in_i: `window` maps a tensor to its view."""

    def reshape(self, i, shape=None, out=0):
        """Out is in_i in another shape, copied only where no view exists."""

    def expand(self, i):
        """Out is in_i broadcast to the output's shape, without a copy."""

    def unbind(self, i, dim):
        """Output k is in_i at position k of a dimension."""

    def join(self, dim, stacked, sizes=None):
        """Out is the inputs laid side by side along a dimension, or along a new one.

        sizes: theirs, where the tape does not show them for more than one.
        """

    def tile(self, i, repeats):
        """Out is in_i repeated along each dimension."""

    def nothing(self, out=0):
        """Out depends on no input."""

    def temporary(self, name, shape, behind=None):
        """Name a zero-initialized temporary that other verbs may use in place of an input or output.

        behind: (i, d): its shape is followed by in_i's dimensions from d on.
        """


class Record:
    """Builds the program of a tape with a new structure; the same verbs as `Refresh`, which explains them."""

    def __init__(self, program: Program, leaves: list[Slot] = ()):
        self.program, self._leaves = program, leaves
        self.constants: list[torch.Tensor | float] = []
        self.needs: tuple[bool, ...] = ()
        self.parts: tuple = (None, None)
        self._slots: dict = {}
        self._collect = Refresh(program.dtype)
        self._collect.constants = self.constants

    def start(self, inputs: list, shapes: list[torch.Size]) -> None:
        """Begin the next rule: its input slots, pairs of them where complex, and the shapes of its outputs."""
        self.needs = tuple(slot is not None for slot in inputs)
        self.parts = None, None
        self._inputs = inputs
        self._shapes = shapes
        self._slots = {}

    def parameter(self, number: int) -> Slot:
        """The slot of a parameter."""
        return self._leaves[number]

    @contextlib.contextmanager
    def nested(self):
        """See Refresh."""
        outer = self.needs, self._inputs, self._shapes, self._slots, self.parts
        yield lambda i: outer[1][i]
        self.needs, self._inputs, self._shapes, self._slots, self.parts = outer

    def finish(self, out, x: Slot | None) -> None:
        """See Refresh."""
        if x is None:
            self.output(out)
        else:
            self._slots[out] = x

    def bind_output(self, slot: Slot) -> None:
        """Let output 0 be an existing slot instead of a fresh buffer."""
        self._slots[0] = slot

    def off_parameters(self, x: Slot | None) -> Slot | None:
        """`x`, copied if it is a window on a parameter: cotangents of uses must lie in the workspace."""
        if x is None or self.program.buffers[x.buffer][0] != PARAMETER:
            return x
        return self._copy(x)

    def side_by_side(self, x: Pair) -> Slot:
        """Complex numbers as real ones with a last dimension of two."""
        shape = torch.Size((*x.re.view.shape, 2))
        y = whole(self.program.add_buffer(WORKSPACE, shape.numel()), shape)
        for k, part in enumerate((x.re, x.im)):
            self._muladd(Slot(y.buffer, y.view.select(-1, k)), part, -1, 1.0, part.view.shape)
        return y

    def output(self, out=0) -> Slot:
        """The slot of an output or temporary, allocated when first asked for."""
        key = self._key(out)
        if key not in self._slots:
            shape = self._shapes[out]
            self._slots[key] = whole(self.program.add_buffer(WORKSPACE, shape.numel()), shape)
        return self._slots[key]

    def _key(self, out):
        """Where the slot of an output, of its part that is meant if it is complex, or of a temporary is kept."""
        return out if isinstance(out, str) or self.parts[1] is None else (out, self.parts[1])

    def outputs(self) -> dict:
        """All outputs written so far, by number; of complex ones both parts."""
        found = {k: slot for k, slot in self._slots.items() if isinstance(k, int)}
        for key in self._slots:
            if isinstance(key, tuple) and key[1] == "re":
                found[key[0]] = Pair(self._slots[key], self._slots[key[0], "im"])
        return found

    def _input(self, i) -> Slot:
        if isinstance(i, str):
            return self.output(i)
        x = self._inputs[i]
        return getattr(x, self.parts[0]) if isinstance(x, Pair) else x

    def _constant(self, verb, *arguments) -> int:
        verb(*arguments)
        c = self.constants[-1]
        layout = (tuple(c.shape), c.stride()) if isinstance(c, torch.Tensor) else None
        self.program.layouts.append(layout)
        self.program.functions.append("c")
        return len(self.constants) - 1

    def _muladd(self, y: Slot, x: Slot, constant: int, alpha: float, shape) -> None:
        if 0 in shape:   # nothing to do; an unwritten buffer is zero
            return
        yv = y.view.expand(shape)
        xv = x.view.expand(shape)
        if constant >= 0 and isinstance(self.constants[constant], torch.Tensor):
            c_strides = self.constants[constant].expand(shape).stride()
        else:
            c_strides = (0,) * len(shape)
        extents = coalesce(shape, yv.stride(), xv.stride(), c_strides)
        self.program.instructions.append(
            Instruction(
                MULADD, y.buffer, yv.storage_offset(), x.buffer, xv.storage_offset(), constant, alpha, extents
            )
        )

    def add(self, i, alpha=1.0, out=0, where=None):
        y = self.output(out)
        y = y if where is None else Slot(y.buffer, where(y.view))
        self._muladd(y, self._input(i), -1, float(alpha), y.view.shape)

    def scale(self, i, c, out=0, where=None, function="c"):
        constant = self._constant(self._collect.scale, i, c)
        self.program.functions[-1] = function
        y = self.output(out)
        y = y if where is None else Slot(y.buffer, where(y.view))
        self._muladd(y, self._input(i), constant, 1.0, y.view.shape)

    def sum(self, i, dims, keepdim, c=None, alpha=1.0, out=0):
        constant = -1 if c is None else self._constant(self._collect.scale, i, c)
        x, y = self._input(i), self.output(out)
        shape = x.view.shape
        dims = sorted(d % len(shape) for d in dims) if dims and shape else list(range(len(shape)))
        view = y.view
        if not keepdim:
            for d in dims:
                view = view.unsqueeze(d)
        self._muladd(Slot(y.buffer, view), x, constant, float(alpha), shape)

    def matmul(self, i, left=None, right=None, alpha=1.0, out=0):
        constant = self._constant(self._collect.matmul, i, left, right)
        c = self.constants[constant]
        x = self._input(i)
        # A parameter that no BLAS reads in place is read element by element: rows separate, those of a copy do not.
        elementwise = (
            self.program.buffers[x.buffer][0] == PARAMETER and not _suits_blas(x.view, 3)
            and x.view.numel() * c.shape[-1 if left is None else -2] <= _MOST_BY_ELEMENT
        )
        x = x if elementwise else self._in_blas_layout(x)
        buffer, x, y = x.buffer, x.view, self.output(out).view
        if x.dim() == 1:
            x, y = x.unsqueeze(-1), y.unsqueeze(-1)
        if left is not None:
            x, y, c = x.mT, y.mT, c.mT
        if x.dim() > 4:
            raise UnsupportedStructure("a product of matrices stacked along more than two dimensions")
        c = c.expand(*x.shape[:-2], *c.shape[-2:])
        x, y, c = ([t] if t.dim() == 4 else [t[(None,) * (4 - t.dim())]] for t in (x, y, c))
        x, y, c = x[0], y[0], c[0]
        outer, b, m, k = x.shape
        n = c.shape[3]
        if 0 in (outer, b, m, k, n):
            return
        if elementwise:
            ys, xs, cs = y.stride(), x.stride(), c.stride()
            extents = coalesce(
                (outer, b, m, n, k), (*ys, 0), (*xs[:3], 0, xs[3]), (*cs[:2], 0, cs[3], cs[2]))
            self.program.instructions.append(
                Instruction(
                    MULADD, self.output(out).buffer, y.storage_offset(), buffer, x.storage_offset(), constant, float(alpha),
                    extents,
                )
            )
            return
        inner, outers = [t.stride()[1:] for t in (y, x, c)], [t.stride(0) for t in (y, x, c)]
        if b == 1 or all(o == b * s[0] for o, s in zip(outers, inner, strict=True)):   # one batch dimension will do
            if b == 1:
                inner = [(o, *s[1:]) for o, s in zip(outers, inner, strict=True)]
            outer, b, outers = 1, outer * b, (0, 0, 0)
        extents = [[b, m, n, k, *(s for strides in inner for s in strides), outer, *outers]]
        self.program.instructions.append(
            Instruction(
                MATMUL, self.output(out).buffer, y.storage_offset(), buffer, x.storage_offset(), constant,
                float(alpha), extents,
            )
        )

    def gather(self, i, positions, lead, out=0, fixed=False):
        constant = self._constant(self._collect.gather, i, positions, lead)
        self.program.functions[-1] = "positions"
        if fixed:
            self.program.fixed.add(constant)
        y, x = self.output(out), self._input(i)
        shape = x.view.shape
        lead = len(shape) + (lead or 0) if lead is None or lead < 0 else lead
        count, width = shape[:lead].numel(), shape[lead:].numel()
        try:
            rows = x.view.view(count, width)
        except RuntimeError:
            rows = None
        # Windows with zero strides are copied, here and in project: an adjoint may not add to one element twice at once.
        if rows is None or (width > 1 and rows.stride(1) != 1) or (count > 1 and rows.stride(0) == 0):
            x = self._copy(x)
            rows = x.view.view(count, width)
        n = len(self.constants[constant])
        if n * width == 0:
            return
        self.program.instructions.append(
            Instruction(
                GATHER, y.buffer, y.view.storage_offset(), x.buffer, rows.storage_offset(), constant, 1.0,
                [[n, width, width, rows.stride(0), count]],
            )
        )

    def project(self, i, dims, scale, terms, alpha=1.0, out=0):
        # A parameter is copied first: only the simple instructions use parameters directly.
        x, y = self.off_parameters(self._input(i)), self.output(out).view
        if y.numel() == 0:
            return
        given = [scale, *(c for term in terms for c in term)]
        first = len(self.constants)
        self._collect.project(i, dims, scale, terms)
        for c in self.constants[first:]:
            self.program.layouts.append((tuple(c.shape), c.stride()))
            self.program.functions.append("c")
        numbers, following = [], iter(range(first, len(self.constants)))
        for c in given:
            numbers.append(-1 if c is None else next(following))
        try:
            xv = rows_last(x.view, dims, copy=False)
        except RuntimeError:
            xv = None
        if xv is None or any(s == 0 and n > 1 for n, s in zip(xv.shape, xv.stride(), strict=True)):
            x = self._copy(x)
            xv = rows_last(x.view, dims)
        yv = rows_last(y, dims, copy=False)
        shape = xv.shape
        strides = [yv.stride(), xv.stride()]
        for number in numbers:
            strides.append((0,) * len(shape) if number < 0 else self.constants[number].expand(shape).stride())
        outer, *merged = coalesce(shape[:-1], *(s[:-1] for s in strides))
        rows = [[*m, s[-1]] for m, s in zip(merged, strides, strict=True)]
        extents = [[*outer, shape[-1]], *rows, numbers, [0] * len(numbers)]
        self.program.instructions.append(
            Instruction(
                PROJECT, self.output(out).buffer, yv.storage_offset(), x.buffer, xv.storage_offset(), -1, float(alpha), extents
            )
        )

    def _in_blas_layout(self, x: Slot) -> Slot:
        if x.view.dim() > 3:
            x = self.off_parameters(x)
        return x if _suits_blas(x.view) else self._copy(x)

    def _copy(self, x: Slot) -> Slot:
        target = whole(self.program.add_buffer(WORKSPACE, x.view.numel()), x.view.shape)
        self._muladd(target, x, -1, 1.0, x.view.shape)
        return target

    def view(self, i, window, out=0):
        x = self._input(i)
        self._slots[self._key(out)] = Slot(x.buffer, window(x.view))

    def reshape(self, i, shape=None, out=0):
        shape = self._shapes[out] if shape is None else shape
        x = self._input(i)
        try:
            view = x.view.view(shape)
        except RuntimeError:
            x = self._copy(x)
            view = x.view.view(shape)
        self._slots[self._key(out)] = Slot(x.buffer, view)

    def expand(self, i):
        self.view(i, lambda x: x.expand(self._shapes[0]))

    def unbind(self, i, dim):
        for k in range(len(self._shapes)):
            self.view(i, lambda x, k=k: x.select(dim, k), out=k)

    def join(self, dim, stacked, sizes=None):
        shape = self._shapes[0]
        dim %= len(shape)
        if stacked:
            starts = range(len(self._inputs))
        elif sizes is not None:
            starts = [sum(sizes[:k]) for k in range(len(sizes))]
        else:
            starts = self._offsets(dim, shape)
        self.output()
        for i, start in enumerate(starts):
            if not self.needs[i] or not self._input(i).view.numel():
                continue
            if stacked:
                self.add(i, where=lambda x, a=start: x.select(dim, a))
            else:
                size = self._input(i).view.shape[dim]
                self.add(i, where=lambda x, a=start, n=size: x.narrow(dim, a, n))

    def _offsets(self, dim: int, shape: torch.Size) -> list[int]:
        # A piece that no parameter reaches leaves no size on the tape; one such piece follows from the rest.
        # A piece of no elements may have one dimension alone.
        sizes = [
            None if s is None else s.view.shape[dim] if s.view.dim() == len(shape) else 0
            for s in (self._input(i) for i in range(len(self._inputs)))
        ]
        for k in [k for k, size in enumerate(sizes) if size is None]:
            sizes[k] = shape[dim] - sum(size for size in sizes if size is not None)
        return [sum(sizes[:k]) for k in range(len(sizes))]

    def tile(self, i, repeats):
        x = self._input(i)
        sizes = (1,) * (len(repeats) - x.view.dim()) + tuple(x.view.shape)
        y = self.output()
        pairs = [n for pair in zip(repeats, sizes, strict=True) for n in pair]
        source = x.view.view([n for size in sizes for n in (1, size)]) if x.view.is_contiguous() else None
        if source is None:
            copy = self._copy(x)
            x, source = copy, copy.view.view([n for size in sizes for n in (1, size)])
        self._muladd(Slot(y.buffer, y.view.view(pairs)), Slot(x.buffer, source), -1, 1.0, pairs)

    def nothing(self, out=0):
        self.output(out)

    def temporary(self, name, shape, behind=None):
        if behind is not None:
            shape = (*shape, *self._input(behind[0]).view.shape[behind[1] :])
        self._slots[name] = whole(self.program.add_buffer(WORKSPACE, torch.Size(shape).numel()), shape)


def slot_of(slots: dict, edge, names: list[str]):
    """What an edge (position, output) of a tape carries, by the slots of its nodes' outputs; None for no edge.

    Raises UnsupportedStructure where the rule of the node has not written this output.
    """
    if edge is None:
        return None
    if edge not in slots:
        raise UnsupportedStructure(f"output {edge[1]} of {names[edge[0]]}")
    return slots[edge]


def _suits_blas(view: torch.Tensor, most_dims: int = 4) -> bool:
    """Say whether a BLAS may read a window in place, and add to it in the adjoint sweep: there are no zero strides, then."""
    if view.dim() == 1:
        return True
    broadcast = any(s == 0 and n > 1 for n, s in zip(view.shape[-2:], view.stride()[-2:], strict=True))
    return view.dim() <= most_dims and not broadcast and fits_blas(view.shape, view.stride())


__all__ = ["Record", "Refresh", "UnsupportedStructure", "slot_of"]
