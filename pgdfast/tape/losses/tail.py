"""The end of a tape above a cut: one quantity that all of a term of the loss depends on, and the term's derivatives there.

Autograd differentiates the tail twice, whatever its operations are. What kind of matrix the second derivative is, is found by
products with random vectors: these tell a matrix that is not of the supposed form with certainty, but for rounding.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch.autograd.graph import GradientEdge

from ..rules.table import plain
from ..walk import Tape

# What autograd says where it cannot differentiate, or not twice.
UNDIFFERENTIABLE = re.compile("derivative for .* is not implemented|differentiate twice|not differentiable|double backward|"
                              "does not require grad|not have been used in the graph")
_LONGEST = 200   # operations of a loss that are looked through for a cut
# Operations that fold a quantity at 0: where they are applied, losses of its size have their centre.
FOLDS = {
    "AbsBackward0", "CoshBackward0", "MaximumBackward0", "MinimumBackward0", "ReluBackward0", "LeakyReluBackward0",
}
LINKS = {   # operations that turn a model's output into probabilities, or their logarithms: losses of those are of the output
    "SigmoidBackward0", "SoftmaxBackward0", "LogSoftmaxBackward0", "LogsumexpBackward0", "LogSigmoidBackward0",
    "SoftplusBackward0", "ExpBackward0",
}
REDUCTIONS = {
    "SumBackward0", "SumBackward1", "MeanBackward0", "MeanBackward1", "NansumBackward0", "MseLossBackward0",
    "NllLossBackward0", "NllLoss2DBackward0", "LinalgVectorNormBackward0", "DotBackward0", "VarBackward0", "DistBackward0",
    "BinaryCrossEntropyWithLogitsBackward0", "HuberLossBackward0", "SmoothL1LossBackward0", "BinaryCrossEntropyBackward0",
    "SoftMarginLossBackward0", "StdBackward0",
}


@dataclass(slots=True)
class Cut:
    """A quantity that all of a term depends on: its edge; the nodes above it, and those of them that no cut above it has."""

    edge: tuple[int, int]
    region: tuple[int, ...]
    new: tuple[int, ...]
    users: tuple[tuple[int, int], ...]   # (node, number of its input)


def cuts(tape: Tape, edge) -> list[Cut]:
    """The cuts of the term at an edge, from the loss down; what several parameters reach by different ways has none."""
    found, frontier, users, region, before = [], {edge}, {}, [], 0
    while len(region) < _LONGEST:
        position = max(frontier)[0]
        if tape.leaf[position] >= 0 or tape.name(position).startswith("CompiledFunction"):
            break
        frontier -= {e for e in frontier if e[0] == position}
        region.append(position)
        for k, below in enumerate(tape.edges[position]):
            if below is not None:
                frontier.add(below)
                users.setdefault(below, []).append((position, k))
        if len(frontier) == 1:
            (only,) = frontier
            found.append(Cut(only, tuple(region), tuple(region[before:]), tuple(users[only])))
            before = len(region)
        elif any(tape.leaf[p] >= 0 for p, _ in frontier):
            break
    return found


class Tail:
    """The derivatives of <weight, a node's output> with respect to a cut below it."""

    def __init__(self, tape: Tape, edge, weight: torch.Tensor, cut: Cut):
        self.tape, self.cut = tape, cut
        user, k = cut.users[0]
        self._input = GradientEdge(*tape.nodes[user].next_functions[k])
        with torch.enable_grad():
            output = GradientEdge(tape.nodes[edge[0]], edge[1])
            (self._gradient,) = torch.autograd.grad([output], [self._input], [weight], create_graph=True)
        self.gradient = plain(self._gradient.detach())

    def product(self, v: torch.Tensor, batched: bool = False) -> torch.Tensor:
        """The second derivative times v, or times each of several along the first dimension."""
        if not self._gradient.requires_grad:
            return torch.zeros_like(v)
        (found,) = torch.autograd.grad(
            [self._gradient], [self._input], [v], retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
        return torch.zeros_like(v) if found is None else plain(found.detach())

    def probe(self, seed: int = 1) -> torch.Tensor:
        """Random numbers of the cut's shape, the same at every step."""
        generator = torch.Generator().manual_seed(seed)
        g = self.gradient
        return torch.randn(g.shape, generator=generator, dtype=torch.float64).to(g)

    def centre(self) -> torch.Tensor | None:
        """How far the cut's quantity is from where the operations right above it fold it, or None where that is not saved."""
        tape = self.tape
        for position in self.cut.new:
            if tape.kind(position) in ("MaximumBackward0", "MinimumBackward0"):
                node = tape.nodes[position]
                slopes = [self._slope(position, k) for k in (0, 1)]
                gap = plain(node._saved_self).detach() - plain(node._saved_other).detach()
                slope = slopes[0] - slopes[1]
                return torch.where(slope == 0, 0.0, gap / slope) if gap.shape == slope.shape else None
        value = self.value()
        if value is not None:
            return value
        for position in self.cut.new:   # each has saved one side of what it folds
            if tape.kind(position) == "ReluBackward0":
                found, slope = plain(tape.nodes[position]._saved_result).detach(), self._slope(position, 0)
                side = torch.where(slope == 0, 0.0, found / slope)
                value = side if value is None else value + side
        return value

    def value(self) -> torch.Tensor | None:
        """The quantity itself, where one of its users has saved it."""
        tape, shape = self.tape, self.gradient.shape
        for position, k in self.cut.users:
            node = tape.nodes[position]
            found = getattr(node, "_saved_self" if k == 0 else "_saved_other", None)
            if isinstance(found, torch.Tensor) and found.shape == shape:
                return plain(found).detach()
        if tape.leaf[self.cut.edge[0]] < 0:
            found = getattr(tape.nodes[self.cut.edge[0]], "_saved_result", None)
            if isinstance(found, torch.Tensor) and found.shape == shape:
                return plain(found).detach()
        return None

    def _slope(self, position: int, k: int) -> torch.Tensor:
        """The derivative of an input of a node of the tail with respect to the cut, elementwise."""
        tape = self.tape
        if tape.edges[position][k] is None:
            return torch.zeros_like(self.gradient)
        if tape.edges[position][k] == self.cut.edge:
            return torch.ones_like(self.gradient)
        edge = GradientEdge(*tape.nodes[position].next_functions[k])
        ones = torch.ones(tape.shape(*tape.edges[position][k]), dtype=self.gradient.dtype, device=self.gradient.device)
        (found,) = torch.autograd.grad([edge], [self._input], [ones], retain_graph=True, allow_unused=True)
        return torch.zeros_like(self.gradient) if found is None else plain(found.detach())
