"""The table that rules register in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..program import UnsupportedStructure


@dataclass(frozen=True, slots=True)
class Rule:
    """`apply(op, *saved)` writes the derivative with the verbs of `op`.

    `saved` names the node's `_saved_` fields that the rule reads; `read(node)` gives what the rule takes, as a tuple, its
    tensors with their entries in memory. specialize: of a walk.Structure and a position there, the rule that takes this one's
    place, or None.
    """

    apply: Callable
    saved: tuple[str, ...]
    read: Callable
    specialize: Callable | None = None

    def of(self, structure, position: int) -> Rule:
        """The rule for the node at a position: this one, or one in its place."""
        return self.specialize and self.specialize(structure, position) or self


RULES: dict[str, Rule] = {}


def rule(*nodes: str, saved: str = "", shape: bool = False, own: bool = False, used: bool = False,
         sparse: bool = False):
    """Register a rule for autograd nodes of these names.

    After the saved fields come, with `shape`, the output's shape and device; with `own`, the node's `OwnBackward`; with `used`,
    the numbers of the outputs that something reads. sparse: takes matrices in sparse layouts, as `sparse_rows`.
    """

    def register(apply: Callable) -> Callable:
        names = tuple("_saved_" + name for name in saved.split())
        read = reader(names, sparse)
        read = _with_shape(read) if shape else _with_backward(read) if own else read
        for node in nodes:
            RULES[node] = Rule(apply, names, read, _for_used(apply, names, read) if used else None)
        return apply

    return register


def _for_used(apply: Callable, names: tuple[str, ...], read: Callable) -> Callable:
    def specialize(structure, position: int) -> Rule:
        outputs = structure.used(position)
        return Rule(lambda op, *values: apply(op, *values, outputs), names, read)

    return specialize


class Keyed:
    """What a rule computed when it read a node; `key` is the part that belongs to the structure."""

    __slots__ = ("key", "value")

    def __init__(self, value, key):
        self.value, self.key = value, key


class OwnBackward:
    """A node's own backward, for rules that read coefficients off it. It tells nothing of the structure."""

    __slots__ = ("_node", "outputs")

    def __init__(self, node):
        self._node = node
        self.outputs = node._input_metadata

    def ones(self, out: int = 0) -> torch.Tensor:
        """A gradient of ones for an output."""
        like = self.outputs[out]
        return torch.ones(tuple(like.shape), dtype=like.dtype, device=like.device)

    def __call__(self, gradient: torch.Tensor, out: int = 0) -> list:
        """The gradients of all inputs, None where there is none, from that of one output.

        They have the shapes that inputs are broadcast to: autograd's engine, not the node, sums over broadcast dimensions.
        """
        gradients = [None] * len(self.outputs)
        gradients[out] = gradient
        with torch.no_grad():
            found = self._node(*gradients)
        found = found if isinstance(found, tuple) else (found,)
        return [None if g is None else plain(g) for g in found]


def _with_backward(read: Callable) -> Callable:
    return lambda node: (*read(node), OwnBackward(node))


def _with_shape(read: Callable) -> Callable:
    def read_all(node) -> tuple:
        metadata = node._input_metadata[0]
        return (*read(node), tuple(metadata.shape), metadata.device)

    return read_all


def reader(names: tuple[str, ...], sparse: bool = False) -> Callable:
    """A function from a node to its saved fields of these names; sparse: see `rule`."""
    if not sparse:
        return lambda node: tuple([plain(getattr(node, name)) for name in names])

    def read(node) -> tuple:
        values = [getattr(node, name) for name in names]
        return tuple([sparse_rows(v) if is_sparse(v) else plain(v) for v in values])

    return read


def is_sparse(value) -> bool:
    """Say whether a value is a tensor in one of the sparse layouts."""
    return isinstance(value, torch.Tensor) and value.layout is not torch.strided


def sparse_rows(matrix: torch.Tensor) -> Keyed:
    """Per row of a sparse matrix the numbers of its columns, -1 behind the last, and its entries: both (rows, K).

    K is the next power of two, so that another matrix seldom makes another structure.
    """
    matrix = (matrix if matrix.layout is torch.sparse_coo else matrix.to_sparse()).coalesce()
    (row, column), entries = matrix.indices(), matrix.values()
    counts = torch.bincount(row, minlength=matrix.shape[0])
    most = 1 << (max(int(counts.max()) if len(counts) else 0, 1) - 1).bit_length()
    if most * matrix.shape[0] > 64 * max(len(entries), matrix.shape[0]):
        raise UnsupportedStructure("a sparse matrix with a few rows much longer than the others")
    rank = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    columns = torch.full((matrix.shape[0], most), -1, dtype=torch.int64, device=row.device)
    padded = entries.new_zeros(matrix.shape[0], most)
    columns[row, rank], padded[row, rank] = column, entries
    return Keyed((columns, padded), (matrix.shape[0], most))


def is_lazy(value) -> bool:
    """Say whether a tensor's memory does not hold its entries: negated or conjugated when they are read, or zero without."""
    return isinstance(value, torch.Tensor) and (value.is_neg() or value.is_conj() or value._is_zerotensor())


def plain(value):
    """A saved value as it is; a tensor that `is_lazy` with memory of its own."""
    if not is_lazy(value):
        if is_sparse(value):
            raise UnsupportedStructure("a sparse tensor")
        return value
    if value._is_zerotensor():
        return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    return value.resolve_conj().resolve_neg()


def reduced(dims, count: int) -> list[int]:
    """The dimensions that a reduction of a tensor with `count` of them goes over, as autograd stored them: none means all.

    A tensor without dimensions may be given one, 0 or -1, and has none to go over.
    """
    return sorted(signed(d) % count for d in dims if count) or list(range(count))


def signed(dim: int) -> int:
    """A dimension that autograd stored as an unsigned 64-bit number, as the signed one it was."""
    return dim - (1 << 64) if dim >= 1 << 63 else dim
