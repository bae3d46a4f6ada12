"""Conjugate gradients on the damped normal equations, matrix-free."""

from __future__ import annotations

import math

import torch

from .options import CG, Nystrom
from .preconditioner import nystrom, preconditioner
from .problem import Found, Problem

SLOTS = 8   # iterates kept for truncation: the last powers of two
FALL = 1e-3   # part of the model's reduction whose loss means that rounding has taken over (csrc/cpu/cg.cpp)


def cg(problem: Problem, options: CG, keep: dict | None = None, time: int = 0) -> tuple[Found, dict]:
    """Preconditioned CG on (diag(d) + J^T J) delta = g; and what the next solve wants to know.

    keep: what the last solve returned; time: the optimizer's step, by which a sketch ages. Cost per iteration: one JVP and
    one VJP. Arrival is judged by the true residual, which is recomputed every 50 iterations and whenever the recurrence
    claims to have arrived; CG restarts from it where the two differ, until that no longer helps, and returns to the last
    check where the model's value has fallen since.
    """
    lin, keep = problem.linearization, keep or {}
    operator, d, P = lin.operator, problem.diagonal(), lin.num_parameters
    kept = {}
    if isinstance(options.preconditioner, Nystrom):
        sketch = keep.get("sketch")
        if sketch is None or sketch["rows"].shape[1] != P or time - sketch["made"] >= options.preconditioner.refresh:
            sketch = nystrom(problem, options.preconditioner)
            sketch = sketch and sketch | {"made": time}
        kept["sketch"] = sketch
    M = preconditioner(problem, options, kept.get("sketch"))
    start = keep.get("start") if options.warm_start else None
    start = start.to(lin.dtype) if start is not None and start.shape == (P,) else None
    path = torch.empty(SLOTS, P, dtype=lin.dtype, device=lin.device) if options.truncate else None
    run = operator.cg if operator.has_cg else _of(lin)
    found, slots = run(problem.r, d, problem.q, M, start, path, options)
    found = Found(
        *found[:8], tuple((k, path[slot], *rest) for slot, k, *rest in sorted(slots, key=lambda item: item[1])),
        again=lambda u: run(u, d, None, M, None, None, options)[0][0],
    )
    if options.warm_start and math.isfinite(found.square):
        kept["start"] = found.step.to(lin.params[0].dtype)
    return found, kept


def _of(lin):
    """CG in PyTorch with the signature of the native core's (kernels/native.py)."""

    def run(r, d, q, preconditioner, start, path, options):
        return _cg(lin, r, d, q, preconditioner, start, path, options)

    return run


def _cg(lin, r, d, q, preconditioner, start, path, options: CG):
    inverse, V, c = preconditioner

    def apply(x):
        return lin.vjp(lin.jvp(x)) + d * x

    def dot(x, y):
        return float(torch.dot(x, y))

    def norm_of(x):
        return float(torch.linalg.vector_norm(x, dtype=torch.float64))

    def precondition(x):
        z = x if inverse is None else inverse * x
        return z if V is None else z + V.T @ (c * (V @ x))

    b = lin.vjp(r)
    b = b if q is None else b + q
    x, residual, slots = torch.zeros_like(b), b.clone(), {}
    b_norm = norm = norm_of(b)
    target = max(options.tolerance * b_norm, options.absolute)
    if b_norm == 0:
        return (x, "solved", 0, 0.0, 0.0, 0.0, 0.0, 0.0), []
    values = [0.0]   # the model's reduction at every iterate
    if start is not None:
        product = apply(start)
        along, curvature = dot(b, start), dot(start, product)
        if math.isfinite(along) and 0 < curvature < math.inf:
            t = along / curvature
            x, residual, values = t * start, b - t * product, [0.5 * t * along]
            norm = norm_of(residual)
    safe = values[0], x.clone()
    z = precondition(residual)
    p, rz = z.clone(), dot(residual, z)
    status, iterations, last_claim = "solved" if norm <= target else "max_iterations", 0, b_norm
    while status == "max_iterations" and iterations < options.max_iterations:
        Ap = apply(p)
        curvature = dot(p, Ap)
        if not (curvature > 0 and rz > 0):
            status = "breakdown"
            break
        step = rz / curvature
        x += step * p
        residual = residual - step * Ap
        values.append(values[-1] + 0.5 * step * rz)
        iterations += 1
        norm = norm_of(residual)
        if path is not None and iterations & (iterations - 1) == 0:
            slot = (iterations.bit_length() - 1) % len(path)
            path[slot] = x
            slots[slot] = (slot, iterations, dot(b, x), dot(x, x), dot(residual, x))
        claim, restart = norm <= target, False
        if claim or iterations % 50 == 0:
            recurrence, residual = norm, b - apply(x)
            norm = norm_of(residual)
            if norm <= target:
                status = "solved"
                break
            reached = 0.5 * (dot(b, x) + dot(residual, x))
            if not reached >= (1 - FALL) * safe[0]:
                x = safe[1]
                residual = b - apply(x)
                norm, status = norm_of(residual), "stagnated"
                break
            if iterations % 50 == 0:
                safe = reached, x.clone()
            restart = claim or norm > 1.1 * recurrence
            if restart and norm > 0.5 * last_claim:
                status = "stagnated"
                break
            last_claim = norm if restart else last_claim
        k = max(10, iterations // 10)
        if options.progress and iterations > k and values[-1] - values[-1 - k] < k * options.progress * values[-1]:
            status = "progress"
            break
        z = precondition(residual)
        following = dot(residual, z)
        p = z if restart else z + (following / rz) * p
        rz = following
    return (x, status, iterations, norm / b_norm, dot(b, x), dot(x, x), 0.0, dot(residual, x)), list(slots.values())
