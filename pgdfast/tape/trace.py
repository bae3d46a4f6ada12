"""One closure result read into a program, its constants, and the residual at the current point.

The structure of a tape (which operations, on which shapes, joined how) is turned into a program once; later tapes of the
same structure only hand over their saved tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import losses
from .checkpoint import checkpoint_rule
from .hidden import refuse_accumulation_hooks, refuse_beside_averaging, refuse_checkpoints, refuse_hidden
from .ops import Record, Refresh, slot_of
from .program import PARAMETER, RESIDUAL, Pair, Program, Slot, UnsupportedStructure, whole
from .reals import real_size, real_views
from .replay import Replay, attach, block_constants
from .rules.complex_numbers import rule_for_complex
from .rules.table import Keyed, plain
from .simplify import simplify
from .walk import CHECKPOINT, OPAQUE, Fallback, Structure, Tape, Walker, describe, rule_of

_STRUCTURES_KEPT = 16


@dataclass(slots=True)
class Trace:
    """A tape read at one point.

    loss: 0-dim, detached; value: the same as a number, None where that was not to be waited for. residual: (M,), scaled so
    that the loss's gradient is J^T residual (plus penalty). squares_only: it is a sum of squares with constant weights.
    tapeless: would the closure compute the same without gradients? penalties: {parameter number: c} for c/2 ||theta||^2.
    program and constants: the linearization, or None where `missing` names an operation without a rule;
    then blocks are the loss's convex parts, and edges holds, per block, the autograd edges of its outputs.
    structure: of the tape.
    """

    loss: torch.Tensor
    value: float | None
    residual: torch.Tensor
    squares_only: bool
    tapeless: bool
    penalties: dict[int, float]
    program: Program | None
    constants: list
    structure: Structure
    missing: str | None = None
    blocks: list | None = None
    edges: list | None = None


@dataclass(slots=True)
class Known:
    """A program; which nodes of its tape have constants, with the inputs they need and how many; its blocks' needs.

    structure: of the tape. replay: how the core reads such tapes, once that has been found out.
    """

    program: Program
    structure: Structure
    with_constants: list[tuple[int, tuple[bool, ...], int]]
    block_needs: list[tuple[bool, ...]]
    replay: Replay | None = None


class CompiledTape(ValueError):
    """Nodes of torch.compile stand between a closure's result and the parameters."""


