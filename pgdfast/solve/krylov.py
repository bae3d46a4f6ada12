"""Conjugate gradients on the damped normal equations, matrix-free: one loop for one system and for many.

What follows from an iteration's numbers is decided by kernels/cg_rules.py, as in Triton's loop; the C++ core and the CUDA
kernels have whole solves of their own by the same rules.
"""

from __future__ import annotations

import math

import torch

from ..kernels import cg_rules
from ..kernels.cg_rules import CHECK, ENDED, ITERATE, MAX_ITERATIONS, SOLVED, START
from ..kernels.limits import PATH_SLOTS, SHIFT_PANEL, SHIFT_PROBES
from ..kernels.protocol import STATUS, Outcome
from .multishift import multishift
from .options import CG, Nystrom
from .preconditioner import nystrom, preconditioner
from .problem import Found, Problem
from .sizes import SWEEP, Sizes


class _One:
    """One system: vectors are (P,), numbers the host's; inner products in the precision of the vectors."""

    rules = cg_rules.rules_with(cg_rules.where)
    where = staticmethod(cg_rules.where)
    any = staticmethod(bool)
    larger = staticmethod(max)
    dot = staticmethod(lambda x, y: float(torch.dot(x, y)))
    norm = staticmethod(lambda x: float(torch.linalg.vector_norm(x, dtype=torch.float64)))
    times = staticmethod(lambda number, x: number * x)
    numbers = staticmethod(lambda like, listed, *values: values[0])
    history = staticmethod(lambda count, value: {})
    store = staticmethod(dict.__setitem__)
    at = staticmethod(lambda history, iteration: history.get(iteration, 0.0))

    @staticmethod
    def update(moves, renews, step, x, residual, p, Aw, b):
        if moves:
            return x + step * p, residual - step * Aw
        return x, b - Aw if renews else residual

    @staticmethod
    def turned(turns, restart, beta, z, p):
        if not turns:
            return p
        return z if restart else z + beta * p

    @classmethod
    def reached(cls, checks, value, b, x, residual):
        return 0.5 * (cls.dot(b, x) + cls.dot(residual, x)) if checks else value


class _Many:
    """Many systems: vectors are (K, P), numbers (K,), float64, and stay on their device; `any` waits for it."""

    rules = cg_rules.rules_with(lambda which, a, b: torch.where(which, a, b))
    where = staticmethod(lambda which, a, b: torch.where(which if a.dim() == 1 else which[:, None], a, b))
    any = staticmethod(lambda which: bool(which.any()))
    larger = staticmethod(torch.clamp_min)
    dot = staticmethod(lambda x, y: (x.double() * y.double()).sum(1))
    times = staticmethod(lambda number, x: number.to(x.dtype)[:, None] * x)
    history = staticmethod(lambda count, value: value.new_zeros(count + 1, len(value)))
    store = staticmethod(lambda history, iteration, value: history.scatter_(0, iteration[None], value[None]))
    at = staticmethod(lambda history, iteration: history.gather(0, iteration[None])[0])

    @classmethod
    def norm(cls, x):
        return cls.dot(x, x).sqrt()

    @staticmethod
    def numbers(like, listed, value, otherwise=None):
        made = torch.full(like.shape, value if otherwise is None else otherwise, device=like.device)
        if otherwise is not None:   # for systems that are not listed
            made[listed] = value
        return made

    @classmethod
    def update(cls, moves, renews, step, x, residual, p, Aw, b):
        renewed = cls.where(renews, b - Aw, residual)
        return cls.where(moves, x + cls.times(step, p), x), cls.where(moves, residual - cls.times(step, Aw), renewed)

    @classmethod
    def turned(cls, turns, restart, beta, z, p):
        return cls.where(turns, cls.where(restart, z, z + cls.times(beta, p)), p)

    @classmethod
    def reached(cls, checks, value, b, x, residual):
        return 0.5 * (cls.dot(b, x) + cls.dot(residual, x))


ONE, MANY = _One, _Many


