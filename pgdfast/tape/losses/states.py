"""A quantity above a block of a loss, as a function of the rows of the block's outputs."""

from __future__ import annotations

import torch

_LARGEST_LABEL = 1021   # labels and their squares are exact in float32


class Unclear(Exception):
    """Why the loss on all rows cannot be told from that on a part. whole: it is known to be no sum over rows."""

    def __init__(self, why: str, whole: bool = False):
        super().__init__(why)
        self.whole = whole


class State:
    """A quantity on the tape as a function of a block's outputs.

    moments: (3, *shape), of the labels of the rows in each entry. weights: what stands at each entry times the quantity
    before all numbers and means. kind, count, factor: as in shares.Share. axis: where there is one row alone, the dimension
    of rows, None where they were summed, -1 where that is not known. weighted: by tensors that are no masks or counts.
    passed: positions of nodes that divide by a number of rows. mark: of weights and masks of sums over rows.
    loose: is there a weight of one row that might be a number? within: numbers of entries of one row that were added up, of
    every such sum on the way.
    """

    __slots__ = (
        "axis", "count", "factor", "kind", "loose", "mark", "moments", "passed", "shape", "weighted", "weights", "within",
    )

    def __init__(self, labels: torch.Tensor, dim: int = 0):
        self.shape = shape = labels.shape
        self.moments = torch.stack([labels**k for k in range(3)])
        self.weights = torch.ones(self.shape, dtype=torch.float64)
        self.kind, self.count, self.factor, self.axis, self.weighted = "sum", 1.0, 1.0, dim if len(shape) else None, False
        self.passed: list[int] = []
        self.mark, self.loose, self.within = 0.0, False, ()

    def like(self, moments: torch.Tensor, weights: torch.Tensor, axis) -> State:
        """The same normalisation with other entries."""
        new = object.__new__(State)
        new.moments, new.weights, new.axis, new.shape = moments, weights, axis, moments.shape[1:]
        new.kind, new.count, new.factor, new.weighted = self.kind, self.count, self.factor, self.weighted
        new.passed, new.mark, new.loose, new.within = self.passed, self.mark, self.loose, self.within
        return new

    def total(self) -> torch.Tensor:
        """(3,), of all entries."""
        return self.moments.reshape(3, -1).sum(1)

    @property
    def one_row(self) -> bool:
        """True where all depends on one and the same row."""
        return _single(self.total())

    def single(self) -> bool:
        """Whether every entry depends on one row alone."""
        return _single(self.moments)

    def like_all(self, total: torch.Tensor) -> bool:
        """Whether every entry depends on the rows of a total, on each as much as that does."""
        return alike(total.reshape(3, *[1] * len(self.shape)), self.moments)


def _single(m: torch.Tensor) -> bool:
    return bool(((m[0] * m[2] - m[1] ** 2).abs() <= 1e-5 * m[0] * m[2]).all())


def kind_of_all(states: list[State]) -> str:
    """The kind of a sum of several quantities. Raises Unclear where they have different ones."""
    kinds = {s.kind for s in states}
    if len(kinds - {"likely"}) > 1 or max(s.count for s in states) > (1 + 1e-9) * min(s.count for s in states):
        raise Unclear("it adds up a sum and a mean, or means over different numbers, of one quantity; write one of the two")
    return "mean" if "mean" in kinds else kinds.pop()


def alike(total: torch.Tensor, m: torch.Tensor) -> bool:
    """Whether moments, (3, ...), are of the same rows, each as often, as these, but for a factor."""
    return bool(((m[1:] * total[0] - total[1:] * m[0]).abs() <= 1e-5 * total[1:] * m[0]).all())


def labels_of(rows: int) -> torch.Tensor:
    """(rows,): a number for each row."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    return 1.0 + (order % _LARGEST_LABEL).double()
