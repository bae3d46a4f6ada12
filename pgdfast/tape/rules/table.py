"""The table that rules register in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Rule:
    """`apply(op, *saved)` writes the derivative with the verbs of `op`.

    `saved` names the node's `_saved_` fields that the rule reads; `read(node)` gives what the rule takes, as a tuple, its
    tensors with their entries in memory.
    """

    apply: Callable
    saved: tuple[str, ...]
    read: Callable


RULES: dict[str, Rule] = {}


def rule(*nodes: str, saved: str = "", shape: bool = False, read: Callable | None = None):
    """Register a rule for autograd nodes of these names; with `shape` the output's shape and device follow the saved fields.

    read: makes a reader of the names of saved fields, `reader` unless given.
    """

    def register(apply: Callable) -> Callable:
        names = tuple("_saved_" + name for name in saved.split())
        reads = (read or reader)(names)
        for node in nodes:
            RULES[node] = Rule(apply, names, _with_shape(reads) if shape else reads)
        return apply

    return register


class Keyed:
    """What a rule computed when it read a node; `key` is the part that belongs to the structure."""

    __slots__ = ("key", "value")

    def __init__(self, value, key):
        self.value, self.key = value, key

    def __eq__(self, other) -> bool:
        return type(other) is Keyed and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def _with_shape(read: Callable) -> Callable:
    def read_all(node) -> tuple:
        metadata = node._input_metadata[0]
        return (*read(node), tuple(metadata.shape), metadata.device)

    return read_all


def reader(names: tuple[str, ...]) -> Callable:
    """A function from a node to its saved fields of these names."""
    return lambda node: tuple([plain(getattr(node, name)) for name in names])


def is_lazy(value) -> bool:
    """Say whether a tensor's memory does not hold its entries: negated when they are read, zero without memory, or sparse."""
    return isinstance(value, torch.Tensor) and (
        value.is_neg() or value._is_zerotensor() or value.layout is not torch.strided
    )


def plain(value):
    """A saved value as it is; a tensor that `is_lazy` with memory of its own."""
    if not is_lazy(value):
        return value
    if value.layout is not torch.strided:
        return value.to_dense()
    if value._is_zerotensor():
        return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    return value.resolve_neg()


def reduced(dims, count: int) -> list[int]:
    """The dimensions that a reduction of a tensor with `count` of them goes over, as autograd stored them: none means all.

    A tensor without dimensions may be given one, 0 or -1, and has none to go over.
    """
    return sorted(signed(d) % count for d in dims if count) or list(range(count))


def signed(dim: int) -> int:
    """A dimension that autograd stored as an unsigned 64-bit number, as the signed one it was."""
    return dim - (1 << 64) if dim >= 1 << 63 else dim
