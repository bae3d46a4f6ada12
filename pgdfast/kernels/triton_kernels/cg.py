"""The vectors of one iteration of conjugate gradients in three passes, its scalars on the device.

    dots     Aw += d w;                  sums <w, Aw>, <b, w>
    update   x += a p, r -= a A p;       sums <r, r>, <r, m r>       a = <r, z> / <p, A p>
    turn     p = z + b p                 z = m r (or given),         b = <r, z> / <r, z> before

A slot is one product with A. Where the true residual is due, the slot's product is that of x (w = x instead of p), update
sets r = b - A x, and turn judges by the rules of cg_rules.py, so that nothing of it needs the host; once a solve has ended its
slots change nothing. Sums are made in float64 of partial sums in a fixed order.
"""

import torch
import triton
import triton.language as tl

from .. import cg_rules
from .launch import cdiv

BLOCK, PROGRAMS = 1024, 256

# Scalars of a solve: float64, in two copies, of which `turn` reads one and writes the other.
RZ, NORM, TARGET, VALUE, ITERATIONS, STATUS, PHASE, RECURRENCE, LAST_CLAIM, SAFE, CLAIMED, BEFORE = range(12)
SIZE = 12


@triton.jit
def _where(which, a, b):
    return tl.where(which, a, b)


_rules = cg_rules.rules_with(_where, triton.jit, tl.constexpr, tl=tl)
_step_length, _judge, _progress_window, _go_on, _direction_factor = (
    _rules.step_length, _rules.judge, _rules.progress_window, _rules.go_on, _rules.direction_factor
)
_ITERATE, _ENDED = tl.constexpr(cg_rules.ITERATE), tl.constexpr(cg_rules.ENDED)


