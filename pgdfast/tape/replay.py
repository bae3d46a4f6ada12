"""What the core needs to read a tape of known structure by itself (csrc/tape/replay.h).

Rules and loss readers run in Python when a structure is new. Here it is found out, once, where what they handed over comes
from: most constants are saved tensors or windows on them, and most residuals scaled differences of two. At later steps the
core fetches those and compares everything else that was read; what it cannot do stays with Python, node by node.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels import native
from . import losses
from .ops import Refresh
from .program import Program, UnsupportedStructure
from .rules.table import Keyed, is_lazy
from .walk import Structure, Tape, Walker, describe

_LAYOUT, _NUMBER, _VALUE = 0, 1, 2   # what a field must have in common with the one seen before: csrc/tape/replay.h


@dataclass(slots=True)
class _ByHand:
    """A node whose constants, from number `start` on, Python computes; its fields must be described as before."""

    position: int
    rule: object
    needs: tuple[bool, ...]
    described: list
    start: int


class _Missing(Exception):
    """A node that was not read the last time."""


class _Handed(dict):
    """Nodes that the core hands over."""

    def __missing__(self, position: int):
        raise _Missing


@dataclass(slots=True)
class Replay:
    """What belongs to the core's reader of one program.

    positions: of the nodes that Python needs. by_hand: whose constants it computes. root: of a loss that it reads, else
    None; that must consume the same nodes and have blocks of these signatures and needs, whose constants follow from number
    `block_start` on. penalties and squares_only: of the loss, see trace.Trace.
    """

    program: Program
    structure: Structure
    positions: list[int]
    by_hand: list[_ByHand]
    root: int | None
    signatures: list[tuple]
    block_needs: list[tuple[bool, ...]]
    consumed: frozenset
    block_start: int
    penalties: dict[int, float]
    squares_only: bool

    def tape(self, nodes: list) -> Tape:
        """The nodes that the core hands over for Python to read."""
        return Tape(self.structure, _Handed(zip(self.positions, nodes, strict=True)))

    def fill(self, tape: Tape, constants: list, dtype: torch.dtype) -> bool:
        """Compute the constants that the core left open; False if a node is not as it was."""
        op = Refresh(dtype)
        for node in self.by_hand:
            try:
                values = node.rule.read(tape.nodes[node.position])
            except UnsupportedStructure:   # for the long way to say so
                return False
            if [describe(value) for value in values] != node.described:
                return False
            if not node.needs:   # it has no constants
                continue
            op.needs, op.constants = node.needs, []
            node.rule.apply(op, *values)
            constants[node.start : node.start + len(op.constants)] = op.constants
        return True

    def form(self, tape: Tape, constants: list, dtype: torch.dtype, loss: torch.Tensor) -> losses.Form | None:
        """The loss as Python reads it, its constants filled in; None if it is not of the known form."""
        try:
            form = losses.scalar_form(tape, self.root, value=loss)
        except (losses.UnrecognizedLoss, _Missing):   # for the long way to explain, or to find another form
            return None
        if form.consumed != self.consumed or [block.signature() for block in form.blocks] != self.signatures:
            return None
        constants[self.block_start :] = block_constants(form.blocks, self.block_needs, dtype)
        return form


def block_constants(blocks: list, needs: list[tuple[bool, ...]], dtype: torch.dtype) -> list:
    """The constants of a loss's blocks."""
    op = Refresh(dtype)
    for block, op.needs in zip(blocks, needs, strict=True):
        if any(op.needs):
            block.apply(op)
    return op.constants