def conjugate_gradients(apply, b, precondition, options: CG, kind, start=None, path=None, listed=None):
    """Preconditioned CG on A x = b; x and, of every system, status, iterations, ||residual|| / ||b||, <b, x>, <x, x>, <r, x>.

    Cost: one product with A per iteration, one more for every true residual. For many systems a turn's product serves all,
    whatever each of them does with it, and the host asks once in a turn whether all have ended.

    Args:
        apply: x -> A x.
        b: the right-hand side, (P,), or (K, P) with kind MANY.
        precondition: residual -> z.
        options: limits.
        kind: ONE or MANY.
        start: like b; each system begins at the best multiple of its own, which is never worse than zero. None for zero.
        path: (slots, P), for ONE: gets the iterates 1, 2, 4, ..., in turn; the last item returned then lists them as (slot,
            iteration, gain, square, slack).
        listed: the systems to be solved, for MANY; the others stay at zero.
    """
    rules, dot = kind.rules, kind.dot
    b_norm = kind.norm(b)
    target = kind.larger(options.tolerance * b_norm, options.absolute)
    x, residual, value = torch.zeros_like(b), b, 0.0 * b_norm
    phase = kind.numbers(b_norm, listed, CHECK if start is None else START, ENDED)
    if start is not None:
        product = apply(start)
        along = dot(b, start)
        fits, t = rules.multiple_of_start(along, dot(start, product))
        fits = fits & (phase == START)
        x = kind.where(fits, kind.times(t, start), x)
        residual = kind.where(fits, b - kind.times(t, product), residual)
        value = kind.where(fits, 0.5 * t * along, value)
    status = kind.numbers(b_norm, listed, MAX_ITERATIONS, SOLVED)
    iteration, claimed = kind.numbers(b_norm, listed, 0), kind.numbers(b_norm, listed, False)
    broken, step = claimed, value
    safe, safe_x, last_claim, reached, slots = value, x, b_norm, value, {}
    recurrence = norm = kind.norm(residual)
    z = p = precondition(residual)
    before = rz = dot(residual, z)
    history = kind.history(options.max_iterations, value) if options.progress else None
    while True:
        phase, status, iteration, claimed, value, recurrence, last_claim, safe, keeps, restores, restart, goes_on = rules.judge(
            phase, status, iteration, claimed, broken, step, before, norm, target, value, recurrence, last_claim, safe, reached
        )
        window, earlier = rules.progress_window(iteration), value
        if history is not None:
            kind.store(history, iteration, value)
            earlier = kind.at(history, kind.larger(iteration - window, 0))
        phase, status = rules.go_on(
            phase, status, goes_on, iteration, window, value, earlier, options.progress, options.max_iterations
        )
        safe_x = kind.where(keeps, x, safe_x)
        x = kind.where(restores, safe_x, x)
        if not kind.any(phase != ENDED):
            break
        turns = phase == ITERATE
        p = kind.turned(turns, restart, rules.direction_factor(restart, rz, before), z, p)
        Aw = apply(kind.where(turns, p, x))
        step, broken = rules.step_length(phase, dot(p, Aw), rz)
        moves = turns & (broken == 0)
        x, residual = kind.update(moves, (turns == 0) & (phase != ENDED), step, x, residual, p, Aw, b)
        if path is not None and moves and iteration & (iteration + 1) == 0:
            slot = iteration.bit_length() % len(path)
            path[slot] = x
            slots[slot] = (slot, iteration + 1, dot(b, x), dot(x, x), dot(residual, x))
        before = kind.where(turns, rz, before)
        norm, z = kind.norm(residual), precondition(residual)
        rz, reached = dot(residual, z), kind.reached(phase == CHECK, value, b, x, residual)
    relative = norm / kind.where(b_norm > 0, b_norm, b_norm + 1)
    return x, status, iteration, relative, dot(b, x), dot(x, x), dot(residual, x), list(slots.values())


def cg_with(kernels):
    """Kernels.cg: the kernels' own, or the same in PyTorch."""
    if kernels.has_cg:
        return kernels.cg

    def run(r, d, q, preconditioner, start, path, options):
        inverse, V, c = preconditioner

        def apply(x):
            return (kernels.product(x) if kernels.has_product else kernels.vjp(kernels.jvp(x))) + d * x

        def precondition(x):
            z = x if inverse is None else inverse * x
            return z if V is None else z + V.T @ (c * (V @ x))

        b = kernels.vjp(r)
        x, status, iterations, norm, gain, square, slack, kept = conjugate_gradients(
            apply, b if q is None else b + q, precondition, options, ONE, start, path
        )
        return Outcome(x, STATUS[status], iterations, norm, gain, square, 0.0, slack), kept

    return run


