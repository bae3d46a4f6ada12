"""The linearization of a closure, in one call."""

from __future__ import annotations

from .. import kernels
from .adjoint import checked
from .compiled import as_operations
from .linearization import Linearization, Linearizer


def linearize(closure, params, *, backend: str = "auto", check: str = "first") -> Linearization:
    """Linearize a closure at the current parameters.

    closure: callable that returns a loss or residuals, as for LM.step. params: tensors with requires_grad, whose
    concatenation is the flat parameter vector, complex ones as pairs of real numbers side by side. backend:
    as for LM. check: "first" or "every" compares products with autograd's gradient, "never" only where hooks or Functions of
    the user's take part. Cost: one run of the closure, and with a check three products and one backward pass.
    Raises ValueError for results that cannot be linearized and for a non-finite loss.
    """
    params = [p for p in params if p.requires_grad]
    if not params:
        raise ValueError("pgdfast.linearize: no parameter requires a gradient.")
    name = kernels.requested(backend)
    if name == "reference":
        raise ValueError("pgdfast.linearize: for the reference call pgdfast.reference.linearize(closure, params).")
    linearizer = Linearizer(params, name, checked(check, "linearize"))
    return as_operations(linearizer, closure)
