"""Parameters that a node hides: its backward reaches them by itself, and no edge of the tape shows it.

A torch.autograd.Function may run a module, and differentiate it, in its backward: torch.utils.checkpoint with
use_reentrant=True does. Steps that read the tape alone would never move those parameters.
"""

from __future__ import annotations

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from .walk import Tape

_CHECKPOINT = "torch.utils.checkpoint.CheckpointFunctionBackward"
_OPEN = ("pgdfast.", "torch.nn.modules._functions.BackwardHookFunction")   # Functions that hide nothing


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
            "train a network of its own. Call the bare module (model.module) on all data in one process."
        )


def refuse_hidden(tape: Tape, results: list[torch.Tensor], params: list[torch.Tensor]) -> None:
    """Raise ValueError where a node of a fresh tape hides parameters.

    Cost: nothing without Functions written in Python on the tape; otherwise one backward pass, which tells by the `.grad` of
    the parameters, left as they were, what the Functions fill by themselves.
    """
    structure = tape.structure
    reached = set(structure.leaf)
    for position, kind in enumerate(structure.kinds):
        if kind == _CHECKPOINT and (structure.active[position] or any(k not in reached for k in range(len(params)))):
            raise ValueError(
                "pgdfast.LM: the closure's tape holds CheckpointFunctionBackward: torch.utils.checkpoint with "
                "use_reentrant=True hides the parameters inside from the tape, and they would never move; pass "
                "use_reentrant=False."
            )
    foreign = [
        position for position, (node, kind) in enumerate(zip(tape.fresh, structure.kinds, strict=True))
        if isinstance(node, BackwardCFunction) and not kind.startswith(_OPEN)
    ]
    if not foreign:
        return
    filled = _filled_by([tape.fresh[position] for position in foreign], results, params)
    if filled:
        names = ", ".join(dict.fromkeys(structure.names[position] for position in foreign))
        raise ValueError(
            f"pgdfast.LM: {len(filled)} of the optimizer's parameters get their gradient inside the backward of a "
            f"torch.autograd.Function ({names}), where the tape does not show them, and would never move; pass them to its "
            "apply(), or run the module outside of it."
        )


def _filled_by(nodes: list, results: list[torch.Tensor], params: list[torch.Tensor]) -> list[int]:
    """Numbers of the parameters whose `.grad` the backward of these nodes fills; all are put back."""
    inputs = [GradientEdge(*edge) for node in nodes for edge in node.next_functions if edge[0] is not None]
    before = [p.grad for p in params]
    try:
        for p in params:
            p.grad = None
        torch.autograd.grad(results, inputs, [torch.ones_like(t) for t in results], retain_graph=True, allow_unused=True)
        return [k for k, p in enumerate(params) if p.grad is not None]
    except MemoryError:
        raise
    except Exception:   # no backward, so nothing hidden in it; where a product needs it, it will be raised there
        return []
    finally:
        for p, grad in zip(params, before, strict=True):
            p.grad = grad
