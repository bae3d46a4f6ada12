"""A loss as least-squares blocks.

Each block has outputs z on the tape, a residual r and a factor S of the output Hessian, H = S S^T, such that S r is the loss's
gradient with respect to z: then J = S^T dz makes J^T r the gradient, exactly, and J^T J the Gauss-Newton matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch

from ..walk import Tape, describe


class Block(ABC):
    """What all blocks have; the edges are the outputs z, where two stand z is their difference.

    residual: r. squares: is S constant, so that J is the derivative of r? `replays`: may the core read it by itself?
    handles: autograd's edges of z where that is no output on the tape, but the real view of a complex one.
    """

    replays = False
    handles: tuple | None = None

    @abstractmethod
    def signature(self) -> tuple:
        """What decides the instructions that `apply` writes."""

    @abstractmethod
    def apply(self, op) -> None:
        """Write S^T, from outputs to residual, with the verbs of `op`."""

    @abstractmethod
    def scale(self, t: torch.Tensor) -> torch.Tensor:
        """S^T t."""

    @abstractmethod
    def scale_transposed(self, u: torch.Tensor) -> torch.Tensor:
        """S u."""


@dataclass(slots=True)
class Diagonal(Block):
    """A diagonal factor: squares w ||a - b||^2 with S = sqrt(2w), or any elementwise function with S = sqrt(h).

    factor: S. parts: where a and b were saved, as (position, field), for squares that the core may read.
    """

    edges: tuple
    residual: torch.Tensor
    factor: float | torch.Tensor
    parts: tuple = ()
    squares: bool = True
    handles: tuple | None = None

    @property
    def replays(self) -> bool:
        """True for differences of saved tensors times a number."""
        return bool(self.parts) and type(self.factor) is float

    def signature(self) -> tuple:
        factor = describe(self.factor) if type(self.factor) is not float else None
        return "diagonal", self.edges, self.residual.shape, factor, self.squares

    def apply(self, op) -> None:
        if op.needs[0]:
            op.scale(0, self.factor)
        if len(self.edges) > 1 and op.needs[1]:
            op.scale(1, -self.factor)

    def scale(self, t):
        return self.factor * t

    def scale_transposed(self, u):
        return self.factor * u

    def absorb(self, slope: torch.Tensor) -> None:
        """Take in a term that is linear in the outputs: the gradient changes, and the curvature does not."""
        gradient = self.factor * self.residual + slope
        h = torch.as_tensor(self.factor, dtype=gradient.dtype, device=gradient.device).square().expand_as(gradient)
        both = diagonal_block(self.edges, gradient, h)
        self.residual, self.factor, self.parts = both.residual, both.factor, ()


@dataclass(slots=True)
class Softmax(Block):
    """H = Q (diag p - p p^T) over `dim`: a softmax's cross-entropy with weights q, Q = sum q.

    The gradient Q p - q lies in the range of S = sqrt(Q) (diag(sqrt p) - p sqrt(p)^T), with
    r = (Q p - q) / (sqrt(Q) sqrt(p)) before it: finite wherever p is.
    """

    edges: tuple
    residual: torch.Tensor
    p: torch.Tensor
    root: torch.Tensor      # sqrt(Q p)
    dim: int
    squares: bool = False

    def signature(self) -> tuple:
        return "softmax", self.edges, describe(self.p), describe(self.root), self.dim

    def apply(self, op) -> None:
        shape = list(self.p.shape)
        if shape:
            shape[self.dim] = 1
        op.temporary("mean", shape)
        op.sum(0, (self.dim,) if shape else None, True, c=self.p, out="mean")
        op.scale(0, self.root)
        op.scale("mean", -self.root)

    def scale(self, t):
        return self.root * (t - (self.p * t).sum(self.dim, keepdim=True))

    def scale_transposed(self, u):
        weighted = self.root * u
        return weighted - self.p * weighted.sum(self.dim, keepdim=True)


@dataclass(slots=True)
class Centred(Block):
    """w ||z - mean z||^2 over dimensions `dims`, each mean over n numbers: S = sqrt(2w) (1 - 1 1^T / n)."""

    edges: tuple
    residual: torch.Tensor
    factor: float | torch.Tensor   # constant along dims
    dims: tuple
    squares: bool = True

    def signature(self) -> tuple:
        factor = describe(self.factor) if type(self.factor) is not float else None
        return "centred", self.edges, self.residual.shape, factor, self.dims

    def apply(self, op) -> None:
        shape = [1 if d in self.dims else n for d, n in enumerate(self.residual.shape)]
        op.temporary("mean", shape)
        op.sum(0, self.dims or None, True, alpha=1 / max(self._count(), 1), out="mean")
        op.scale(0, self.factor)
        op.scale("mean", -self.factor)

    def _count(self) -> int:
        count = 1
        for d in self.dims:
            count *= self.residual.shape[d]
        return count

    def scale(self, t):
        return self.factor * (t - t.mean(self.dims, keepdim=True))

    def scale_transposed(self, u):
        weighted = self.factor * u
        return weighted - weighted.mean(self.dims, keepdim=True)


@dataclass(slots=True)
class Rows(Block):
    """Rows z_i of n outputs with H_i = w_i R R^T, R symmetric: S = sqrt(w_i) R.

    turned: the rows of n run along the first dimension of z, (n, N), and not along the last, (N, n).
    """

    edges: tuple
    residual: torch.Tensor
    root: torch.Tensor      # R, (n, n)
    weights: torch.Tensor   # sqrt(w_i), of z's shape
    turned: bool = False
    squares: bool = True

    def signature(self) -> tuple:
        return "rows", self.edges, self.residual.shape, describe(self.root), self.turned, self.squares

    def apply(self, op) -> None:
        shape, n = self.residual.shape, len(self.root)
        rows = (n, shape.numel() // n) if self.turned else (shape.numel() // n, n)
        op.reshape(0, rows, out="rows")
        op.temporary("product", rows)
        if self.turned:
            op.matmul("rows", left=self.root, out="product")
        else:
            op.matmul("rows", right=self.root, out="product")
        op.reshape("product", shape, out="shaped")
        op.scale("shaped", self.weights)

    def scale(self, t):
        return self.weights * self._product(t)

    def scale_transposed(self, u):
        return self._product(self.weights * u)   # R is symmetric

    def _product(self, t):
        n = len(self.root)
        product = self.root @ t.reshape(n, -1) if self.turned else t.reshape(-1, n) @ self.root
        return product.reshape(t.shape)


@dataclass(slots=True)
class Route:
    """How a walk came from the loss down to a block.

    chains: by one or several ways. A chain is None at the loss, or (chain above, step), and a step is the position of a node,
    the positions of all nodes between a term and its cut, or `COUPLED`; a Fork stands for any of its chains.
    weight: of what the last node of the chain puts out, dL / d output, where the block is of one node's loss; less that of a
    log_softmax.
    """

    chains: tuple
    weight: object = None


COUPLED = "coupled"   # a step: the weight of a term depends on other terms


class Fork(tuple):
    """Several chains to one term."""

    __slots__ = ()


def unrolled(chain) -> list[tuple]:
    """The steps of a chain, from the loss down, for each way that it stands for."""
    steps = []
    while chain is not None and type(chain) is not Fork:
        chain, step = chain
        steps.append(step)
    steps = tuple(reversed(steps))
    return [steps] if chain is None else [above + steps for one in chain for above in unrolled(one)]


@dataclass(slots=True)
class Form:
    """A loss as blocks, quadratic penalties (coefficient c of c/2 ||theta_l||^2 per parameter), and the nodes that were read.

    steady: do weights stay the same when parameters move? entries: did entries of tensors decide how it was read?
    routes: per block, how the walk came to it; penalty_routes: (parameter number, chain) of every penalty.
    """

    blocks: list = field(default_factory=list)
    penalties: dict[int, float] = field(default_factory=dict)
    consumed: set[int] = field(default_factory=set)
    steady: bool = True
    entries: bool = False
    routes: list = field(default_factory=list)
    penalty_routes: list = field(default_factory=list)

    @property
    def squares_only(self) -> bool:
        """True where every part of the loss is a sum of squares with constant weights."""
        return self.steady and all(block.squares for block in self.blocks)

    @property
    def replays(self) -> bool:
        """True where the core may read it by itself."""
        return self.steady and not self.entries and all(block.replays for block in self.blocks)

    def sums(self, tape: Tape) -> bool:
        """True where the loss sums over several numbers."""
        return any(block.residual.numel() > 1 for block in self.blocks) or any(
            tape.shape(tape.leaf.index(leaf)).numel() > 1 for leaf in self.penalties
        )

    def add(self, other: Form) -> None:
        """Take in the form of a further term."""
        self.blocks += other.blocks
        self.routes += other.routes
        self.penalty_routes += other.penalty_routes
        self.consumed |= other.consumed
        self.steady &= other.steady
        self.entries |= other.entries
        for leaf, c in other.penalties.items():
            self.penalties[leaf] = self.penalties.get(leaf, 0.0) + c


class UnrecognizedLoss(ValueError):
    """A scalar that is neither a sum of squares nor of convex functions."""


class IndefiniteForm(UnrecognizedLoss):
    """A quadratic form that is not positive semidefinite."""


def residual_form(residuals: list[torch.Tensor], edges: list) -> Form:
    """L = 1/2 sum ||r||^2 of residual tensors that the closure returned."""
    return Form([Diagonal((edge,), r.detach(), 1.0) for r, edge in zip(residuals, edges, strict=True)])


def diagonal_block(edges: tuple, gradient: torch.Tensor, h: torch.Tensor, squares: bool = False) -> Diagonal:
    """The block of an elementwise function with this gradient and second derivative h >= 0.

    An element without curvature has no residual to give its gradient: h is then a tiny number.
    """
    dtype = gradient.dtype
    dead = (h <= 0) & (gradient == 0)
    root = torch.sqrt(h.clamp_min(tiny(dtype)))
    root = torch.where(dead, 0.0, root).to(dtype).contiguous()
    residual = torch.where(dead, 0.0, gradient / root).to(dtype)
    return Diagonal(edges, residual, root, squares=squares)


def tiny(dtype: torch.dtype) -> float:
    """Square roots of this and their reciprocals are still ordinary numbers."""
    return 1e-300 if dtype == torch.float64 else 1e-30


def looked_at(t: torch.Tensor, allow_sync: bool) -> bool:
    """Whether entries may decide what is done."""
    return allow_sync or t.device.type == "cpu"
