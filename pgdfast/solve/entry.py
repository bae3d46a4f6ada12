"""The door to the solvers: one damping, or many from one linearization."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, overload

import torch

from ..linear.protocol import SolvableLinearization
from .choice import BY_NAME, SOLVERS, choose
from .options import CG
from .problem import Found, OnDemand, Problem
from .solution import ADVICE, Solution, Solutions

_DEFAULT = CG()


@overload
def solve(
    linearization: SolvableLinearization, damping: float, *, scale: torch.Tensor | None = None, solver: str = "auto",
    cg: CG | None = None, rcond: float = 1e-8, wide: bool = False, keep: dict[str, Any] | None = None, time: int = 0,
    prior: torch.Tensor | None = None,
) -> Solution: ...


@overload
def solve(
    linearization: SolvableLinearization, damping: Sequence[float] | torch.Tensor, *, scale: torch.Tensor | None = None,
    solver: str = "auto", cg: CG | None = None, rcond: float = 1e-8, wide: bool = False, keep: dict[str, Any] | None = None,
    time: int = 0, prior: torch.Tensor | None = None,
) -> Solutions: ...


def solve(
    linearization, damping, *, scale=None, solver="auto", cg=None, rcond=1e-8, wide=False, keep=None, time=0, prior=None
) -> Solution | Solutions:
    """Solve (mu D + J^T J) delta = J^T r + mu D p at a linearization, for one mu or for many.

    A step is subtracted from the parameters. Many dampings: "dual" and "primal" factor one matrix K times, "eigh" decomposes it
    once, "cg" makes one Krylov space (multi-shift CG) that begins at zero and stops for each mu by itself, "lsmr" solves one
    after another; "auto" takes the cheapest by predicted cost. With CG(preconditioner=...), truncate or progress CG solves one
    after another from the largest mu down, with a preconditioner each from the last one's solution; `reason` says so.
    Raises ValueError for a negative or non-finite damping, none at all, a scale or prior of the wrong shape and an unknown
    solver.

    Args:
        linearization: of pgdfast.linearize.
        damping: mu >= 0; 0 is Gauss-Newton, the pseudo-inverse cut at rcond. A list, tuple or 1-D tensor of K of them, in any
            order, gives Solutions, of which the linearization is shared.
        scale: (P,), the positive diagonal D, or None for the identity.
        solver: one of SOLVERS.
        cg: options of CG and LSMR.
        rcond: eigenvalues below it times the largest are cut off at damping 0.
        wide: for a float32 problem, sum in float64 at once instead of when float32 turns out too narrow.
        keep: `Solution.keep` of the last solve, for a warm start or a sketch.
        time: steps taken so far, by which a sketch ages.
        prior: p, (P,), to which the damping pulls the step, or None for zero; two more products with J for each mu.
    """
    lin, options = linearization, cg or _DEFAULT
    one = isinstance(damping, (int, float))
    if one and not 0 <= damping < math.inf:
        raise ValueError(f"pgdfast.solve: damping is {damping!r}; it must be one finite number that is not negative.")
    mus = None if one else _checked(damping)
    if solver not in SOLVERS:
        raise ValueError(f"pgdfast.solve: unknown solver {solver!r}; use one of {', '.join(SOLVERS)}.")
    for what, vector in (("scale", scale), ("prior", prior)):
        if vector is not None and vector.shape != (lin.num_parameters,):
            raise ValueError(f"pgdfast.solve: {what} has shape {tuple(vector.shape)}; it must be ({lin.num_parameters},).")
    if lin.num_residuals == 0 and not lin.penalties:
        return _nothing(lin) if one else Solutions(tuple(mus), [_nothing(lin)] * len(mus))
    if one:
        plain = prior is None and not lin.penalties
        problem = Problem(lin, float(damping), scale, lin.residual) if plain else Problem.of(lin, float(damping), scale, prior)
        name, reason = choose(problem, solver, options, wide)
        return solution(name, reason, problem, BY_NAME[name].solve(problem, options, rcond, wide, keep, time))
    levels = sorted(set(mus))
    found = _solve_all(Problem.of(lin, levels[0], scale, prior), levels, solver, options, rcond, wide, keep, time)
    return Solutions(tuple(mus), found if mus == levels else [found[levels.index(mu)] for mu in mus])


def _checked(damping) -> list[float]:
    if isinstance(damping, torch.Tensor) and damping.dim() == 1:
        damping = damping.tolist()
    if not isinstance(damping, (list, tuple)) or not damping:
        raise ValueError(
            f"pgdfast.solve: damping is {damping!r}; it must be one finite number that is not negative, or a list, tuple or "
            "1-D tensor of such numbers, at least one."
        )
    mus = [float(mu) if isinstance(mu, (int, float, torch.Tensor)) else math.nan for mu in damping]
    for mu, given in zip(mus, damping, strict=True):
        if not 0 <= mu < math.inf:
            raise ValueError(f"pgdfast.solve: damping holds {given!r}; every one must be a finite number that is not negative.")
    return mus


def _nothing(lin) -> Solution:
    """The step of a linearization without residuals."""
    step = torch.zeros(lin.num_parameters, dtype=lin.dtype, device=lin.device)
    return Solution(step, "solved", 0, "none", "no residuals", 0.0, 0.0, lin, 0.0, 0.0, same_factor=lambda u: step.clone())


def solution(name: str, reason: str, problem: Problem, found: Found, dtype: torch.dtype | None = None) -> Solution:
    """What a solver found, for the problem as it was given and in its precision.

    dtype: that precision, where the problem's linearization is a function that makes it, as of a member of an ensemble.
    """
    lin, prior, (outcome, again, wide, keep, path, cut) = problem.linearization, problem.prior, found
    if prior is not None:
        path = ()   # earlier iterates lead away from p, not from zero
        if outcome.status != "not_positive_definite":
            outcome = problem.from_prior(outcome)
    step, status, iterations, norm, gain, square, trace, slack, _ = outcome
    dtype = dtype or lin.dtype
    damping, detail = problem.mu if problem.scale is None else problem.damping_diagonal, ""
    if not abs(gain) + square + trace < math.inf and (status == "not_positive_definite" or not abs(gain) + square < math.inf):
        status, again, detail = "not_finite", None, not_finite(lin() if callable(lin) else lin)
        step, gain, square, slack, path, prior = torch.zeros_like(step), 0.0, 0.0, 0.0, (), None
    return Solution(
        step if step.dtype is dtype else step.to(dtype), status, iterations, name, reason, gain,
        problem.mu * square if problem.scale is None else problem.damped(step, square), lin, damping,
        norm if name in ("cg", "lsmr") else None, wide, slack, path, keep or {}, prior, again, detail, cut,
    )


def not_finite(lin) -> str:
    """Advice where a matrix or a step is not finite: the residuals whose rows of J are not. Costs one JVP."""
    pushed = lin.jvp(torch.ones(lin.num_parameters, dtype=lin.dtype, device=lin.device))
    rows = (~(torch.isfinite(pushed) & torch.isfinite(lin.residual))).nonzero().flatten().tolist()
    if not rows:
        return ADVICE["not_finite"]
    named = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
    return (
        f"the Jacobian has NaN or infinity in the rows of {len(rows)} of {lin.num_residuals} residuals ({named}), counted from "
        "0: an operation of the closure has no finite derivative there (sqrt or norm at 0, log, division); more damping cannot "
        "help"
    )


def _solve_all(problem: Problem, mus, solver, options: CG, rcond, wide, keep, time) -> Sequence[Solution]:
    """The Solutions for ascending, different mus."""
    first: list[Solution] = []
    if mus[0] == 0 and len(mus) > 1 and solver not in ("auto", "eigh"):
        name, reason = choose(problem, solver, options, wide)
        if name != solver:   # mu = 0 needs the pseudo-inverse; the others what was asked for
            first = [solution(name, reason, problem, BY_NAME[name].solve(problem, options, rcond, wide, keep, time))]
            mus, problem = mus[1:], problem.at(mus[1])
    name, reason = choose(problem, solver, options, wide, len(mus))
    found = BY_NAME[name].solve_all(problem, mus, options, rcond)
    if found is None:
        return first + _in_turn(name, reason, problem, mus, options, rcond, wide, keep, time)
    if name == "cg":
        reason += f"; one Krylov space for {len(mus)} dampings"

    def make(k):   # behind those found before; each when it is asked for
        k -= len(first)
        return solution(name, reason, problem.at(mus[k]), found[k])

    solutions = OnDemand([*first, *[None] * len(mus)], make)
    if problem.prior is not None:   # then products with J are still to be made, at the present parameters
        list(solutions)
    return solutions


def _in_turn(name, reason, problem, mus, options: CG, rcond, wide, keep, time) -> list[Solution]:
    """One after another: the direct solvers on a matrix that is kept, the least mu first, CG from the largest mu down."""
    iterative, start = name in ("cg", "lsmr"), options.warm_start
    if name == "cg" and len(mus) > 1:
        warm = options.preconditioner is not None
        options = replace(options, warm_start=start or warm)
        cause = "a preconditioner, truncation or a progress stop is not shared between dampings"
        reason += f"; one after another, {'each from the last one, ' if warm or start else ''}since {cause}"
    solutions, shared = {}, []
    for mu in reversed(mus) if iterative else mus:
        one, was_wide = problem.at(mu), wide
        found = BY_NAME[name].solve(one, options, rcond, wide, keep, time)
        wide, keep = found.wide, found.keep
        if not iterative and found.again is not None:
            again = _Refactored(name, one, (options, rcond, was_wide, None, 0), shared)
            found = found._replace(again=again, outcome=found.outcome._replace(factor=None))   # its memory serves the next
        solutions[mu] = solution(name, reason, one, found)
    if not start:
        for s in solutions.values():
            s.keep = {what: value for what, value in s.keep.items() if what != "start"}
    return [solutions[mu] for mu in mus]


class _Refactored:
    """Solution.solve_with_same_factor of one of several solves: its factor is made anew at its first use.

    Of all that have `shared` in common, a list, one has a factor.
    """

    def __init__(self, name: str, problem: Problem, arguments, shared: list):
        self._given, self._shared, self._again = (name, problem, arguments), shared, None

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        if self._again is None:
            name, problem, arguments = self._given
            for other in self._shared:
                other._again = None
            self._again = BY_NAME[name].solve(problem, *arguments).again
            self._shared[:] = [self]
        return self._again(u)
