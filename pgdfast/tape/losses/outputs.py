"""What a block's outputs were put together from, as far as that tells which of their dimensions is that of rows.

seen: takes in the positions of the nodes that were looked at.
"""

from __future__ import annotations

from ..rules import RULES
from ..rules.table import signed

VIEWS = {
    "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0",
    *(f"SqueezeBackward{k}" for k in range(6)),
}
_PUT_TOGETHER = {"CatBackward0", "StackBackward0", "TBackward0", "SelectBackward0", "SliceBackward0"}
_NOT_ELEMENTWISE = {"TrilBackward0", "TriuBackward0", "GluBackward0"}
_ALSO_ELEMENTWISE = {"LogaddexpBackward0", "XlogyBackward0", "XlogyBackward1", "XlogyBackward2", "ConjBackward0"}


def origin(tape, edge, shape, seen: set[int]) -> tuple:
    """(shape, dimension of rows) of outputs before they were flattened, or stacked, where rows stand apart."""
    dim = 0
    while edge and tape.leaf[edge[0]] < 0 and (len(shape) == 1 or shape[:1] == (1,)):
        seen.add(edge[0])
        kind, inputs = tape.kind(edge[0]), [e for e in tape.edges[edge[0]] if e]
        same = len(inputs) == 1 and is_elementwise(kind) and tape.shape(*inputs[0]) == shape
        if not same and kind not in VIEWS:
            break
        edge, shape = inputs[0], tape.shape(*inputs[0])
    if edge and tape.leaf[edge[0]] < 0 and len(shape) > 1:
        while tape.leaf[edge[0]] < 0 and tape.kind(edge[0]) != "StackBackward0":
            seen.add(edge[0])
            inputs = [e for e in tape.edges[edge[0]] if e]
            if len(inputs) != 1 or not is_elementwise(tape.kind(edge[0])) or tape.shape(*inputs[0]) != shape:
                return shape, 0
            edge = inputs[0]
        seen.add(edge[0])
        if tape.leaf[edge[0]] < 0 and signed(tape.nodes[edge[0]]._saved_dim) % len(shape) == 0:
            dim = 1
    return shape, dim


def lengths(tape, edge, seen: set[int], most: int = 30) -> list[int]:
    """First dimensions of what outputs were put together from."""
    stack, found = [edge] if edge else [], []
    while stack and most:
        edge, most = stack.pop(), most - 1
        if tape.leaf[edge[0]] >= 0:
            continue
        seen.add(edge[0])
        kind = tape.kind(edge[0])
        if kind in VIEWS or kind in _PUT_TOGETHER or is_elementwise(kind):
            stack += [e for e in tape.edges[edge[0]] if e]
            found += [tape.shape(*e)[0] for e in stack if tape.shape(*e)]
    return found


def transposed(tape, edge, seen: set[int]) -> int:
    """The dimension that outputs have for the first one of what they were transposed from; 0 where they were not."""
    while tape.leaf[edge[0]] < 0:
        seen.add(edge[0])
        kind, node, inputs = tape.kind(edge[0]), tape.nodes[edge[0]], [e for e in tape.edges[edge[0]] if e]
        if kind == "TBackward0":
            return len(tape.shape(*edge)) - 1
        if kind == "PermuteBackward0":
            return [signed(d) % len(tape.shape(*edge)) for d in node._saved_dims].index(0)
        if kind == "TransposeBackward0":
            pair = [signed(d) % len(tape.shape(*edge)) for d in (node._saved_dim0, node._saved_dim1)]
            return max(pair) if 0 in pair else 0
        if len(inputs) != 1 or not is_elementwise(kind) or tape.shape(*inputs[0]) != tape.shape(*edge):
            return 0
        edge = inputs[0]
    return 0


def is_elementwise(kind: str) -> bool:
    """Whether each entry of what a node puts out depends on one entry of each input."""
    rule = RULES.get(kind)
    known = rule is not None and rule.apply.__module__.endswith(".elementwise") and kind not in _NOT_ELEMENTWISE
    return known or kind in _ALSO_ELEMENTWISE


def is_scaling(tape, position: int) -> bool:
    """Whether a node is a product with, or a quotient by, a constant."""
    kind, edges = tape.kind(position), tape.edges[position]
    return kind in ("MulBackward0", "DivBackward0") and not all(edges) and bool(kind[0] == "M" or edges[0])
