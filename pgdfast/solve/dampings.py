"""The door to the solvers: one damping, or many from one linearisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from . import choice
from .multishift import multishift
from .options import CG
from .problem import WIDE_FACTOR, OnDemand, Problem
from .solution import Solution, Solutions
from .spectral import eigh


def solve(
    linearization, damping: float | Sequence[float] | torch.Tensor, *, scale=None, solver: str = "auto", cg: CG | None = None,
    rcond: float = 1e-8, wide: bool = False, keep: dict | None = None, time: int = 0, prior=None,
) -> Solution | Solutions:
    """Solve (mu D + J^T J) delta = J^T r + mu D p at a linearisation, for one mu or for many.

    damping: mu >= 0; 0 is Gauss-Newton, the pseudo-inverse cut at rcond. A list, tuple or 1-D tensor of K of them, in any
    order, gives Solutions, of which the linearisation is shared. scale: (P,) positive diagonal D, or None for the identity.
    prior: p, (P,), to which the damping pulls the step, or None for zero; two more products with J for each mu. solver: one of
    SOLVERS. cg: options of CG and LSMR. wide: for a float32 problem, sum in float64 at once instead of when float32 turns
    out too narrow. keep: `Solution.keep` of the last solve, for a warm start or a sketch; time: steps taken so far, by which
    a sketch ages. A step is subtracted from the parameters.

    Many dampings: "dual" and "primal" factor one matrix K times, "eigh" decomposes it once, "cg" makes one Krylov space
    (multi-shift CG) that begins at zero and stops for each mu by itself, "lsmr" solves one after another; "auto" takes the
    cheapest by predicted cost. With CG(preconditioner=...), truncate or progress CG solves one after another from the largest
    mu down, with a preconditioner each from the last one's solution; `reason` says so.
    Raises ValueError for a negative or non-finite damping, none at all, a scale or prior of the wrong shape and an unknown
    solver.
    """
    options = dict(scale=scale, solver=solver, cg=cg, rcond=rcond, wide=wide, keep=keep, time=time, prior=prior)
    if isinstance(damping, (int, float)):
        return choice.solve_one(linearization, damping, **options)
    mus = _checked(damping)
    choice.check(linearization, solver, scale, prior)
    levels = sorted(set(mus))
    if linearization.num_residuals == 0 and not linearization.penalties:
        found = [choice.nothing(linearization)] * len(levels)
    else:
        problem = Problem.of(linearization, levels[0], scale, prior)
        found = _solve_all(problem, levels, solver, cg or CG(), rcond, wide, keep, time)
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


def _solve_all(problem: Problem, mus, solver, options: CG, rcond, wide, keep, time) -> Sequence[Solution]:
    """The Solutions for ascending, different mus."""
    first: list[Solution] = []
    if mus[0] == 0 and len(mus) > 1 and solver not in ("auto", "eigh"):
        name, reason = choice.choose(problem, solver, options, wide)
        if name != solver:   # mu = 0 needs the pseudo-inverse; the others what was asked for
            first = [choice.solution(name, reason, problem, *choice.run(name, problem, options, rcond, wide, keep, time))]
            mus, problem = mus[1:], problem.at(mus[1])
    name, reason = choice.choose(problem, solver, options, wide, len(mus))
    if name == "eigh":
        small = problem.linearization.dtype == torch.float32 and _order(problem) <= WIDE_FACTOR
        found = eigh(problem.widened() if small else problem, mus, rcond, problem.linearization.dtype)
        return _made(name, reason, problem, mus, found, {}, first)
    if name == "cg" and options.shifts and len(mus) > 1:
        found = multishift(problem.widened() if choice.too_narrow(problem.linearization, options) else problem, mus, options)
        kept = {"start": found[0].step.to(problem.linearization.params[0].dtype)} if options.warm_start else {}
        why = f"{reason}; one Krylov space for {len(mus)} dampings"
        return _made(name, why, problem, mus, found, kept, first)
    return first + _in_turn(name, reason, problem, mus, options, rcond, wide, keep, time)


def _order(problem: Problem) -> int:
    return min(problem.linearization.num_residuals, problem.linearization.num_parameters)


def _made(name, reason, problem, mus, found, keep, first) -> Sequence[Solution]:
    """What one call of a solver found for all dampings, behind those found before; each a Solution when it is asked for."""
    def make(k):
        k -= len(first)
        return choice.solution(name, reason, problem.at(mus[k]), found[k], False, keep)

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
    held, solutions = [None], {}
    for mu in reversed(mus) if iterative else mus:
        one = problem.at(mu)
        was_wide = wide
        found, wide, keep = choice.run(name, one, options, rcond, wide, keep, time)
        if not iterative:
            found = found._replace(again=_Again(name, one, found.again, rcond, options, was_wide, held))
        solutions[mu] = choice.solution(name, reason, one, found, wide, keep)
    if not start:
        for s in solutions.values():
            s.keep = {what: value for what, value in s.keep.items() if what != "start"}
    return [solutions[mu] for mu in mus]


class _Again:
    """`Solution.again` of one damping of several: with its factor, which is made once more where another's is held."""

    def __init__(self, name, problem, again, rcond, options, wide, held):
        self._solve = lambda: choice.run(name, problem, options, rcond, wide, None, 0)[0].again
        self._again, self._held, self._mark = again, held, object()   # no cycle: it would keep the tape
        held[0] = self._mark

    def __call__(self, u):
        if self._held[0] is not self._mark:
            self._again = self._solve()
            self._held[0] = self._mark
        return self._again(u)
