"""Conjugate gradients on the damped normal equations, matrix-free: one loop for one system and for many.

What happens when is decided by kernels/cg_rules.py, from the C++ core's and Triton's loops on the same rules.
"""

from __future__ import annotations

import torch

from ..kernels import cg_rules
from ..kernels.cg_rules import CHECK, ENDED, ITERATE, MAX_ITERATIONS, SOLVED, START
from ..kernels.protocol import STATUS
from .options import CG


class One:
    """One system: vectors are (P,), numbers are the host's."""

    rules = cg_rules.rules_with(cg_rules.where)
    where = staticmethod(cg_rules.where)
    any = staticmethod(bool)
    larger = staticmethod(max)

    @staticmethod
    def dot(x, y):
        """<x, y>, in the precision of the vectors."""
        return float(torch.dot(x, y))

    @staticmethod
    def norm(x):
        """||x||, summed in float64."""
        return float(torch.linalg.vector_norm(x, dtype=torch.float64))

    @staticmethod
    def times(number, x):
        """Number x."""
        return number * x

    @staticmethod
    def update(moves, renews, step, x, residual, p, Aw, b):
        """(x, residual) after a step along p, or with the true residual."""
        if moves:
            return x + step * p, residual - step * Aw
        return x, b - Aw if renews else residual

    @staticmethod
    def turned(turns, restart, beta, z, p):
        """The next direction."""
        if not turns:
            return p
        return z if restart else z + beta * p

    @classmethod
    def reached(cls, checks, value, b, x, residual):
        """The model's reduction at x by its true residual, in a check."""
        return 0.5 * (cls.dot(b, x) + cls.dot(residual, x)) if checks else value

    @staticmethod
    def numbers(like, listed, *values):
        """Numbers of these values for every system, but the second for systems that are not listed."""
        return values[0]

    @staticmethod
    def history(count, value):
        """What `store` fills."""
        return {}

    @staticmethod
    def store(history, iteration, value):
        """Note the value at an iteration."""
        history[iteration] = value

    @staticmethod
    def at(history, iteration):
        """The value at an iteration."""
        return history.get(iteration, 0.0)


class Many:
    """Many systems: vectors are (K, P), numbers (K,), float64, and stay on their device."""

    rules = cg_rules.rules_with(lambda which, a, b: torch.where(which, a, b))

    @staticmethod
    def where(which, a, b):
        """Items or rows of a or b."""
        return torch.where(which if a.dim() == 1 else which[:, None], a, b)

    @staticmethod
    def any(which):
        """Whether one is true; waits for the device."""
        return bool(which.any())

    @staticmethod
    def larger(a, b):
        """Max(a, b), b a number."""
        return torch.clamp_min(a, b)

    @staticmethod
    def dot(x, y):
        """Inner products, (K,), in float64."""
        return (x.double() * y.double()).sum(1)

    @classmethod
    def norm(cls, x):
        """Norms, (K,)."""
        return cls.dot(x, x).sqrt()

    @staticmethod
    def times(number, x):
        """Number_k x_k."""
        return number.to(x.dtype)[:, None] * x

    @classmethod
    def update(cls, moves, renews, step, x, residual, p, Aw, b):
        """As One's."""
        renewed = cls.where(renews, b - Aw, residual)
        return (
            cls.where(moves, x + cls.times(step, p), x), cls.where(moves, residual - cls.times(step, Aw), renewed),
        )

    @classmethod
    def turned(cls, turns, restart, beta, z, p):
        """As One's."""
        return cls.where(turns, cls.where(restart, z, z + cls.times(beta, p)), p)

    @classmethod
    def reached(cls, checks, value, b, x, residual):
        """As One's."""
        return 0.5 * (cls.dot(b, x) + cls.dot(residual, x))

    @staticmethod
    def numbers(like, listed, value, otherwise=None):
        """(K,) numbers of a value, or of another for systems that are not listed."""
        made = torch.full(like.shape, value if otherwise is None else otherwise, device=like.device)
        if otherwise is not None:
            made[listed] = value
        return made

    @staticmethod
    def history(count, value):
        """What `store` fills."""
        return value.new_zeros(count + 1, len(value))

    @staticmethod
    def store(history, iteration, value):
        """Note the values at the systems' iterations."""
        history.scatter_(0, iteration[None], value[None])

    @staticmethod
    def at(history, iteration):
        """The values at the systems' iterations."""
        return history.gather(0, iteration[None])[0]


def conjugate_gradients(apply, b, precondition, options: CG, kind, start=None, path=None, listed=None):
    """Preconditioned CG on A x = b; x and, of every system, status, iterations, ||residual|| / ||b||, <b, x>, <x, x>, <r, x>.

    Cost: one product with A per iteration, one more for every true residual. For many systems a turn's product serves all,
    whatever each of them does with it, and the host asks once in a turn whether all have ended.

    Args:
        apply: x -> A x.
        b: the right-hand side, (P,), or (K, P) with kind Many.
        precondition: residual -> z.
        options: limits.
        kind: One or Many.
        start: like b; each system begins at the best multiple of its own, which is never worse than zero. None for zero.
        path: (slots, P), for One: gets the iterates 1, 2, 4, ..., in turn; the last item returned then lists them as (slot,
            iteration, gain, square, slack).
        listed: the systems to be solved, for Many; the others stay at zero.
    """
    rules, dot = kind.rules, kind.dot
    b_norm = kind.norm(b)
    target = kind.larger(options.tolerance * b_norm, options.absolute)
    x, residual, value = torch.zeros_like(b), b, 0.0 * b_norm
    if start is not None:
        product = apply(start)
        along = dot(b, start)
        fits, t = rules.multiple_of_start(along, dot(start, product))
        x = kind.where(fits, kind.times(t, start), x)
        residual = kind.where(fits, b - kind.times(t, product), residual)
        value = kind.where(fits, 0.5 * t * along, value)
    phase = kind.numbers(b_norm, listed, CHECK if start is None else START, ENDED)
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
