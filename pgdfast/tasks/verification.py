"""What `pgdfast verify` compares on each task: a problem of its kind, small enough for explicit Jacobians."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Problem:
    """A closure over a model's parameters.

    Attributes:
        model: its parameters are the optimizer's.
        closure: what LM.step takes; full batch.
        options: of pgdfast.LM besides solver and backend (damping, lr, ...); the damping rule is "constant".
        solvers: those that apply, of "dual", "primal", "cg", "eigh".
        size: one line on what was made smaller than the task's own, and on the numbers of residuals and parameters.

    """

    model: torch.nn.Module
    closure: Callable
    options: dict
    solvers: tuple[str, ...]
    size: str
