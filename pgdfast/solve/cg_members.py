"""Conjugate gradients for many systems at once, in PyTorch: one product serves all, and members that have arrived rest."""

from __future__ import annotations

import torch

from .options import CG

_CHECK = 50   # iterations between true residuals, as for one system (csrc/cpu/cg.cpp)


def cg_together(lin, r, d, q, inverse, start, group: list[int], options: CG):
    """CG on (diag(d_b) + J_b^T J_b) delta_b = J_b^T r_b + q_b for the members in `group`.

    lin: an EnsembleLinearization. r: (B, M); d: (B, P); q, inverse (the diagonal preconditioner) and start: (B, P) or None.
    Returns (steps (B, P), outcomes) as native.Kernels.members_solve does. Cost per iteration: one product with J and one with
    J^T for all members; the scalars stay on the device, and are looked at once in an iteration to see whether all have arrived.
    """

    def apply(x):
        return lin.vjp(lin.jvp(x)) + d * x

    def dot(x, y):
        return (x.double() * y.double()).sum(1)

    def precondition(x):
        return x if inverse is None else inverse * x

    b = lin.vjp(r)
    b = b if q is None else b + q
    active = torch.zeros(lin.count, dtype=torch.bool, device=b.device)
    active[group] = True
    b_norm = dot(b, b).sqrt()
    target = torch.clamp_min(options.tolerance * b_norm, options.absolute)
    x, residual = torch.zeros_like(b), b.clone()
    if start is not None:
        product = apply(start)
        along, curvature = dot(b, start), dot(start, product)
        t = torch.where((curvature > 0) & torch.isfinite(along / curvature), along / curvature, 0.0).to(b.dtype)[:, None]
        x = torch.where(t != 0, t * start, x)
        residual = torch.where(t != 0, b - t * product, residual)
    norm = dot(residual, residual).sqrt()
    status = torch.full((lin.count,), _RUNNING, device=b.device)
    status[norm <= target] = _SOLVED
    status[~active] = _SOLVED
    iterations = torch.zeros(lin.count, dtype=torch.int64, device=b.device)
    last_claim = b_norm.clone()
    value, values = torch.zeros_like(b_norm), []
    z = precondition(residual)
    p, rz = z.clone(), dot(residual, z)
    for i in range(1, options.max_iterations + 1):
        running = status == _RUNNING
        if not bool(running.any()):
            break
        Ap = apply(p)
        curvature = dot(p, Ap)
        broken = running & ~((curvature > 0) & (rz > 0))
        status[broken] = _BREAKDOWN
        running &= ~broken
        step = torch.where(running, rz / curvature, 0.0)
        narrow = step.to(b.dtype)[:, None]
        x = torch.where(running[:, None], x + narrow * p, x)
        residual = torch.where(running[:, None], residual - narrow * Ap, residual)
        iterations += running
        value = value + torch.where(running, 0.5 * step * rz, 0.0)
        values.append(value)
        norm = torch.where(running, dot(residual, residual).sqrt(), norm)
        claim = running & (norm <= target)
        restart = torch.zeros_like(running)
        if i % _CHECK == 0 or bool(claim.any()):
            checked = running if i % _CHECK == 0 else claim
            true = b - apply(x)
            residual = torch.where(checked[:, None], true, residual)
            recurrence, norm = norm, torch.where(checked, dot(residual, residual).sqrt(), norm)
            status[checked & (norm <= target)] = _SOLVED
            restart = checked & (norm > target) & (claim | (norm > 1.1 * recurrence))
            status[restart & (norm > 0.5 * last_claim)] = _STAGNATED
            last_claim = torch.where(restart, norm, last_claim)
        k = max(10, i // 10)
        if options.progress and i > k:
            slow = value - values[-1 - k] < k * options.progress * value
            status[(status == _RUNNING) & slow] = _PROGRESS
        z = precondition(residual)
        following = dot(residual, z)
        beta = torch.where(restart, 0.0, following / rz).to(b.dtype)[:, None]
        p = torch.where((status == _RUNNING)[:, None], z + beta * p, p)
        rz = torch.where(status == _RUNNING, following, rz)
    status[status == _RUNNING] = _LIMIT
    relative = torch.where(b_norm > 0, norm / b_norm, 0.0)
    numbers = torch.stack([status.double(), iterations.double(), relative, dot(b, x), dot(x, x), torch.zeros_like(b_norm),
                           dot(residual, x)], 1)[group].tolist()
    return x, [(_NAMES[int(s)], int(n), *rest) for s, n, *rest in numbers]


_RUNNING, _SOLVED, _LIMIT, _BREAKDOWN, _STAGNATED, _PROGRESS = range(6)
_NAMES = ("", "solved", "max_iterations", "breakdown", "stagnated", "progress")
