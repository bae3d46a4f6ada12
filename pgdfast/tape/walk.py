"""From the result of a closure to its tape: nodes in forward order, with what each contributes to the structure."""

from __future__ import annotations

import torch

from .rules import RULES

_RULE_OF_TYPE: dict[type, object] = {}


class Fallback(Exception):
    """The tape holds an operation without a rule; carries its name."""

    def __init__(self, operation: str):
        super().__init__(operation)
        self.operation = operation


class Tape:
    """The part of an autograd graph between leaf parameters and some roots.

    nodes: all nodes below the roots, inputs before users; index: node -> position; active: does a parameter reach it;
    leaf: number of the parameter an AccumulateGrad node belongs to, else -1; edges: per node, (position, output) of each
    input that is active, else None.
    """

    __slots__ = ("active", "edges", "index", "leaf", "nodes")

    def __init__(self, roots, parameter_number: dict[int, int]):
        order, index, following = [], {}, {}
        stack = list(roots)
        while stack:
            node = stack[-1]
            if node in index:
                stack.pop()
                continue
            nexts = following.get(node)
            if nexts is None:
                nexts = following[node] = node.next_functions
                pending = [child for child, _ in nexts if child is not None and child not in index]
                if pending:
                    stack.extend(pending)
                    continue
            index[node] = len(order)
            order.append(node)
            stack.pop()
        self.nodes, self.index = order, index
        self.leaf, self.active, self.edges = [], [], []
        for node in order:
            variable = getattr(node, "variable", None) if not following[node] else None
            number = -1 if variable is None else parameter_number.get(id(variable), -1)
            edges = []
            reached = number >= 0
            for child, output in following[node]:
                position = -1 if child is None else index[child]
                if position >= 0 and self.active[position]:
                    edges.append((position, output))
                    reached = True
                else:
                    edges.append(None)
            self.leaf.append(number)
            self.active.append(reached)
            self.edges.append(tuple(edges))

    def shape(self, position: int, output: int = 0) -> torch.Size:
        """Shape of an output of a node."""
        return torch.Size(self.nodes[position]._input_metadata[output].shape)

    def name(self, position: int) -> str:
        """The node's type, as autograd prints it."""
        return type(self.nodes[position]).__name__


def rule_of(node):
    """The rule of a node.

    Raises: Fallback naming the operation when there is none.
    """
    kind = type(node)
    found = _RULE_OF_TYPE.get(kind)
    if found is None:
        found = RULES.get(kind.__name__)
        if found is None:
            raise Fallback(kind.__name__)
        _RULE_OF_TYPE[kind] = found
    return found


def describe(value):
    """A saved field's part of the structure: a tensor's layout, anything else itself."""
    if isinstance(value, torch.Tensor):
        return (value.shape, value.stride())
    return value