def attach(walker: Walker, known, tape: Tape, work: list, form: losses.Form, root: int | None) -> Replay:
    """Let `walker.read` read tapes of a structure and program, a trace.Known, from now on.

    tape, work and form: of one such tape, `work` with (position, rule, saved values) of its nodes; root: the position of a
    scalar loss, else None.
    """
    dtype = known.program.dtype
    core = native.replay(dtype)
    structure, nodes = tape.structure, tape.nodes
    places = {position: place for place, position in enumerate(structure.wanted)}
    needs_of = {k: (needs, count) for k, needs, count in known.with_constants}
    by_hand, wanted, fields, constants = [], set(), 0, 0
    for k, (position, rule, values) in enumerate(work):
        needs, count = needs_of.get(k, ((), 0))
        lazy = any(is_lazy(getattr(nodes[position], name)) for name in rule.saved)
        simple = not lazy and all(map(_is_simple, values))
        found = None if not simple else _sources(rule, needs, values, dtype) if count else []
        if found is None:
            by_hand.append(_ByHand(position, rule, needs, [describe(value) for value in values], constants))
            wanted.add(position)
            found = [None] * count
        else:
            for name, value in zip(rule.saved, values, strict=False):   # a shape behind them belongs to the structure
                same = _LAYOUT if isinstance(value, torch.Tensor) else _VALUE
                core.add_field(places[position], nodes[position], name, same, value)
        for source in found:
            if source is None:
                core.add_gap()
            elif isinstance(source, tuple):
                core.add_window(fields + source[0], *source[1:])
            else:
                core.add_number(source)
        constants += count
        fields = core.num_fields
    numbers = block_constants(form.blocks, known.block_needs, dtype)
    if root is None:
        core.returned_residuals()
    else:
        read = _fields_of_loss(tape, form, root)
        if read is None:
            wanted |= form.consumed
            numbers = [None] * len(numbers)
        else:
            for number, (position, name, same, value) in enumerate(read, fields):
                core.add_field(places[position], nodes[position], name, same, value)
                read[number - fields] = position, name
            at = {field: fields + k for k, field in enumerate(read)}
            core.scalar_loss([(at[b.parts[0]], at[b.parts[1]] if len(b.parts) > 1 else -1, b.factor) for b in form.blocks])
            root = None
    for number in numbers:
        core.add_gap() if number is None else core.add_number(number)
    positions = sorted(wanted)
    replay = Replay(
        known.program, structure, positions, by_hand, root, [block.signature() for block in form.blocks], known.block_needs,
        frozenset(form.consumed), constants, form.penalties, form.squares_only,
    )
    walker.attach(core, replay, [places[position] for position in positions])
    return replay


def _is_simple(value) -> bool:
    """Say whether a saved value can be compared in one go: a tensor, or something without tensors."""
    if type(value) in (tuple, list):
        return not any(isinstance(v, torch.Tensor) for v in value)
    return not isinstance(value, Keyed)


def _sources(rule, needs: tuple[bool, ...], values: tuple, dtype: torch.dtype) -> list | None:
    """Where a rule's constants come from: numbers, or (number of the value, sizes, strides, offset from the value's own).

    None if it computes one of them. The rule runs on copies with memory of their own, so that memory names the value. Which
    value a rule hands over may depend on layouts and numbers, not on a tensor's entries.
    """
    if len(values) != len(rule.saved):
        return None
    copies = [copied(v) if isinstance(v, torch.Tensor) else v for v in values]
    owner = {_memory(c): k for k, c in enumerate(copies) if isinstance(c, torch.Tensor)}
    op = Refresh(dtype)
    op.needs = needs
    rule.apply(op, *copies)
    found = []
    for c in op.constants:
        if isinstance(c, torch.Tensor):
            k = owner.get(_memory(c))
            if k is None:
                return None
            found.append((k, list(c.shape), list(c.stride()), c.storage_offset()))
        elif owner:   # a number that may have been an entry
            return None
        else:
            found.append(c)
    return found


def _memory(t: torch.Tensor) -> int:
    return t.untyped_storage()._cdata


def copied(t: torch.Tensor) -> torch.Tensor:
    """The same entries under the same strides, from offset 0, in new memory."""
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return t.detach().as_strided((span,), (1,), t.storage_offset()).clone().as_strided(t.shape, t.stride(), 0)


class _Logged:
    """A node that notes in `log` which saved fields are read, as (position, field, value)."""

    def __init__(self, node, position: int, log: list):
        self._node, self._position, self._log = node, position, log

    def __getattr__(self, name: str):
        value = getattr(self._node, name)
        if name != "_input_metadata":   # part of the structure
            self._log.append((self._position, name, value))
        return value


def _fields_of_loss(tape: Tape, form: losses.Form, root: int) -> list | None:
    """(position, field, what must be the same, value) of all that a loss was read from, in order of position.

    None where the core cannot repeat the reading: all but squares, and weights that are tensors of several entries.
    """
    if not form.replays or tape.structure.losses:
        return None
    log: list = []
    logged = Tape(tape.structure, {k: _Logged(node, k, log) for k, node in tape.nodes.items()})
    try:
        losses.scalar_form(logged, root)
    except TypeError:   # a node's own backward was called
        return None
    parts = {part for block in form.blocks for part in block.parts}
    fields = {}
    for position, name, value in log:
        if is_lazy(value):
            return None
        if (position, name) in parts:
            same = _LAYOUT
        elif not isinstance(value, torch.Tensor):
            same = _VALUE
        elif value.numel() == 1 and value.device.type == "cpu":
            same = _NUMBER
        else:
            return None
        fields[position, name] = same, value
    return [(*field, *fields[field]) for field in sorted(fields)]