class Tracer:
    """Reads closure results for a fixed list of parameters and remembers the structures it has seen."""

    def __init__(self, params: list[torch.Tensor]):
        self.params = params
        self._walker = Walker(params)
        self.dtype = params[0].dtype.to_real()
        for p in params:
            self.dtype = torch.promote_types(self.dtype, p.dtype.to_real())
        self._known: dict[tuple, Known] = {}
        self._checkpoint = checkpoint_rule(self.params, self._rule_of)
        self.replays = self._walker.replays and self.dtype in (torch.float32, torch.float64)   # tests turn it off

    def join_group(self) -> None:
        """Take hooks where .grad is accumulated for those of DistributedDataParallel, whose place a step in a group takes."""
        self._walker.in_group = True

    def trace(self, result, allow_sync: bool = True, rules: bool = True) -> Trace:
        """Read what a closure returned.

        result: a 0-dim loss, a residual tensor of at least one dimension, or a tuple or list of those. allow_sync: may it wait
        for a device? If not, nothing is read off tensors there: `value` is None, and weights may have any sign. rules: make a
        program; else the trace is as if an operation had none.
        Raises ValueError for results that cannot be linearized, each with what to do instead.
        """
        try:
            if self.replays and allow_sync and rules:
                trace = self._replay(result)
                if trace is not None:
                    return trace
            with torch.no_grad():
                return self._trace(result, allow_sync, rules)
        except RuntimeError as error:
            _explain_freed(error)
            raise

    def as_loss(self, result, allow_sync: bool = True):
        """A result of one entry with dimensions, (1,) or (1, 1), as 0-dim where its tape ends as a loss does; else itself.

        Raises ValueError where it may as well be one residual: a sum of squares less a constant.
        """
        if not result.requires_grad:
            return result
        with torch.no_grad():
            tape = self._tape([result])
            position, known = tape.structure.roots[0][0], tape.structure.one_element
            if known is None:
                try:
                    form = losses.scalar_form(tape, position, allow_sync)
                    known = losses.one_element(form, tape, float(result) if allow_sync else None, self.params)
                except losses.UnrecognizedLoss:
                    known = "residual"
                except RuntimeError as error:
                    _explain_freed(error)
                    raise
                tape.structure.one_element = known if allow_sync else None
        if known == "either":
            raise ValueError(
                f"pgdfast.LM: closure returned a tensor of shape {tuple(result.shape)} whose tape ends as a loss does "
                f"({tape.name(position)}); return loss.squeeze() to minimize it as the loss that it is, or the tuple (r,) "
                "if it is a residual whose square is to be minimized."
            )
        if known == "residual":
            return result
        with torch.enable_grad():
            return result.reshape(())

    def shares(self, result, residual: torch.Tensor | None = None) -> tuple[losses.Share, ...]:
        """How each block of a closure's result combines with those of other parts of the rows, in order of the residual.

        To be asked while the tape is alive. residual: (M,), as `trace` gave it, for the values of the shares.
        """
        with torch.no_grad():
            result, tensors, tape, edges = self._results(result)
            shares = losses.known_shares(tape, edges)
            if shares is None:
                form = self._form(result, tape, edges)
                if form is None:
                    shares = losses.residual_shares(tape, tensors, edges, self.dtype)
                else:
                    shares = losses.shares_of(tape, edges, form, self.dtype)
            shares = losses.with_statistics(tape, shares)
            if residual is None:
                return shares
            return tuple(
                [share.valued(part) for share, part in zip(shares, residual.split([s.size for s in shares]), strict=True)]
            )

    def term_values(self, result) -> list[float] | None:
        """The value of each block's term of a closure's result, in float64 and up to constants; None where it cannot be had."""
        with torch.no_grad():
            result, tensors, tape, edges = self._results(result)
            form = self._form(result, tape, edges)
            if form is None:
                return [losses.half_squares(r) for r in tensors]
            return losses.term_values(tape, form, float(result) - self.penalty_value(form.penalties))

    def penalty_value(self, penalties: dict[int, float]) -> float:
        """Of quadratic penalties: sum c/2 ||theta_k||^2, in float64."""
        return sum(c * losses.half_squares(real_views([self.params[k]])[0]) for k, c in penalties.items())

    def _results(self, result) -> tuple:
        """(result, tensors, tape, active edges of the tensors, else None) of a closure's result."""
        if isinstance(result, torch.Tensor) and result.dim() and result.numel() == 1:
            result = self.as_loss(result)
        tensors = list(result) if isinstance(result, (tuple, list)) else [result]
        tape = self._tape(tensors)
        found = iter(tape.structure.roots)
        edges = [next(found) if t.requires_grad else None for t in tensors]
        return result, tensors, tape, tuple([e if e is not None and tape.active[e[0]] else None for e in edges])

    @staticmethod
    def _form(result, tape: Tape, edges: tuple) -> losses.Form | None:
        """The form of a scalar loss; None of residuals."""
        if not isinstance(result, torch.Tensor) or result.dim():
            return None
        return losses.scalar_form(tape, edges[0][0], True, result.detach()) if edges[0] else losses.Form()

    def _replay(self, result) -> Trace | None:
        """The trace of a tape that the core reads, with what it leaves to Python; None where all is to be looked at anew."""
        read = self._walker.read(result)
        if read is None:
            return None
        replay, loss, value, residual, constants, nodes = read
        penalties = replay.penalties
        if nodes:
            with torch.no_grad():
                tape = replay.tape(nodes)
                if not replay.fill(tape, constants, self.dtype):
                    return None
                if residual is None:
                    form = replay.form(tape, constants, self.dtype, loss)
                    if form is None:
                        return None
                    residual, penalties = self._residual(form, loss), form.penalties
        structure = replay.structure
        return Trace(
            loss, value, residual, replay.squares_only, structure.tapeless, penalties, replay.program, constants, structure
        )

    def _trace(self, result, allow_sync: bool, rules: bool) -> Trace:
        tensors = list(result) if isinstance(result, (tuple, list)) else [result]
        _check_result(result, tensors)
        scalar = not isinstance(result, (tuple, list)) and result.dim() == 0
        tape = self._tape(tensors)
        found = iter(tape.structure.roots)
        positions = [next(found) if t.requires_grad else None for t in tensors]
        if not any(p is not None and tape.active[p[0]] for p in positions) and any(t.numel() for t in tensors):
            self._refuse_opaque(tape)
            raise ValueError(
                "pgdfast.LM: the closure's result does not depend on any of the optimizer's parameters; compute it from "
                "the model whose parameters were given, with gradients enabled and without detach() or .item()."
            )
        if scalar:
            try:
                form = losses.scalar_form(tape, positions[0][0], allow_sync, result.detach()) if positions[0] else losses.Form()
            except losses.UnrecognizedLoss as error:
                self._refuse_opaque(tape)
                last = losses.written(tape.name(positions[0][0]))
                raise losses.UnrecognizedLoss(
                    f"pgdfast.LM: closure returned a scalar whose last operation is {last}; {error}. {losses.RECOGNISED}"
                ) from None
            loss = result.detach()
        else:
            kept = [p if p is not None and tape.active[p[0]] else None for p in positions]
            form = losses.residual_form(tensors, kept)
            loss = None
        residual = self._residual(form, tensors[0])
        if loss is None:
            loss = 0.5 * torch.dot(residual, residual)
        value = loss.item() if allow_sync else None
        structure = tape.structure
        trace = Trace(loss, value, residual, form.squares_only, structure.tapeless, form.penalties, None, [], structure)
        trace.missing = None if rules else "one of its operations that agrees with autograd"
        try:
            if rules:
                trace.program, trace.constants = self._program(
                    tape, form, positions[0][0] if scalar and positions[0] else None, allow_sync
                )
                return trace
        except Fallback as error:
            self._refuse_opaque(tape)
            trace.missing = error.operation
        except UnsupportedStructure as error:
            trace.missing = str(error)
        refuse_checkpoints(tape, trace.missing, len(self.params))
        trace.blocks, trace.edges = form.blocks, self._edges(tape, form)
        return trace

    def _tape(self, tensors: list[torch.Tensor]) -> Tape:
        """The tape below a closure's results.

        Raises ValueError where its products or a step along it would leave something out.
        """
        results = [t for t in tensors if t.requires_grad]
        tape = self._walker.walk(results)
        for position in tape.structure.hooked:
            leaf = tape.leaf[position]
            if leaf >= 0:
                refuse_accumulation_hooks(leaf, self.params[leaf])
        for position in tape.structure.averaged:
            leaf = tape.leaf[position]
            refuse_beside_averaging(leaf, self.params[leaf])
        if tape.fresh is not None:
            refuse_hidden(tape.fresh, tape.structure.kinds, self.params)
            self._walker.remember(tape.structure)
        return tape

    def _edges(self, tape: Tape, form: losses.Form) -> list:
        """The autograd edges of each block's outputs."""
        leaves = {k: torch.autograd.graph.get_gradient_edge(p).node for k, p in enumerate(self.params)}

        def node(position):
            leaf = tape.leaf[position]
            return tape.nodes[position] if leaf < 0 else leaves[leaf]

        return [block.handles or [e and (node(e[0]), e[1]) for e in block.edges] for block in form.blocks]

    def _refuse_opaque(self, tape: Tape) -> None:
        for name, kind in zip(tape.names, tape.structure.kinds, strict=True):
            if kind.startswith(OPAQUE):
                raise CompiledTape(
                    f"pgdfast.LM: the closure's tape holds {name}, an opaque node of torch.compile; call the uncompiled "
                    "model in the closure (model._orig_mod, or the function before torch.compile)."
                )

    def _residual(self, form: losses.Form, like: torch.Tensor) -> torch.Tensor:
        parts = [plain(block.residual).reshape(-1) for block in form.blocks]
        if len(parts) == 1:   # a reshaped view or copy: contiguous unless it was one strided dimension
            part = parts[0] if parts[0].dtype is self.dtype else parts[0].to(self.dtype)
            return part.contiguous()
        if not parts:
            return torch.empty(0, dtype=self.dtype, device=like.device)
        return torch.cat([part.to(self.dtype) for part in parts])

    def _program(self, tape: Tape, form: losses.Form, root: int | None, allow_sync: bool) -> tuple[Program, list]:
        number, nodes = tape.structure.number, tape.nodes
        work, key = [], [number]
        for position, rule in self._rules(tape, form):
            values = rule.read(nodes[position])
            for value in values:
                key.append(describe(value))
            work.append((position, rule, values))
        for block in form.blocks:
            key.append(block.signature())
        key = tuple(key)
        known = self._known.get(key) if number >= 0 else None
        if known is None:
            known, constants = self._record(tape, form, work)
            if number >= 0:
                if len(self._known) >= _STRUCTURES_KEPT:
                    forgotten = self._known.pop(next(iter(self._known)))
                    if forgotten.replay is not None:
                        self._walker.detach(forgotten.replay)
                self._known[key] = known
            return known.program, constants
        if self.replays and allow_sync and known.replay is None:   # seen twice, it may well come again
            known.replay = attach(self._walker, known, tape, work, form, root)
        op = Refresh(self.dtype)
        for k, needs, _ in known.with_constants:
            _, rule, values = work[k]
            op.needs = needs
            rule.apply(op, *values)
        return known.program, op.constants + block_constants(form.blocks, known.block_needs, self.dtype)

    def _rules(self, tape: Tape, form: losses.Form) -> list:
        """(position, rule) of every node that the blocks' outputs are computed by, found once per structure and outputs."""
        outputs = tuple([block.edges for block in form.blocks])
        rules = tape.structure.rules.get(outputs)
        if rules is None:
            structure = tape.structure
            if structure.hooked:
                raise Fallback(f"the gradient hook on {tape.name(structure.hooked[0])}")
            needed = {edge[0] for edges in outputs for edge in edges if edge is not None}
            for position in reversed(structure.wanted):
                if position in needed:
                    needed.update(edge[0] for edge in tape.edges[position] if edge is not None)
            rules = [
                (position, self._rule_of(tape.nodes[position], structure, position))
                for position in structure.wanted if position in needed
            ]
            structure.rules[outputs] = rules
        return rules

    def _rule_of(self, node, structure: Structure, position: int):
        if structure.kinds[position] == CHECKPOINT:
            return self._checkpoint
        if structure.complex and any(map(any, structure.complex_at(position))):
            found = rule_for_complex(structure, position)
            if found is None:
                raise Fallback(f"complex numbers ({structure.names[position]})")
            return found
        return rule_of(node).of(structure, position)

    def _record(self, tape: Tape, form: losses.Form, work) -> tuple[Known, list]:
        program = Program(self.dtype)
        leaves = [_leaf(program, p) for p in self.params]
        slots: dict[tuple[int, int], Slot] = {}
        for position, leaf in enumerate(tape.leaf):
            if leaf >= 0:
                slots[position, 0] = leaves[leaf]
        op = Record(program, leaves)
        with_constants, block_needs = [], []
        for k, (position, rule, values) in enumerate(work):
            before = len(op.constants)
            op.start([slot_of(slots, e, tape.names) for e in tape.edges[position]], tape.shapes[position])
            rule.apply(op, *values)
            for output, slot in op.outputs().items():
                slots[position, output] = slot
            if len(op.constants) > before or any(isinstance(value, Keyed) for value in values):
                with_constants.append((k, op.needs, len(op.constants) - before))
        for block in form.blocks:
            shape = block.residual.shape
            inputs = [slot_of(slots, e, tape.names) for e in block.edges]
            if block.handles:
                inputs = [op.side_by_side(x) for x in inputs]
            elif any(isinstance(x, Pair) for x in inputs):
                raise UnsupportedStructure("a loss of complex numbers")
            op.start([op.off_parameters(x) for x in inputs], [shape])
            program.residual_shapes.append(shape)
            op.bind_output(whole(program.add_buffer(RESIDUAL, shape.numel()), shape))
            if any(op.needs):
                block.apply(op)
            block_needs.append(op.needs)
        simplify(program)
        return Known(program, tape.structure, with_constants, block_needs), op.constants


