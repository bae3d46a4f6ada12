"""The linearization of a closure, in one call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, overload

from .. import kernels
from ..linear import Linearization, Linearizer, as_operations, checked_check
from .batches import Batched
from .group import chosen_group
from .linearization import Parts
from .linearizer import PartsLinearizer
from .whole import refuse_distributed


@overload
def linearize(
    closure, params, *, batches: None = None, process_group: None = None, memory: float | None = None, backend: str = "auto",
    check: str = "first",
) -> Linearization: ...


@overload
def linearize(
    closure, params, *, batches: Iterable | None = None, process_group: Any = None, memory: float | None = None,
    backend: str = "auto", check: str = "first",
) -> Linearization | Parts: ...


def linearize(
    closure, params, *, batches=None, process_group=None, memory=None, backend="auto", check="first"
) -> Linearization | Parts:
    """Linearize a closure at the current parameters.

    Args:
        closure: callable that returns a loss or residuals, as for LM.step; with batches, of a batch.
        params: tensors with requires_grad, whose concatenation is the flat parameter vector, complex ones as pairs of real
            numbers side by side.
        batches: None, or an iterable of batches, as for LM.step: the linearization is that of all their rows.
        process_group: as for LM.
        memory: as for LM.
        backend: as for LM.
        check: "first" or "every" compares products with autograd's gradient, "never" only where hooks or Functions of the
            user's take part.

    Cost: one run of the closure for each batch, and with a check three products and one backward pass.
    Raises ValueError for results that cannot be linearized and for a non-finite loss.
    """
    params = [p for p in params if p.requires_grad]
    if not params:
        raise ValueError("pgdfast.linearize: no parameter requires a gradient.")
    name, check = kernels.requested(backend), checked_check(check, "linearize")
    if name == "reference":
        raise ValueError("pgdfast.linearize: for the reference call pgdfast.reference.linearize(closure, params).")
    refuse_distributed(params, "linearize")
    group = chosen_group(process_group)
    if batches is None and group.size == 1:
        return as_operations(Linearizer(params, name, check), closure)
    return as_operations(PartsLinearizer(params, name, check, group, memory), Batched(closure, batches))