def cg(problem: Problem, options: CG, keep: dict | None = None, time: int = 0) -> Found:
    """Preconditioned CG in the precision of the problem; see conjugate_gradients.

    keep: what the last solve kept, for a warm start or a sketch, which ages by `time`, the optimizer's step.
    """
    lin, d, P, keep, kept = problem.linearization, problem.diagonal(), problem.linearization.num_parameters, keep or {}, {}
    if isinstance(options.preconditioner, Nystrom):
        sketch = keep.get("sketch")
        if sketch is None or sketch["rows"].shape[1] != P or time - sketch["made"] >= options.preconditioner.refresh:
            sketch = nystrom(problem, options.preconditioner)
            sketch = sketch and sketch | {"made": time}
        kept["sketch"] = sketch
    M = preconditioner(problem, options, kept.get("sketch"))
    start = keep.get("start") if options.warm_start else None
    start = start.to(lin.dtype) if start is not None and start.shape == (P,) else None
    path = torch.empty(PATH_SLOTS, P, dtype=lin.dtype, device=lin.device) if options.truncate else None
    outcome, slots = cg_with(lin.kernels())(problem.r, d, problem.q, M, start, path, options)
    if options.warm_start and math.isfinite(outcome.square):
        kept["start"] = outcome.step.to(lin.params[0].dtype)

    def again(u):
        return cg_with(lin.kernels())(u.to(lin.dtype), d, None, M, None, None, options)[0].step

    slots = sorted(slots, key=lambda item: item[1])
    return Found(outcome, again, False, kept, tuple((k, path[slot], *rest) for slot, k, *rest in slots))


class ConjugateGradients:
    """The solver "cg"."""

    name, automatic = "cg", 1

    def solve(self, problem, options, rcond, wide, keep, time) -> Found:
        """One solve, in float64 where its tolerance needs that."""
        return cg(problem.for_iterations(options), options, keep, time)

    def solve_all(self, problem, mus, options, rcond) -> list[Found] | None:
        """Multi-shift CG where one Krylov space serves all dampings."""
        if not options.shifts or len(mus) < 2:
            return None
        problem = problem.for_iterations(options)
        found = multishift(problem, mus, options, cg)
        if options.warm_start:
            start = found[0].outcome.step.to(problem.linearization.params[0].dtype)
            found = [one._replace(keep={"start": start}) for one in found]
        return found

    def operations(self, s: Sizes) -> float:
        """See Solver."""
        M, P, options, dampings = s.M, s.P, s.options, s.dampings
        iterations = min(options.max_iterations, M, P)
        count = iterations * (2 * SWEEP * s.sweep + s.kernels.remake) + 2 * s.sweep
        if not s.kernels.matrix_free:
            count = s.jacobian + iterations * 4 * SWEEP * M * P
        if isinstance(options.preconditioner, Nystrom):   # its use in every iteration, and its making in one step of `refresh`
            rank, refresh = min(options.preconditioner.rank, P), options.preconditioner.refresh
            count += 4 * rank * P * iterations + (rank * 2 * SWEEP * s.sweep + 6 * rank**2 * P) / refresh
        if dampings > 1:
            count = count + 4 * dampings * P * iterations if options.shifts else dampings * count
        return count

    def bytes(self, s: Sizes) -> float:
        """See Solver."""
        P, options, width, total = s.P, s.options, s.width, s.krylov
        if s.scaled or options.preconditioner is not None:
            total += width * P
        if options.preconditioner == "jacobi" and not s.local:
            total += s.jacobian_bytes + s.sweeps
        if isinstance(options.preconditioner, Nystrom):
            total += 5 * width * min(options.preconditioner.rank, P) * P   # products, factors of the sketch, the sketch
        if options.warm_start:
            total += width * P
        if options.truncate:
            total += PATH_SLOTS * width * P
        if s.dampings > 1 and options.shifts:
            total += width * (s.dampings + SHIFT_PANEL + SHIFT_PROBES) * P
        return s.steps + total