def _leaf(program: Program, p: torch.Tensor) -> Slot | Pair:
    """A parameter's slot on a buffer of its own; of a complex one every other number is a real part."""
    buffer = program.add_buffer(PARAMETER, real_size(p))
    if not p.is_complex():
        return whole(buffer, p.shape)
    view = whole(buffer, (*p.shape, 2)).view
    return Pair(Slot(buffer, view.select(-1, 0)), Slot(buffer, view.select(-1, 1)))


def _explain_freed(error: RuntimeError) -> None:
    """Raise ValueError where autograd says that the tape is gone."""
    if "already been freed" in str(error) or "second time" in str(error):
        raise ValueError(
            "pgdfast.LM: the closure's tape is gone because the closure called backward() itself; return the "
            "loss or the residuals without calling backward()."
        ) from error


def _check_result(result, tensors) -> None:
    for t in tensors:
        if not isinstance(t, torch.Tensor):
            raise ValueError(
                f"pgdfast.LM: closure returned {type(t).__name__}; it must return a scalar loss tensor, a residual tensor, "
                "or a tuple of residual tensors."
            )
        if not t.is_floating_point():
            raise ValueError(f"pgdfast.LM: closure returned a tensor of {t.dtype}; it must be a real floating-point tensor.")
    if not tensors:
        raise ValueError("pgdfast.LM: closure returned an empty tuple; it must hold at least one residual tensor.")
    if isinstance(result, (tuple, list)) and any(t.dim() == 0 for t in tensors):
        raise ValueError(
            "pgdfast.LM: closure returned a tuple with a scalar in it; a tuple must hold residual tensors of at least one "
            "dimension. Add scalar losses up and return the sum instead."
        )
