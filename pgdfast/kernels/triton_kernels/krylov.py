"""A whole CG solve without a word to the host: its products, its three passes, its checks by the true residual."""

from __future__ import annotations

import torch

from ..cg_rules import ENDED, ITERATE, MAX_ITERATIONS, SOLVED
from ..limits import CHECK_EVERY
from ..protocol import STATUS, Outcome
from . import cg
from .cg import Passes

_LOOK = 25    # slots between two looks at the phase on a GPU, neither of which waits
_CLAIMS = 8   # checks for claimed arrivals that are launched before the host asks whether more are needed


class _Watch:
    """Looks at a solve's phase now and then: at once on the CPU; on a GPU by copies that the host never waits for."""

    def __init__(self, device):
        self._cpu = device.type == "cpu"
        if not self._cpu:
            self._flag = torch.empty(1, dtype=torch.float64, pin_memory=True)
            self._event, self._asked = torch.cuda.Event(), False

    def over(self, slot: int, phase: torch.Tensor) -> bool:
        if self._cpu:
            return float(phase) == ENDED
        if slot % _LOOK != _LOOK - 1:
            return False
        if self._asked and not self._event.query():
            return False
        if self._asked and float(self._flag[0]) == ENDED:
            return True
        self._flag.copy_(phase, non_blocking=True)
        self._event.record()
        self._asked = True
        return False


def solve(kernels, r, d, q, preconditioner, start, path, options):
    """CG on (diag(d) + J^T J) x = J^T r + q; see Kernels.cg in protocol.py.

    Its numbers reach the host in one transfer, two where more than 8 arrivals were claimed in vain.
    Cost: three launches beside the two products per iteration.
    """
    inverse, V, c = preconditioner
    b = kernels.vjp(r)
    b = b if q is None else b + q
    passes, wide = Passes(b), b.double()

    def precondition(residual):
        z = residual if inverse is None else inverse * residual
        return z if V is None else torch.addmv(z, V.T, c * (V @ residual))

    b_norm = torch.linalg.vector_norm(wide)
    target = (options.tolerance * b_norm).clamp_min(options.absolute)
    x, residual, value = torch.zeros_like(b), b.clone(), b_norm.new_zeros(())
    if start is not None:
        product = kernels.vjp(kernels.jvp(start)) + d * start
        along, curvature = torch.dot(wide, start.double()), torch.dot(start.double(), product.double())
        fits = torch.isfinite(along) & (curvature > 0) & torch.isfinite(curvature)
        t = torch.where(fits, along / curvature, 0.0)
        x = torch.where(fits, t.to(b.dtype) * start, 0)
        residual = torch.where(fits, b - t.to(b.dtype) * product, b)
        value = torch.where(fits, 0.5 * t * along, 0.0)
    p = precondition(residual).clone()
    norm, rz = torch.linalg.vector_norm(residual.double()), torch.dot(residual.double(), p.double())
    status = torch.where(norm <= target, float(SOLVED), float(MAX_ITERATIONS))
    phase, none = torch.where(norm <= target, float(ENDED), float(ITERATE)), value.new_zeros(())
    state = torch.stack([rz, norm, target, value, none, status, phase, norm, b_norm, value, none, rz])
    states = state, torch.empty_like(state)
    values = value.new_zeros(options.max_iterations + 2)
    values[0] = value
    progress = torch.full((1,), options.progress, dtype=torch.float64, device=b.device)
    kept = None if path is None else value.new_zeros(len(path), 4)
    w, safe, watch = p.clone(), x.clone(), _Watch(b.device)
    slot, limit = 0, options.max_iterations + options.max_iterations // CHECK_EVERY + _CLAIMS
    while True:
        while slot < limit and not watch.over(slot, states[slot % 2][cg.PHASE]):
            now, new = states[slot % 2], states[1 - slot % 2]
            Aw = kernels.vjp(kernels.jvp(w))
            passes.dots(Aw, w, d, b)
            passes.update(x, residual, p, Aw, b, inverse, now, path is not None)
            z = None
            if V is not None:
                z = precondition(residual)
                passes.weigh(residual, z)
            passes.turn(p, w, x, residual, z, inverse, safe, now, new, values, path, kept, options.max_iterations, progress)
            slot += 1
        numbers, rows = _read(states[slot % 2], b, x, residual, b_norm, kept)
        if numbers[cg.PHASE] == ENDED:
            break
        limit += _CLAIMS   # each claim in vain took a slot
    gain, square, slack, size = numbers[cg.SIZE : cg.SIZE + 4]
    relative = numbers[cg.NORM] / size if size > 0 else 0.0
    slots = [(k, int(i), *rest) for k, (i, *rest) in enumerate(rows) if i > 0]
    outcome = Outcome(
        x, STATUS[int(numbers[cg.STATUS])], int(numbers[cg.ITERATIONS]), relative, gain, square, 0.0, slack,
    )
    return outcome, slots


def _read(state, b, x, residual, b_norm, kept):
    """Everything the host wants to know, in one transfer."""
    b, x, residual = b.double(), x.double(), residual.double()
    ends = torch.stack([torch.dot(b, x), torch.dot(x, x), torch.dot(residual, x), b_norm])
    rows = [] if kept is None else [kept.reshape(-1)]
    numbers = torch.cat([state, ends, *rows]).tolist()
    count = cg.SIZE + 4
    return numbers[:count], [numbers[k : k + 4] for k in range(count, len(numbers), 4)]
