"""Options of solvers that have any."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Nystrom:
    """A preconditioner for CG from a randomized sketch of J^T J, remade every `refresh` steps.

    rank: columns of the sketch; it costs as many products with J^T J, and 2 rank P operations an iteration. It removes the
    largest `rank` eigenvalues from the condition. seed: of its random numbers, so that runs repeat bit for bit.
    Raises ValueError for a rank or interval that is not a positive integer.

    Source: Frangella, Tropp and Udell (2023), arXiv 2110.02820, algorithm 2.1 and equation (1.3).
    """

    rank: int = 20
    refresh: int = 10
    seed: int = 0

    def __post_init__(self):
        for name in ("rank", "refresh"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"pgdfast.Nystrom: {name} is {value!r}; it must be a positive integer.")


@dataclass(frozen=True, slots=True)
class CG:
    """Conjugate gradients: stop after `max_iterations` or at ||b - A x|| <= max(tolerance ||b||, absolute).

    preconditioner: None (the scale D, where there is one), "jacobi" (diag(J^T J) + mu D), "nystrom" or pgdfast.Nystrom(...).
    warm_start: begin at the best multiple of the last solution, which is never worse than zero. progress: stop also where
    k = max(10, i / 10) of i iterations added less than k * progress of the model's reduction (Martens 2010, section 4.4,
    has 5e-4); 0 is never. truncate: answer a rejected step by an earlier iterate, at most half as long, before solving
    again (Steihaug 1983); keeps up to 8 vectors. solver="lsmr" takes its limits from max_iterations and tolerance.
    The defaults are those of arXiv 2601.03162. Raises ValueError for values outside of this.
    """

    max_iterations: int = 150
    tolerance: float = 1e-6
    preconditioner: str | Nystrom | None = None
    warm_start: bool = False
    progress: float = 0.0
    absolute: float = 0.0
    truncate: bool = False

    def __post_init__(self):
        if not isinstance(self.max_iterations, int) or self.max_iterations < 1:
            raise ValueError(f"pgdfast.CG: max_iterations is {self.max_iterations!r}; it must be a positive integer.")
        if not self.tolerance > 0:
            raise ValueError(f"pgdfast.CG: tolerance is {self.tolerance!r}; it must be a positive number.")
        for name in ("progress", "absolute"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"pgdfast.CG: {name} is {value!r}; it must be a finite number that is not negative.")
        if self.preconditioner == "nystrom":
            object.__setattr__(self, "preconditioner", Nystrom())
        if self.preconditioner not in (None, "jacobi") and not isinstance(self.preconditioner, Nystrom):
            raise ValueError(
                f"pgdfast.CG: unknown preconditioner {self.preconditioner!r}; use None, 'jacobi', 'nystrom' or "
                "pgdfast.Nystrom(rank=..., refresh=...)."
            )

    @property
    def shifts(self) -> bool:
        """Whether one Krylov space serves all dampings: neither a preconditioner of one's own, nor a path, nor early stops."""
        return self.preconditioner is None and not self.truncate and self.progress == 0
