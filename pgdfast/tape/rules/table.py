"""The table that rules register in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter


@dataclass(frozen=True, slots=True)
class Rule:
    """`apply(op, *saved)` writes the derivative with the verbs of `op`.

    `saved` names the node's `_saved_` fields that the rule reads; `read(node)` gives them as a tuple.
    """

    apply: Callable
    saved: tuple[str, ...]
    read: Callable


RULES: dict[str, Rule] = {}


def rule(*nodes: str, saved: str = ""):
    """Register a rule for autograd nodes of these names."""

    def register(apply: Callable) -> Callable:
        names = tuple("_saved_" + name for name in saved.split())
        for node in nodes:
            RULES[node] = Rule(apply, names, _reader(names))
        return apply

    return register


def _reader(names: tuple[str, ...]) -> Callable:
    if len(names) > 1:
        return attrgetter(*names)
    if names:
        get = attrgetter(names[0])
        return lambda node: (get(node),)
    return lambda node: ()


def signed(dim: int) -> int:
    """A dimension that autograd stored as an unsigned 64-bit number, as the signed one it was."""
    return dim - (1 << 64) if dim >= 1 << 63 else dim
