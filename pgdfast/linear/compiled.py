"""Closures with compiled parts, run operation by operation: torch.compile and torch.jit leave one opaque node for many."""

from __future__ import annotations

import warnings

import torch

from ..tape import CompiledTape
from .announce import depth_of_caller

_met = False   # has there been a closure with a part of torch.compile's?


def as_operations(run, *arguments):
    """run(*arguments), which runs a closure and reads its tape, with what is compiled running as the operations it is made of.

    torch.jit is told so in any case, which serves what it has not yet compiled; torch.compile, at whose first node `run` runs
    once more, from then on.
    """
    global _met
    # As torch.jit.optimized_execution(False) does, whose context manager takes more time than the rest of this.
    optimizes = torch._C._get_graph_executor_optimize()
    torch._C._set_graph_executor_optimize(False)
    try:
        if not _met:
            return run(*arguments)
        return _in_eager_mode(run, *arguments)
    except CompiledTape:
        if _met:
            raise
        _met = True
        warnings.warn(
            "pgdfast: a part of the closure is compiled by torch.compile, whose tape is opaque; from now on LM runs the "
            "original (torch.compiler.set_stance('force_eager')), and it ran this closure once more.",
            stacklevel=depth_of_caller(),
        )
        return _in_eager_mode(run, *arguments)
    finally:
        torch._C._set_graph_executor_optimize(optimizes)


def _in_eager_mode(run, *arguments):
    with torch.compiler.set_stance("force_eager"):
        return run(*arguments)