@triton.jit
def _dots(Aw, w, d, b, first, size, part, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    start = pid.to(tl.int64) * part
    stop = tl.minimum(start + part, size)
    wAw = tl.zeros([BLOCK], tl.float64)
    bw = tl.zeros([BLOCK], tl.float64)
    for begin in range(start, stop, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        inside = i < stop
        here = tl.load(w + i, mask=inside, other=0)
        product = tl.load(Aw + i, mask=inside, other=0) + tl.load(d + i, mask=inside, other=0) * here
        tl.store(Aw + i, product, mask=inside)
        wAw += here.to(tl.float64) * product.to(tl.float64)
        bw += here.to(tl.float64) * tl.load(b + i, mask=inside, other=0).to(tl.float64)
    tl.store(first + pid, tl.sum(wAw, 0))
    tl.store(first + PROGRAMS + pid, tl.sum(bw, 0))


@triton.jit
def _update(
    x, r, p, Aw, b, m, state, first, second, size, part, programs,
    HAS_M: tl.constexpr, PATH: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    start = pid.to(tl.int64) * part
    stop = tl.minimum(start + part, size)
    parts = tl.arange(0, PROGRAMS)   # sums of all programs, in their order
    curvature, rz = tl.sum(tl.load(first + parts, mask=parts < programs, other=0.0), 0), tl.load(state + 0)
    phase = tl.load(state + 6).to(tl.int32)
    step, broken = _step_length(phase, curvature, rz)
    moves = (phase == _ITERATE) & (broken == 0)
    renews = (phase != _ITERATE) & (phase != _ENDED)
    step = step.to(x.dtype.element_ty)
    rr = tl.zeros([BLOCK], tl.float64)
    rmr = tl.zeros([BLOCK], tl.float64)
    bx = tl.zeros([BLOCK], tl.float64)
    xx = tl.zeros([BLOCK], tl.float64)
    rx = tl.zeros([BLOCK], tl.float64)
    for begin in range(start, stop, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        inside = i < stop
        here = tl.load(r + i, mask=inside, other=0)
        product = tl.load(Aw + i, mask=inside, other=0)
        point = tl.load(x + i, mask=inside, other=0)
        along = tl.load(p + i, mask=inside, other=0)
        right = tl.load(b + i, mask=inside, other=0)
        here = tl.where(moves, here - step * product, tl.where(renews, right - product, here))
        point = tl.where(moves, point + step * along, point)
        tl.store(r + i, here, mask=inside)
        tl.store(x + i, point, mask=inside)
        wide = here.to(tl.float64)
        rr += wide * wide
        if HAS_M:
            rmr += wide * (tl.load(m + i, mask=inside, other=0) * here).to(tl.float64)
        else:
            rmr += wide * wide
        if PATH:
            bx += right.to(tl.float64) * point.to(tl.float64)
            xx += point.to(tl.float64) * point.to(tl.float64)
            rx += wide * point.to(tl.float64)
    tl.store(second + pid, tl.sum(rr, 0))
    tl.store(second + PROGRAMS + pid, tl.sum(rmr, 0))
    if PATH:
        tl.store(second + 2 * PROGRAMS + pid, tl.sum(bx, 0))
        tl.store(second + 3 * PROGRAMS + pid, tl.sum(xx, 0))
        tl.store(second + 4 * PROGRAMS + pid, tl.sum(rx, 0))


@triton.jit
def _dot(r, z, partial, size, part, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    start = pid.to(tl.int64) * part
    stop = tl.minimum(start + part, size)
    acc = tl.zeros([BLOCK], tl.float64)
    for begin in range(start, stop, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        inside = i < stop
        acc += tl.load(r + i, mask=inside, other=0).to(tl.float64) * tl.load(z + i, mask=inside, other=0).to(tl.float64)
    tl.store(partial + pid, tl.sum(acc, 0))


@triton.jit
def _turn(
    p, w, x, r, z, m, safe, state, new, values, path, kept, first, second, size, part, programs, max_iterations, progress,
    slots, HAS_M: tl.constexpr, GIVEN: tl.constexpr, PATH: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    start = pid.to(tl.int64) * part
    stop = tl.minimum(start + part, size)
    parts = tl.arange(0, PROGRAMS)   # sums of all programs, in their order
    every = parts < programs
    curvature = tl.sum(tl.load(first + parts, mask=every, other=0.0), 0)
    bw = tl.sum(tl.load(first + PROGRAMS + parts, mask=every, other=0.0), 0)
    norm = tl.sqrt(tl.sum(tl.load(second + parts, mask=every, other=0.0), 0))
    rz = tl.sum(tl.load(second + PROGRAMS + parts, mask=every, other=0.0), 0)
    before, target, value = tl.load(state + 0), tl.load(state + 2), tl.load(state + 3)
    count, status, phase = tl.load(state + 4).to(tl.int32), tl.load(state + 5).to(tl.int32), tl.load(state + 6).to(tl.int32)
    recurrence, last_claim, safe_value = tl.load(state + 7), tl.load(state + 8), tl.load(state + 9)
    step, broken = _step_length(phase, curvature, before)
    moved = (phase == _ITERATE) & (broken == 0)
    alive = phase != _ENDED
    before = tl.where(phase == _ITERATE, before, tl.load(state + 11))
    reached = bw - 0.5 * curvature   # 1/2 <b + r, x>, where w = x
    phase, status, count, claimed, value, recurrence, last_claim, safe_value, keeps, restores, restart, goes_on = _judge(
        phase, status, count, tl.load(state + 10) != 0, broken, step, before, norm, target, value, recurrence, last_claim,
        safe_value, reached,
    )
    window = _progress_window(count)
    earlier = tl.load(values + tl.maximum(count - window, 0), mask=goes_on, other=0.0)
    phase, status = _go_on(phase, status, goes_on, count, window, value, earlier, tl.load(progress), max_iterations)
    beta = _direction_factor(restart, rz, before).to(p.dtype.element_ty)
    turns = phase == _ITERATE
    power = moved & ((count & (count - 1)) == 0)
    slot = count.to(tl.int64) * 0   # log2 of a power of two
    if PATH:
        for e in tl.static_range(1, 31):
            slot += (count >= (1 << e)).to(tl.int64)
        slot = slot % slots
    for begin in range(start, stop, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        inside = i < stop
        point = tl.load(x + i, mask=inside, other=0)
        along = tl.load(p + i, mask=inside, other=0)
        if GIVEN:
            here = tl.load(z + i, mask=inside, other=0)
        else:
            here = tl.load(r + i, mask=inside, other=0)
            if HAS_M:
                here *= tl.load(m + i, mask=inside, other=0)
        along = tl.where(turns, tl.where(restart, here, here + beta * along), along)
        tl.store(p + i, along, mask=inside)
        kept_point = tl.load(safe + i, mask=inside, other=0)
        tl.store(safe + i, tl.where(keeps, point, kept_point), mask=inside)
        tl.store(x + i, tl.where(restores, kept_point, point), mask=inside)
        tl.store(w + i, tl.where(turns, along, tl.where(restores, kept_point, point)), mask=inside)
        if PATH:
            if power:
                tl.store(path + slot * size + i, point, mask=inside)
    if pid == 0:
        tl.store(new + 0, tl.where(alive, rz, tl.load(state + 0)))
        tl.store(new + 1, tl.where(alive, norm, tl.load(state + 1)))
        tl.store(new + 2, target)
        tl.store(new + 3, value)
        tl.store(new + 4, count)
        tl.store(new + 5, status)
        tl.store(new + 6, phase)
        tl.store(new + 7, recurrence)
        tl.store(new + 8, last_claim)
        tl.store(new + 9, safe_value)
        tl.store(new + 10, tl.where(claimed, 1.0, 0.0))
        tl.store(new + 11, before)
        tl.store(values + count, value)
        if PATH:
            if power:
                at = kept + slot * 4
                tl.store(at, count)
                tl.store(at + 1, tl.sum(tl.load(second + 2 * PROGRAMS + parts, mask=every, other=0.0), 0))
                tl.store(at + 2, tl.sum(tl.load(second + 3 * PROGRAMS + parts, mask=every, other=0.0), 0))
                tl.store(at + 3, tl.sum(tl.load(second + 4 * PROGRAMS + parts, mask=every, other=0.0), 0))


class Passes:
    """The three passes over vectors of one size, and the room for their sums."""

    def __init__(self, like):
        self.size = like.numel()
        self.part = cdiv(cdiv(self.size, PROGRAMS), BLOCK) * BLOCK or BLOCK
        self.programs = max(1, cdiv(self.size, self.part))
        wide = like.new_empty(7, PROGRAMS, dtype=torch.float64)
        self.first, self.second = wide[:2], wide[2:]

    def dots(self, Aw, w, d, b):
        """Add d w to Aw; <w, Aw> and <b, w>."""
        _dots[(self.programs,)](Aw, w, d, b, self.first, self.size, self.part, PROGRAMS=PROGRAMS, BLOCK=BLOCK)

    def update(self, x, r, p, Aw, b, m, state, path: bool):
        """Move x and r by a step along p, or set r = b - Aw in a check; m: inverse diagonal or None."""
        _update[(self.programs,)](
            x, r, p, Aw, b, r if m is None else m, state, self.first, self.second, self.size, self.part, self.programs,
            HAS_M=m is not None, PATH=path, PROGRAMS=PROGRAMS, BLOCK=BLOCK,
        )

    def weigh(self, r, z):
        """<r, z> in place of <r, m r>, for a preconditioner that is more than a diagonal."""
        _dot[(self.programs,)](r, z, self.second[1], self.size, self.part, BLOCK=BLOCK)

    def turn(self, p, w, x, r, z, m, safe, state, new, values, path, kept, max_iterations, progress):
        """Decide, write the new scalars, p = z + b p, and w, of which the next product is; z: given or None."""
        _turn[(self.programs,)](
            p, w, x, r, r if z is None else z, r if m is None else m, safe, state, new, values, x if path is None else path,
            values if kept is None else kept, self.first, self.second, self.size, self.part, self.programs, max_iterations,
            progress, 1 if path is None else len(path), HAS_M=m is not None, GIVEN=z is not None, PATH=path is not None,
            PROGRAMS=PROGRAMS, BLOCK=BLOCK,
        )
