"""The members of an ensemble on a GPU: one launch for all where the ensemble kernel serves, else one after the other."""

from __future__ import annotations

import ctypes

import torch

from . import cuda_library as lib
from .limits import OUTCOME_NUMBERS
from .protocol import STATUS

_METHODS = {"dual": 0, "cg": 1}


def solve(kernels, name, listed, r, mu, penalty, scale, q, options, inverse, start, update):
    """See cuda.Kernels.members_solve."""
    plain = all(x is None for x in (scale, q, inverse, start)) and len(penalty) == 0
    if plain and name in _METHODS and all(mu[b] > 0 for b in listed):
        return _together(kernels, name, listed, r, mu, options, update)
    steps = torch.zeros(len(r), kernels.num_parameters, dtype=kernels.dtype, device=r.device)
    found = []
    for b in listed:
        kernels.select(b)
        mine = [None if x is None else x[b] for x in (scale, q, inverse, start)]
        steps[b], *rest, _ = _one(kernels, name, r[b], float(mu[b]), penalty, *mine, options)
        found.append(tuple(rest))
        if update is not None and rest[0] in ("solved", "max_iterations", "stagnated", "progress"):
            _subtract(kernels, update, b, steps[b])
    return steps, found


def _one(kernels, name, r, mu, penalty, scale, q, inverse, start, options):
    sizes = kernels.parameter_sizes
    damping = [mu + c for c in penalty] if len(penalty) else [mu] * len(sizes)
    if name == "dual" and not len(penalty):
        return kernels.dual(r, None, mu, q)
    if name == "dual":
        return kernels.dual(r, torch.tensor([1 / d for d in damping], dtype=torch.float64), 1.0, q)
    if scale is None:
        d = torch.cat([torch.full((n,), x, dtype=kernels.dtype, device=r.device) for n, x in zip(sizes, damping, strict=True)])
    else:
        d = mu * scale.to(kernels.dtype)
        if len(penalty):
            d = d + torch.cat([
                torch.full((n,), float(c), dtype=kernels.dtype, device=r.device) for n, c in zip(sizes, penalty, strict=True)
            ])
    if name == "primal":
        return kernels.primal(r, d, q)
    found, _ = kernels.cg(r, d, q, (inverse, None, None), start, None, options)
    return found


def _subtract(kernels, update, b, step) -> None:
    with torch.no_grad():
        for p, part in zip(update[0], step.split(kernels.parameter_sizes), strict=True):
            p[b].sub_(float(update[1][b]) * part.view(p[b].shape))


def _together(kernels, name, listed, r, mu, options, update):
    """One launch, one transfer of numbers. mu and the list of members go over once."""
    device, count, P = r.device, len(r), kernels.num_parameters
    r = r.detach().to(kernels.dtype).contiguous()
    active = torch.zeros(count, dtype=torch.uint8)
    active[listed] = 1
    with kernels.here():
        table, constants = kernels.table(2), _constants(kernels, device)
        steps = torch.empty(count, P, dtype=kernels.dtype, device=device)
        report = torch.empty(count, OUTCOME_NUMBERS, dtype=torch.float64, device=device)
        size = kernels.library.ensemble_bytes(kernels.plan, _METHODS[name], count)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        mu = mu.to(device, torch.float64).contiguous()
        active = active.to(device)
        parameters = rates = None
        if update is not None:
            if not all(p.is_contiguous() and p.dtype == kernels.dtype and p.device == device for p in update[0]):
                raise ValueError("pgdfast: an update in the launch needs contiguous parameters of its dtype and device.")
            parameters = torch.tensor([p.data_ptr() for p in update[0]], dtype=torch.int64).to(device)
            rates = torch.as_tensor(update[1]).to(device, torch.float64).contiguous()
        pointers = lib.pointers([table, constants, r, mu, active, steps, report, parameters, rates, workspace])
        counts = (ctypes.c_int64 * 3)(count, _METHODS[name], options.max_iterations)
        limits = (ctypes.c_double * 2)(options.tolerance, options.absolute)
        kernels.library.ensemble(kernels.plan, pointers, counts, limits, kernels.stream)
    for p in update[0] if update is not None else ():
        torch.autograd.graph.increment_version(p)   # tapes that saved the old values must notice
    rows = report.tolist()
    return steps, [(STATUS[int(rows[b][0])], int(rows[b][1]), *rows[b][2:]) for b in listed]


def _constants(kernels, device) -> torch.Tensor:
    """Pointer, value and shift per constant (csrc/cuda/ensemble.h)."""
    data, _, values = kernels.bound
    shifts = kernels.shifts
    words = torch.tensor([[d or 0, 0, s] for d, s in zip(data, shifts, strict=True)], dtype=torch.int64)
    words = words.view(len(data), 3)
    words[:, 1] = torch.tensor(list(values), dtype=torch.float64).view(torch.int64)
    return words.to(device)
