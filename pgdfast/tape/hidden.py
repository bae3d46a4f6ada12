"""Parameters that a node hides: its backward reaches them by itself, and no edge of the tape shows it.

A torch.autograd.Function may run a module, and differentiate it, in its backward: torch.utils.checkpoint with
use_reentrant=True does. Steps that read the tape alone would never move those parameters.
"""

from __future__ import annotations

import torch
from torch.autograd.function import BackwardCFunction

from .walk import CHECKPOINT, Tape

_OPEN = (   # Functions that hide nothing from rules
    "pgdfast.", "torch.nn.modules._functions.BackwardHookFunction", "torch.nn.parallel.distributed._DDPSink", CHECKPOINT,
)


def refuse_accumulation_hooks(number: int, p: torch.Tensor) -> None:
    """Raise ValueError for a parameter with hooks, where they are not those of the tensor: no others run without .grad."""
    what = f"pgdfast.LM: parameter {number}, of shape {tuple(p.shape)},"
    if getattr(p, "_post_accumulate_grad_hooks", None):
        raise ValueError(
            f"{what} has a post-accumulate-grad hook, which would never run, since no .grad is filled; remove it "
            "(handle.remove())."
        )
    if not p._backward_hooks:
        raise ValueError(
            f"{what} has a hook at the node that accumulates its .grad, which would never run, since none is filled. "
            "DistributedDataParallel and FSDP average gradients over processes by such hooks: without them every process would "
            "train a network of its own. Give LM the process group (process_group=torch.distributed.group.WORLD), or call the "
            "bare module (model.module) on all data in one process."
        )


def refuse_beside_averaging(number: int, p: torch.Tensor) -> None:
    """Raise ValueError for hooks of the user's at a parameter whose node for .grad has hooks that are not theirs."""
    if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
        raise ValueError(
            f"pgdfast.LM: parameter {number}, of shape {tuple(p.shape)}, has a hook beside those of DistributedDataParallel, "
            "which a step in a process group does not run; call the bare module (model.module) in the closure, or remove it."
        )


def refuse_hidden(nodes: list, kinds: list[str], params: list[torch.Tensor]) -> None:
    """Raise ValueError where a node of a fresh tape hides parameters. kinds: as walk.kind_of gives them.

    Cost: nothing without Functions written in Python on the tape; otherwise one backward of each, which tells by the `.grad`
    of the parameters, left as they were, what the Functions fill by themselves.
    """
    foreign = [
        node for node, kind in zip(nodes, kinds, strict=True)
        if isinstance(node, BackwardCFunction) and not kind.startswith(_OPEN)
    ]
    if not foreign:
        return
    filled = _filled_by(foreign, params)
    if filled:
        names = ", ".join(dict.fromkeys(node.name() for node in foreign))
        raise ValueError(
            f"pgdfast.LM: {len(filled)} of the optimizer's parameters get their gradient inside the backward of a "
            f"torch.autograd.Function ({names}), where the tape does not show them, and would never move; pass them to its "
            "apply(), or run the module outside of it."
        )


def refuse_checkpoints(tape: Tape, missing: str, num_parameters: int) -> None:
    """Raise ValueError for a checkpoint on a tape without a program: autograd's products leave out the parameters inside."""
    structure = tape.structure
    hides = any(k == CHECKPOINT and any(edges) for k, edges in zip(structure.kinds, structure.edges, strict=True))
    if hides or (CHECKPOINT in structure.kinds and not set(range(num_parameters)) <= set(structure.leaf)):
        raise ValueError(
            "pgdfast.LM: the closure's tape holds CheckpointFunctionBackward: torch.utils.checkpoint with use_reentrant=True "
            f"hides the parameters inside from the tape, and there is no tape rule for {missing}; pass use_reentrant=False."
        )


def _filled_by(nodes: list, params: list[torch.Tensor]) -> list[int]:
    """Numbers of the parameters whose `.grad` the backward of these nodes fills; all are put back."""
    before = [p.grad for p in params]
    try:
        for p in params:
            p.grad = None
        for node in nodes:
            ones = [torch.ones(tuple(m.shape), dtype=m.dtype, device=m.device) for m in node._input_metadata]
            try:
                with torch.no_grad():
                    node.apply(*ones)
            except MemoryError:
                raise
            except Exception:   # noqa: BLE001 - no backward, so nothing hidden in it; a product that needs it will raise it
                continue
        return [k for k, p in enumerate(params) if p.grad is not None]
    finally:
        for p, grad in zip(params, before, strict=True):
            p.grad = grad
