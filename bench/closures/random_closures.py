"""Closures drawn from seeds: a chain of operations over parameters and data, and a loss at its end."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from .corpus import Values
from .random_operations import OPERATIONS, Applied

LARGEST, MOST, SATURATED = 20.0, 60, 6.0   # of a value; elements of a tensor; of a logit
LOSSES = ("residuals", "residuals", "two tensors", "sum of squares", "mean square", "huber", "cross-entropy", "logistic")


class Unfit(ArithmeticError):
    """A point at which an operation has no derivative, or values are not finite."""


@dataclass
class Node:
    """One operation: what it applies to which values. References are ("value" | "parameter" | "data", number)."""

    name: str
    inputs: tuple
    applied: Applied


@dataclass
class RandomClosure:
    """The closure of a seed, as corpus.Problem has it: modules, closure, outputs, loss."""

    seed: int
    nodes: list[Node] = field(default_factory=list)
    parameters: list[torch.Tensor] = field(default_factory=list)
    data: list[torch.Tensor] = field(default_factory=list)
    loss_name: str = "residuals"
    target: torch.Tensor | None = None
    other: int = 0   # of two residual tensors: the second's number

    def __post_init__(self):
        self.random = random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        self._build()

    # What operations draw.

    def randn(self, *shape):
        return torch.randn(shape, dtype=torch.float64, generator=self.generator)

    def coin(self) -> bool:
        return self.random.random() < 0.5

    def integer(self, n: int) -> int:
        return self.random.randrange(n)

    def size(self) -> int:
        return self.random.choice((1, 2, 3, 4))

    def dim(self, shape) -> int:
        return self.random.randrange(len(shape))

    def parameter(self, *shape):
        self._new.append(("parameter", len(self.parameters)))
        self.parameters.append((0.6 * self.randn(*shape)).requires_grad_())
        return self._new[-1]

    def constant(self, *shape):
        self._new.append(("data", len(self.data)))
        self.data.append(self.randn(*shape))
        return self._new[-1]

    def partner(self, shape):
        """An operand that broadcasts with a shape: a value, or a new parameter or constant."""
        fitting = [("value", k) for k, v in enumerate(self._values) if _broadcasts(v.shape, shape)]
        if fitting and self.random.random() < 0.6:
            return self.random.choice(fitting)
        wanted = [1 if self.random.random() < 0.25 else s for s in shape][self.random.choice((0, 0, len(shape) // 2)):]
        return (self.parameter if self.coin() else self.constant)(*wanted)

    # Construction: nodes are added while values stay finite, small and away from kinks.

    def _build(self):
        rows, columns = 2 + self.integer(4), 2 + self.integer(3)
        self._values, self._new = [], []
        x = self.constant(rows, columns)
        first = Node("linear", (x, self.parameter(3, columns), self.parameter(3)), Applied(F.linear))
        self._add(first)
        names, length = list(OPERATIONS), 3 + self.integer(9)
        for _ in range(10 * length):
            if len(self.nodes) > length:
                break
            at = len(self._values) - 1 if self.random.random() < 0.75 else self.integer(len(self._values))
            name = self.random.choice(names)
            counts, self._new = (len(self.parameters), len(self.data)), []
            applied = OPERATIONS[name](self, tuple(self._values[at].shape))
            if applied is None or not self._add(Node(name, (("value", at), *applied.others), applied)):
                del self.parameters[counts[0]:], self.data[counts[1]:]
        self._close()
        del self._values

    def _add(self, node: Node) -> bool:
        try:
            value = self._apply(node, self._values, checked=True)
        except (Unfit, RuntimeError, IndexError, ValueError):   # shapes that do not fit, among others
            return False
        if not 1 <= value.numel() <= MOST or value.dim() > 4 or float(value.detach().abs().max()) > LARGEST:
            return False
        if not value.requires_grad or value.dtype != torch.float64:
            return False
        self.nodes.append(node)
        self._values.append(value)
        return True

    def _close(self):
        z = self._values[-1]
        self.loss_name = self.random.choice(LOSSES)
        if self.loss_name == "cross-entropy" and (z.dim() != 2 or z.shape[1] < 2):
            self.loss_name = "mean square"
        if self.loss_name in ("cross-entropy", "logistic") and float(z.detach().abs().max()) > SATURATED:
            self.loss_name = "mean square"   # p (1 - p) would be rounding
        if self.loss_name == "two tensors":
            self.other = self.integer(len(self.nodes))
        if self.loss_name in ("residuals", "two tensors") and 1 in (z.numel(), self._values[self.other].numel()):
            self.loss_name = "mean square"   # one number may be meant as a loss
        if self.loss_name == "cross-entropy":
            self.target = torch.tensor([self.integer(z.shape[1]) for _ in range(z.shape[0])])
        else:
            self.target = self.randn(*z.shape)

    # Evaluation.

    def _operand(self, reference, values):
        kind, number = reference
        return values[number] if kind == "value" else self.parameters[number] if kind == "parameter" else self.data[number]

    def _apply(self, node: Node, values, checked=False):
        inputs = [self._operand(reference, values) for reference in node.inputs]
        if checked and node.applied.guard is not None and not node.applied.guard(*[t.detach() for t in inputs]):
            raise Unfit(node.name)
        value = node.applied.fn(*inputs)
        if checked and not bool(value.detach().isfinite().all()):
            raise Unfit(node.name)
        return value

    def values(self, checked=False, until=None) -> list[torch.Tensor]:
        """The values of all nodes, or of the first ones; checked: raise Unfit where one has no derivative."""
        found: list[torch.Tensor] = []
        for node in self.nodes[:until]:
            found.append(self._apply(node, found, checked))
        return found

    def next(self) -> None:
        """Move the parameters and draw new data."""
        with torch.no_grad():
            for p in self.parameters:
                p.add_(0.02 * self.randn(*p.shape))
        self.data = [d + 0.05 * self.randn(*d.shape) for d in self.data]

    @property
    def modules(self):
        return [Values(**{f"p{k}": p for k, p in enumerate(self.parameters)})]

    @property
    def params(self):
        return self.parameters

    @property
    def squares(self) -> bool:
        """Is the loss a sum of squares?"""
        return self.loss_name not in ("huber", "cross-entropy", "logistic")

    def closure(self):
        values = self.values()
        return self._result(values[-1], values[self.other])

    def prefix(self, until: int) -> Callable:
        """The closure that returns the value of an earlier node as residuals."""
        return lambda: self.values(until=until)[-1].reshape(-1)

    def _result(self, z, second):
        name, y = self.loss_name, self.target
        if name == "residuals":
            return z - y
        if name == "two tensors":
            return z - y, 0.5 * second
        return self.loss_of(z)

    def loss_of(self, z):
        """The scalar losses of the last value."""
        y = self.target
        return {
            "sum of squares": lambda: 0.5 * ((z - y) ** 2).sum(),
            "mean square": lambda: F.mse_loss(z, y),
            "huber": lambda: F.huber_loss(z, y),
            "cross-entropy": lambda: F.cross_entropy(z, y),
            "logistic": lambda: F.binary_cross_entropy_with_logits(z, torch.sigmoid(y)),
        }[self.loss_name]()

    # For the oracle.

    plain = None

    def outputs(self):
        values = self.values()
        z, y = values[-1], self.target
        if self.loss_name == "two tensors":
            return z - y, 0.5 * values[self.other]
        if self.loss_name == "mean square":
            return (z - y) * (2 / z.numel()) ** 0.5
        return z - y if self.squares else z

    @property
    def loss(self):
        return None if self.squares else self.loss_of

    @property
    def exact(self) -> bool:
        return self.loss_name != "huber"

    @property
    def curvatures(self):
        if self.loss_name != "huber":
            return ()
        weight = lambda z: (1 / (z - self.target).abs().clamp_min(1)).reshape(-1) / z.numel()   # noqa: E731
        return (weight,)

    def described(self) -> str:
        return " > ".join(node.name for node in self.nodes) + f"; {self.loss_name}"


def _broadcasts(a, b) -> bool:
    try:
        return tuple(torch.broadcast_shapes(a, b)) == tuple(b)
    except RuntimeError:
        return False
