"""torch.utils.checkpoint with use_reentrant=True: its function runs once more, with a tape that is read in the node's place.

Parameters that the function uses have no edge from the node; the inner tape shows them.
"""

from __future__ import annotations

import contextlib

import torch

from .hidden import refuse_hidden
from .ops import slot_of
from .rules.table import Keyed, Rule
from .walk import Fallback, Structure, Walker, describe


def run_again(node) -> tuple[list, tuple]:
    """(detached inputs that are tensors, outputs with their tape) of a checkpoint's function, as its backward runs it."""
    inputs, tensors = list(node.inputs), node.saved_tensors
    detached = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
    for place, t in zip(node.tensor_indices, detached, strict=True):
        inputs[place] = t
    keeps, device = node.preserve_rng_state, node.device_type
    on_device = keeps and node.had_device_in_fwd
    devices = node.fwd_devices if on_device else []
    with torch.random.fork_rng(devices=devices, enabled=keeps, device_type=device):
        if keeps:
            torch.set_rng_state(node.fwd_cpu_state)
        if on_device:
            torch.utils.checkpoint.set_device_states(node.fwd_devices, node.fwd_device_states, device_type=device)
        casts = contextlib.nullcontext()
        if torch.amp.is_autocast_available(device):
            casts = torch.amp.autocast(device_type=device, **node.device_autocast_kwargs)
        with torch.enable_grad(), casts, torch.amp.autocast("cpu", **node.cpu_autocast_kwargs):
            outputs = node.run_function(*inputs)
    return detached, outputs if isinstance(outputs, tuple) else (outputs,)


class _Inner:
    """The tape of a checkpoint's function, and (position, rule, saved values) of its active nodes, inputs before users.

    roots: per output of the function (position, output), None without a tape. Leaves are numbered as the parameters are, the
    function's inputs behind them.
    """

    __slots__ = ("roots", "structure", "work")

    def __init__(self, structure: Structure, work: list, roots: list):
        self.structure, self.work, self.roots = structure, work, roots

    def key(self) -> tuple:
        """What two of them share that have the same program."""
        s = self.structure
        values = [tuple([describe(v) for v in values]) for _, _, values in self.work]
        shapes = [tuple(shapes) for shapes in s.shapes]
        return tuple(s.kinds), tuple(s.edges), tuple(s.leaf), tuple(shapes), tuple(self.roots), tuple(values)


def checkpoint_rule(params: list[torch.Tensor], rule_of) -> Rule:
    """The rule of a checkpoint's node, whose function may use these parameters. Cost: one more run of the function.

    rule_of: gives the rule of a node, of its structure and position.
    """

    def read(node) -> tuple:
        detached, outputs = run_again(node)
        taped = [t if isinstance(t, torch.Tensor) and t.requires_grad else None for t in outputs]
        tape = Walker([*params, *detached]).walk([t for t in taped if t is not None])
        refuse_hidden(tape.fresh, tape.structure.kinds, params)
        if tape.structure.hooked:
            raise Fallback(f"the gradient hook on {tape.name(tape.structure.hooked[0])}")
        following = iter(tape.structure.roots)
        work = [(k, rule_of(inside, tape.structure, k), inside) for k, inside in tape.nodes.items()]
        work = [(k, rule, rule.read(inside)) for k, rule, inside in work]
        inner = _Inner(tape.structure, work, [None if t is None else next(following) for t in taped])
        return (Keyed(inner, inner.key()),)

    def apply(op, found: Keyed):
        inner: _Inner = found.value
        structure = inner.structure
        with op.nested() as outer:
            alive = {
                (k, 0): outer(leaf - len(params)) if leaf >= len(params) else op.parameter(leaf)
                for k, leaf in enumerate(structure.leaf) if leaf >= 0
            }
            ran = {k for k, _ in alive}   # what other nodes put out depends on no input that depends on a parameter

            def slot(edge):
                return slot_of(alive, edge, structure.names) if edge is not None and edge[0] in ran else None

            for k, rule, values in inner.work:
                inputs = [slot(e) for e in structure.edges[k]]
                if any(x is not None for x in inputs):
                    ran.add(k)
                    op.start(inputs, structure.shapes[k])
                    rule.apply(op, *values)
                    alive.update({(k, output): x for output, x in op.outputs().items()})
        for output, root in enumerate(inner.roots):
            op.finish(output, slot(root))

    return Rule(apply, (), read)
