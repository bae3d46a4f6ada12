"""Term weights found by themselves: the terms of a loss weighted so that none of them drowns the others.

A closure that returns K residual tensors is weighted by sqrt(w_k), L = sum_k w_k/2 ||r_k||^2. Every `every` steps the weights
move towards those that equalise a quantity q_k of the unweighted terms, with sum_k w_k q_k = sum_k q_k:

    w_k = mean(q) / q_k,    q_k = tr(J_k J_k^T)    or    q_k = ||J_k^T r_k||.

With traces, that of the whole J J^T stays what it is without weights, and so the damping keeps its meaning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch

from ..solve import Solutions

_DIRECT = ("dual", "primal", "eigh")   # solvers that form J J^T or J^T J, next to which the norms of J's rows cost little
_LARGEST_J = 1 << 23   # elements of a J that is made for the norms of its rows
_PROBES = 16   # products with J^T that estimate a trace: its standard deviation is at most (2 / 16)^(1/2) of it


@dataclass(frozen=True)
class Balance:
    """How term weights follow the terms; `balance="trace"` is Balance("trace"), and "gradient" Balance().

    Args:
        by: "gradient" equalises ||J_k^T r_k||, the pull of the terms on the parameters (Wang, Teng and Perdikaris, SIAM J. Sci.
            Comput. 43, 2021, arXiv 2001.04536, algorithm 1, with norms in place of maximum and mean); "trace" equalises
            tr(J_k J_k^T), the rates at which the terms fall in gradient flow (Wang, Yu and Perdikaris, J. Comput. Phys. 449,
            2022, arXiv 2007.14527, algorithm 1).
        every (int >= 1): steps between two updates. The first step is unweighted; the second takes the weights measured in
            the first as they are.
        momentum (float in [0, 1)): share of the old weight in a new one, of their logarithms.
        largest (float > 1): bound of a weight; 1/K is its lower bound by itself.

    Cost of an update: "gradient", K products with J^T. "trace": with a direct solver, exact from J J^T, or from J where that
    is smaller; with others, and where J is too large, 16 K products with J^T for an estimate (Hutchinson 1989),
    whose standard deviation is at most 36 % of it.
    Raises ValueError for values out of these ranges.
    """

    by: Literal["gradient", "trace"] = "gradient"
    every: int = 5
    momentum: float = 0.5
    largest: float = 1e8

    def __post_init__(self):
        if self.by not in ("trace", "gradient"):
            raise ValueError(f"pgdfast.Balance: by is {self.by!r}; use 'trace' or 'gradient'.")
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise ValueError(f"pgdfast.Balance: every is {self.every!r}; it must be a number of steps, 1 or more.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"pgdfast.Balance: momentum is {self.momentum!r}; it must lie in [0, 1).")
        if not 1 < self.largest < math.inf:
            raise ValueError(f"pgdfast.Balance: largest is {self.largest!r}; it must be finite and more than 1.")

    def updated(self, weights: tuple[float, ...], quantities: list[float], first: bool) -> tuple[float, ...]:
        """The next weights. quantities: q_k of the unweighted terms; a term with none that is positive keeps its weight."""
        known = [q for q in quantities if 0 < q < math.inf]
        if len(known) < 2:   # nothing to balance
            return weights
        mean, share = sum(known) / len(known), 0.0 if first else self.momentum
        return tuple([
            self._towards(w, min(mean / q, self.largest), share) if 0 < q < math.inf else w
            for w, q in zip(weights, quantities, strict=True)
        ])

    @staticmethod
    def _towards(old: float, new: float, share: float) -> float:
        return math.exp(share * math.log(old) + (1 - share) * math.log(new)) if share else new


def chosen_balance(balance) -> Balance | None:
    """The Balance of an option of LM. Raises ValueError for anything else."""
    if balance is None or isinstance(balance, Balance):
        return balance
    if balance not in ("trace", "gradient"):
        raise ValueError(f"pgdfast.LM: balance is {balance!r}; use None, 'trace', 'gradient' or a pgdfast.Balance.")
    return Balance(balance)


class Weighted:
    """A closure whose residual tensors are weighted, and what becomes of the weights: for one step.

    given_closure: the user's closure. members: what the optimizer remembers of each; like: a parameter.
    """

    def __init__(self, closure, balance: Balance, members: list[dict], like: torch.Tensor, stacked: bool):
        self.given_closure, self._balance, self._like, self._stacked = closure, balance, like, stacked
        self._known = [member.get("weights") for member in members]
        self.weights: list[tuple[float, ...]] = []   # by member, once the closure has run
        self.next: list[tuple[float, ...]] = []      # those of the next step
        self._roots: list[torch.Tensor] = []
        self._sizes: list[int] = []
        self._measured = False

    def __call__(self):
        """What the closure returns, times the roots of the weights."""
        result = self.given_closure()
        if not isinstance(result, (tuple, list)):
            kind = f"one tensor of shape {tuple(result.shape)}" if isinstance(result, torch.Tensor) else type(result).__name__
            raise ValueError(
                f"pgdfast.LM: balance needs a closure that returns several residual tensors, and this one returned {kind}; "
                "return them as a tuple, one per term of the loss, or use balance=None."
            )
        if not result or not all(isinstance(part, torch.Tensor) and part.is_floating_point() for part in result):
            return result   # for LM to refuse
        if not self._roots:
            self._begin(result)
        return tuple([part * self._shaped(root, part) for part, root in zip(result, self._roots, strict=True)])

    def _begin(self, result) -> None:
        count = len(result)
        for known in self._known:
            if known is not None and len(known) != count:
                raise ValueError(
                    f"pgdfast.LM: the closure returned {count} residual tensors and {len(known)} in earlier steps; balance "
                    "keeps a weight for each, so their number must not change."
                )
        self.weights = [(1.0,) * count if known is None else tuple(known) for known in self._known]
        self.next = list(self.weights)
        dtype, device = self._like.dtype.to_real(), self._like.device
        roots = torch.tensor(self.weights, dtype=torch.float64).sqrt().to(device, dtype)
        self._roots = list((roots.T if self._stacked else roots[0]).unbind())
        self._sizes = [part.numel() // len(self.weights) for part in result]

    def _shaped(self, root: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """The roots of one term: 0-dim, or of an ensemble (B, 1, ...), the members first as in its residuals."""
        return root.view(-1, *[1] * (part.dim() - 1)).to(part.dtype) if self._stacked and part.dim() else root

    def note(self, report, b: int, residual: torch.Tensor) -> None:
        """Write member b's weights and unweighted terms 1/2 ||r_k||^2 into its report. residual: (M,), weighted."""
        report.weights = self.weights[b]
        squares = [part.double().square().sum() for part in residual.split(self._sizes)]
        halves = (0.5 * torch.stack(squares)).tolist()
        report.terms = tuple([half / w for half, w in zip(halves, report.weights, strict=True)])

    def keeps(self, b: int) -> bool:
        """Whether member b's weights are the same in the next step."""
        return self.next[b] == self.weights[b]

    def measure(self, members: list, networks, step: int) -> None:
        """Find the next weights of these step.host.Members, where the step's number says so, after its first solve."""
        if self._measured or len(self._sizes) < 2:
            return
        self._measured = True
        for m in members:
            if self._known[m.number] is None or step % self._balance.every == 0:
                self.next[m.number] = self._next_weights(m.number, networks.member(m.number), m.solution, step)

    def _next_weights(self, b: int, lin, solution, step: int) -> tuple[float, ...]:
        weights = self.weights[b]
        if self._balance.by == "gradient":
            squares = self._norms(lin, lin.residual)
            quantities = [math.sqrt(q) / w for q, w in zip(squares, weights, strict=True)]
        else:
            solver = solution[0].solver if isinstance(solution, Solutions) else solution.solver
            traces = self._traces(lin, solver in _DIRECT, step)
            quantities = [q / w for q, w in zip(traces, weights, strict=True)]
        return self._balance.updated(weights, quantities, self._known[b] is None)

    def _norms(self, lin, u: torch.Tensor) -> list[float]:
        """||J_k^T u_k||^2 of every weighted term."""
        found, zero = [], torch.zeros_like(u)
        for part, own in zip(u.split(self._sizes), self._slices(), strict=True):
            alone = zero.clone()
            alone[own] = part
            found.append(lin.vjp(alone).double().square().sum())
        return torch.stack(found).tolist()

    def _slices(self) -> list[slice]:
        return [slice(end - size, end) for end, size in zip(accumulate(self._sizes), self._sizes, strict=True)]

    def _traces(self, lin, direct: bool, step: int) -> list[float]:
        """The traces tr(J_k J_k^T) of weighted terms, E[||J_k^T s||^2] of random signs s; direct: is the solver so."""
        M, P = lin.num_residuals, lin.num_parameters
        if direct and (M <= P or M * P <= _LARGEST_J):
            rows = lin.gram().diagonal() if M <= P else lin.dense().square().sum(1)
            return torch.stack([part.sum() for part in rows.double().split(self._sizes)]).tolist()
        generator, total = torch.Generator().manual_seed(step), [0.0] * len(self._sizes)
        for _ in range(_PROBES):
            signs = 2.0 * torch.randint(2, (lin.num_residuals,), generator=generator) - 1.0
            norms = self._norms(lin, signs.to(lin.residual))
            total = [a + q / _PROBES for a, q in zip(total, norms, strict=True)]
        return total


def check_balance(memory: dict, balance: Balance | None) -> None:
    """Raise ValueError for the memory of an LM that weights terms, where this one does not."""
    if balance is None and any(member.get("weights") is not None for member in memory["members"]):
        raise ValueError(
            "pgdfast.LM: the loaded state has term weights and this LM was made with balance=None, which would minimize "
            "another loss; make it with the balance that the state was saved with."
        )
