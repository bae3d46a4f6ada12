"""What a solver returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

ADVICE = {
    "not_positive_definite": "the damped matrix is not positive definite to working precision: raise the damping, use "
    "float64, or solver='eigh'",
    "max_iterations": "the solver stopped at its iteration limit: raise CG(max_iterations=...), the damping or the tolerance",
    "stagnated": "the residual stopped falling above the tolerance, at rounding level: use a larger tolerance, "
    "solver='lsmr' or float64",
    "breakdown": "the solver met a direction without curvature: raise the damping or use a direct solver",
    "progress": "CG stopped because its model gained too little: lower CG(progress=...) for a more exact step",
    "truncated": "the step of the full solve was rejected and an earlier, shorter CG iterate taken instead; mu has risen",
    "not_finite": "the damped matrix or the step is not finite: raise the damping, scale the residuals down or use float64",
}

_USABLE = ("solved", "max_iterations", "stagnated", "progress", "truncated")


@dataclass(slots=True)
class Solution:
    """delta of (mu D + J^T J + penalty) delta = g, + mu D p where there is a prior p.

    step: (P,), to be subtracted from the parameters. status: "solved", "max_iterations", "stagnated", "progress" or
    "truncated" (the step is usable), or "not_positive_definite", "breakdown", "not_finite" (the step is zero or partial;
    `usable` is False for a zero one). iterations: of CG or LSMR, else 0. solver, reason: what ran and why. gain: g . delta.
    """

    step: torch.Tensor
    status: str
    iterations: int
    solver: str
    reason: str
    gain: float
    damped: float                       # delta . mu D delta
    linearization: object = field(repr=False, default=None)
    damping_diagonal: object = field(repr=False, default=None)
    known_residual_norm: float | None = None
    wide: bool = False                  # a float32 problem needed float64 sums
    slack: float = 0.0                  # (g - A delta) . delta, 0 for an exact solve
    path: tuple = field(repr=False, default=())            # earlier iterates: (iteration, step, gain, square, slack)
    keep: dict = field(repr=False, default_factory=dict)   # what the next solve may start from
    prior: torch.Tensor | None = field(repr=False, default=None)
    same_factor: Callable | None = field(repr=False, default=None)   # u -> (damped matrix)^-1 J^T u
    detail: str = field(repr=False, default="")            # advice for this solve alone
    cut: int = 0                        # directions that the pseudo-inverse of mu = 0 left out

    @property
    def usable(self) -> bool:
        """True where the step descends the model."""
        return self.status in _USABLE or (self.status == "breakdown" and self.gain > 0)

    @property
    def advice(self) -> str:
        """What to do about the status; empty when solved."""
        return self.detail or ADVICE.get(self.status, "")

    @property
    def predicted_reduction(self) -> float:
        """Of the full step: g . delta - 1/2 delta . (J^T J + penalty) delta."""
        return self.reduction(1.0)

    def reduction(self, t: float) -> float:
        """Predicted reduction of the loss by the step t delta.

        With e = g - (mu D + J^T J + penalty) delta, whose product with delta is the slack: t g.delta - t^2/2 (g.delta -
        delta.mu D delta - e.delta).
        """
        return t * self.gain - 0.5 * t * t * (self.gain - self.damped - self.slack)

    def solve_with_same_factor(self, u: torch.Tensor) -> torch.Tensor:
        """(mu D + J^T J + penalty)^-1 J^T u: (M,) -> (P,), at the same mu, whatever was solved since.

        Cost: two triangular solves and a product with J^T; for CG and LSMR another solve of their own; of several dampings by a
        direct solver a new factor at first. With the parameters of the linearization. Raises RuntimeError where the step is not
        usable, and where parameters have changed or the linearization was released.
        """
        if not self.usable or self.same_factor is None:
            raise RuntimeError(
                f"pgdfast.Solution.solve_with_same_factor: the solve ended as {self.status!r} and left no factor; solve at a "
                "larger damping"
            )
        return self.same_factor(u).to(self.step.dtype)

    def shortened(self) -> Solution | None:
        """The last iterate kept that is at most half as long as this step, or None.

        CG's iterates from zero grow in norm (Steihaug 1983, theorem 2.1), and each is the model's minimizer over its Krylov
        space; so this is what CG would have answered with a trust radius of about half the step. Costs no product.
        """
        radius_square = 0.25 * float(self.step.double().square().sum())
        fitting = [k for k, (_, _, gain, square, _) in enumerate(self.path) if square <= radius_square and gain > 0]
        if not fitting:
            return None
        last = fitting[-1]
        iteration, step, gain, square, slack = self.path[last]
        step, D = step.to(self.step.dtype), self.damping_diagonal
        damped = float((D * step.double()).dot(step.double())) if isinstance(D, torch.Tensor) else D * square
        return replace(
            self, step=step, status="truncated", reason=f"truncated at iteration {iteration} of {self.iterations}",
            gain=gain, damped=damped, known_residual_norm=None, slack=slack, path=self.path[:last],
        )

    @property
    def residual_norm(self) -> float:
        """||g - (mu D + J^T J + penalty) delta|| / ||g||; costs two products unless the solver knew it.

        With a prior p, delta - p stands for delta and the model's gradient at p for g: the equation that was solved.
        """
        if self.known_residual_norm is None:
            lin, step = self.linearization, self.step
            lin = lin() if callable(lin) else lin   # a member's is made when it is asked for
            g = lin.gradient()
            if self.prior is not None:
                g, step = g - lin.ggn(self.prior), step - self.prior
            left = lin.ggn(step) + self.damping_diagonal * step
            norm = float(torch.linalg.vector_norm(g))
            self.known_residual_norm = float(torch.linalg.vector_norm(g - left)) / norm if norm > 0 else 0.0
        return self.known_residual_norm


@dataclass(slots=True)
class Solutions:
    """The solutions for K dampings of one linearization, in the order in which these were given.

    Its items are what each damping alone would have given, a Solution; its attributes gather theirs. Direct solvers keep one
    factor: `solve_with_same_factor` of another damping factors once more.
    """

    damping: tuple[float, ...]
    solutions: Sequence[Solution] = field(repr=False)
    _step: torch.Tensor | None = field(repr=False, default=None)

    def __len__(self) -> int:
        """K."""
        return len(self.solutions)

    def __getitem__(self, k: int) -> Solution:
        """The Solution of damping k."""
        return self.solutions[k]

    def __iter__(self):
        """The Solutions in turn."""
        return iter(self.solutions)

    @property
    def step(self) -> torch.Tensor:
        """The steps, (K, P)."""
        if self._step is None:
            rows = [s.step for s in self.solutions]
            base = rows[0]._base   # the solver's own matrix, where these are its rows in turn
            whole = base is not None and base.shape == (len(rows), len(rows[0])) and base.is_contiguous() and all(
                row._base is base and row.storage_offset() == k * len(row) for k, row in enumerate(rows)
            )
            self._step = base if whole else torch.stack(rows)
        return self._step

    @property
    def status(self) -> tuple[str, ...]:
        """The status of each."""
        return tuple(s.status for s in self.solutions)

    @property
    def iterations(self) -> tuple[int, ...]:
        """After how many iterations CG or LSMR ended, for each."""
        return tuple(s.iterations for s in self.solutions)

    @property
    def usable(self) -> tuple[bool, ...]:
        """Which steps descend the model."""
        return tuple(s.usable for s in self.solutions)

    @property
    def residual_norm(self) -> torch.Tensor:
        """The relative residual of each, (K,), float64; two products each unless the solver knew it."""
        return torch.tensor([s.residual_norm for s in self.solutions], dtype=torch.float64)

    @property
    def solver(self) -> str:
        """What solved; several joined by "+"."""
        return "+".join(dict.fromkeys(s.solver for s in self.solutions))

    @property
    def reason(self) -> str:
        """Why."""
        return "; ".join(dict.fromkeys(s.reason for s in self.solutions))
