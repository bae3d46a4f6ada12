"""The table that rules register in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter


@dataclass(frozen=True, slots=True)
class Rule:
    """`apply(op, *saved)` writes the derivative with the verbs of `op`.

    `saved` names the node's `_saved_` fields that the rule reads; `read(node)` gives what the rule takes, as a tuple.
    """

    apply: Callable
    saved: tuple[str, ...]
    read: Callable


RULES: dict[str, Rule] = {}


def rule(*nodes: str, saved: str = "", shape: bool = False):
    """Register a rule for autograd nodes of these names; with `shape` the output's shape and device follow the saved fields."""

    def register(apply: Callable) -> Callable:
        names = tuple("_saved_" + name for name in saved.split())
        read = _reader(names)
        for node in nodes:
            RULES[node] = Rule(apply, names, _with_shape(read) if shape else read)
        return apply

    return register


def _with_shape(read: Callable) -> Callable:
    def read_all(node) -> tuple:
        metadata = node._input_metadata[0]
        return (*read(node), tuple(metadata.shape), metadata.device)

    return read_all


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
