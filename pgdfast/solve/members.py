"""The damped systems of an ensemble's members: each with its own mu, all solved in as few calls as the kernels allow."""

from __future__ import annotations

import functools

import torch

from .cg_members import cg_together
from .choice import NARROW_CONDITION, choose, solve_one, too_narrow
from .options import CG
from .problem import DOUBLE_FACTOR, WIDE_FACTOR, Problem
from .solution import Solution

_TRY_AGAIN = 20   # steps after which members that were refined one by one are tried in one call again


def solve_members(
    lin, dampings: dict[int, float], *, scale=None, solver: str = "auto", cg: CG | None = None, rcond: float = 1e-8,
    wide=None, keep=None, time: int = 0, priors=None, factors: bool = False,
) -> MemberSolutions:
    """Solve (mu_b D_b + J_b^T J_b) delta_b = J_b^T r_b for members of an ensemble.

    lin: an EnsembleLinearization. dampings: {member: mu}; members not named are left alone. scale: D, (B, P), or None. solver,
    cg, rcond, time: as for pgdfast.solve. wide, keep: per member, what its last Solution had. Returns {member: Solution}, each
    as pgdfast.solve would return it for that member alone. priors: by member. factors: are solves with the same factor to follow?
    Cost: that of the members' solves, on as many cores as there are.
    """
    options = cg or CG()
    priors = priors or {}
    wide, keep = wide or [False] * lin.count, keep or [{}] * lin.count
    groups: dict[tuple, list[int]] = {}
    for b, mu in dampings.items():
        groups.setdefault((mu == 0, wide[b], b in priors), []).append(b)
    found = MemberSolutions()
    for (_, is_wide, has_prior), group in groups.items():
        b = group[0]
        problem = Problem.of(lin.member(b), dampings[b], None if scale is None else scale[b])
        name, reason = choose(problem, solver, options, is_wide)
        together = _Together(lin, dampings, scale, options, name, reason, keep, time)
        if together.possible and not has_prior and not factors:
            found.update(together.run(group, is_wide))
            if len(found) == lin.count and together.calls == 1 and len(groups) == 1:
                found.steps = together.steps
        for b in group:
            if b not in found:
                found[b] = solve_one(
                    lin.member(b), dampings[b], scale=None if scale is None else scale[b], solver=solver, cg=cg, rcond=rcond,
                    wide=is_wide, keep=keep[b], time=time, prior=priors.get(b),
                )
                if together.refines:   # the call would have been in vain: not every time
                    found[b].keep = found[b].keep | {"alone": True}
    return found


class MemberSolutions(dict):
    """{member: Solution}. steps: all members' steps, (B, P), where one call has found them all, else None."""

    steps: torch.Tensor | None = None


class _Together:
    """Solves of several members in one call; what a call could not settle is left to the solve of one."""

    def __init__(self, lin, dampings, scale, options: CG, name: str, reason: str, keep, time: int):
        self.lin, self.scale, self.options, self.name, self.reason, self.keep = lin, scale, options, name, reason, keep
        self.time = time
        self.mu = torch.tensor([dampings.get(b, 0.0) for b in range(lin.count)], dtype=torch.float64)
        self.calls, self.steps = 0, None
        self.small = lin.dtype == torch.float32 and min(lin.num_residuals, lin.num_parameters) <= WIDE_FACTOR

    @property
    def refines(self) -> bool:
        """Whether a float32 factor that is not enough is refined, which is done for one member at a time."""
        order = self.lin.num_residuals if self.name == "dual" else self.lin.num_parameters
        return self.lin.dtype == torch.float32 and self.name in ("dual", "primal") and order > DOUBLE_FACTOR

    @property
    def possible(self) -> bool:
        """Whether one call does it."""
        if self.name == "cg":
            return self.options.preconditioner is None and not self.options.truncate
        if not self.lin.separates or self.name not in ("dual", "primal"):
            return False
        rows = self.lin.member(0).rows is not None
        return self.scale is None and rows if self.name == "dual" else True

    def run(self, group: list[int], is_wide: bool) -> dict[int, Solution]:
        """{member: Solution} of those that are settled."""
        if self.name == "cg":
            # The longest first, so that the cores end together: as many iterations as last time, or nearly.
            group = sorted(group, key=lambda b: -self.keep[b].get("iterations", 0))
            doubled = too_narrow(self.lin, self.options) and self.lin.separates
            return self._solutions(group, *self._call(group, doubled), wide=lambda trace: False)
        if self.lin.dtype != torch.float32:
            return self._solutions(group, *self._call(group, False), wide=lambda trace: False)
        settled: dict[int, Solution] = {}
        if not (is_wide and self.small):
            again = self.time % _TRY_AGAIN == 0
            trying = [b for b in group if again or not (self.refines and self.keep[b].get("alone"))]
            if trying:
                steps, outcomes = self._call(trying, False)
                done = [
                    (b, o) for b, o in zip(trying, outcomes, strict=True) if o[0] == "solved" and o[5] <= NARROW_CONDITION
                ]
                settled = self._solutions([b for b, _ in done], steps, [o for _, o in done], wide=lambda trace: False)
            if not self.small or self.refines:   # to be refined, or as far as this precision goes: one by one
                return settled
            group = [b for b in group if b not in settled]
        if group:
            settled |= self._solutions(group, *self._call(group, True), wide=lambda trace: trace > NARROW_CONDITION)
        return settled

    def _call(self, group: list[int], doubled: bool):
        """(steps (B, P), outcomes) in the order of `native.Kernels.dual`."""
        self.calls += 1
        lin, dtype = self.lin, torch.float64 if doubled else self.lin.dtype
        r, scale, q = lin.residual.to(dtype), None if self.scale is None else self.scale.to(dtype), None
        if lin.penalties:
            q = torch.cat([
                lin.penalties.get(k, 0.0) * p.detach().reshape(lin.count, -1).to(dtype) for k, p in enumerate(lin.params)
            ], 1)
        penalty = [lin.penalties.get(k, 0.0) for k in range(len(lin.params))] if lin.penalties else []
        start = self._start(dtype) if self.name == "cg" and self.options.warm_start else None
        if not lin.separates:
            d = self.mu[:, None].to(lin.device, dtype) * (1.0 if scale is None else scale)
            if penalty:
                d = d + torch.cat([
                    torch.full((p.numel() // lin.count,), c, dtype=dtype, device=lin.device)
                    for c, p in zip(penalty, lin.params, strict=True)
                ])
            d = d.expand(lin.count, lin.num_parameters)
            return cg_together(lin, r, d, q, None if scale is None else 1 / scale, start, group, self.options)
        plan = lin.plan(doubled)
        if self.name == "dual":
            plan.rows(lin.constants)
        return lin.bound(plan).members_solve(
            self.name, group, r.contiguous(), self.mu, penalty, scale, q, self.options,
            None if scale is None or self.name != "cg" else 1 / scale, start,
        )

    def _start(self, dtype):
        lin = self.lin
        start = torch.zeros(lin.count, lin.num_parameters, dtype=dtype, device=lin.device)
        for b in range(lin.count):
            kept = self.keep[b].get("start")
            if kept is not None and kept.shape == (lin.num_parameters,):
                start[b] = kept
        return start

    def _solutions(self, group, steps, outcomes, wide) -> dict[int, Solution]:
        lin, name, found = self.lin, self.name, {}
        if steps.dtype is not lin.dtype:
            steps = steps.to(lin.dtype)
        self.steps = steps
        mu = self.mu.tolist()
        for b, (status, iterations, norm, gain, square, trace, slack) in zip(group, outcomes, strict=True):
            step, diagonal, damped = steps[b], mu[b], mu[b] * square
            if self.scale is not None:
                diagonal = mu[b] * self.scale[b]
                damped = float(torch.dot(step.double(), diagonal.double() * step.double()))
            if not abs(gain) + square < float("inf"):
                step.zero_()
                status, gain, damped, slack = "not_finite", 0.0, 0.0, 0.0
            keep = {"iterations": iterations} if name == "cg" else {}
            if name == "cg" and self.options.warm_start and status != "not_finite":
                keep["start"] = step
            found[b] = Solution(
                step, status, iterations, name, self.reason, gain, damped, functools.partial(lin.member, b), diagonal,
                norm if name == "cg" else None, wide(trace), slack, (), keep,
            )
        return found
