"""The damped systems of an ensemble's members: each with its own mu, all solved in as few calls as the kernels allow."""

from __future__ import annotations

from functools import partial

import torch

from ..kernels.limits import NARROW_CONDITION
from ..kernels.protocol import STATUS, Outcome
from .choice import BY_NAME, choose
from .entry import solution, solve
from .krylov import MANY, conjugate_gradients
from .options import CG
from .problem import Problem, affords_float64, for_iterations
from .solution import Solution

_TRY_AGAIN = 20   # steps after which members that were refined one by one are tried in one call again


def solve_members(
    lin, dampings: dict[int, float], *, scale=None, solver: str = "auto", cg: CG | None = None, rcond: float = 1e-8,
    wide=None, keep=None, time: int = 0, priors: dict | None = None, factors: bool = False,
) -> dict[int, Solution]:
    """Solve (mu_b D_b + J_b^T J_b) delta_b = J_b^T r_b + mu_b D_b p_b for members of an ensemble.

    Returns {member: Solution}, each as pgdfast.solve would return it for that member alone. Cost: that of the members' solves,
    on as many cores as there are.

    Args:
        lin: an EnsembleLinearization.
        dampings: {member: mu}; members not named are left alone.
        scale: D, (B, P), or None.
        solver: as for pgdfast.solve.
        cg: the same.
        rcond: the same.
        wide: per member, what its last Solution had.
        keep: the same.
        time: as for pgdfast.solve.
        priors: {member: p}, (P,), as for pgdfast.solve; members with one are solved one by one.
        factors: will each Solution be asked to solve with its factor again? Then one by one, too, since one call keeps none.
    """
    options, priors = cg or CG(), priors or {}
    wide, keep = wide or [False] * lin.count, keep or [{}] * lin.count
    groups: dict[tuple, list[int]] = {}
    for b, mu in dampings.items():
        groups.setdefault((mu == 0, wide[b], factors or priors.get(b) is not None), []).append(b)
    found: dict[int, Solution] = {}
    for (_, is_wide, alone), group in groups.items():
        b = group[0]
        problem = Problem.of(lin.member(b), dampings[b], None if scale is None else scale[b])
        name, reason = choose(problem, solver, options, is_wide)
        together = _Together(lin, dampings, scale, options, rcond, name, reason, keep, time)
        if together.possible and not alone:
            found.update(together.run(group, is_wide))
        for b in group:
            if b not in found:
                found[b] = solve(
                    lin.member(b), dampings[b], scale=None if scale is None else scale[b], solver=solver, cg=cg, rcond=rcond,
                    wide=is_wide, keep=keep[b], time=time, prior=priors.get(b),
                )
                if together.refines:   # the call would have been in vain: not every time
                    found[b].keep = found[b].keep | {"alone": True}
    return found


class _Together:
    """Solves of several members in one call; what a call could not settle is left to the solve of one."""

    def __init__(self, lin, dampings, scale, options: CG, rcond: float, name: str, reason: str, keep, time: int):
        self.lin, self.scale, self.options, self.rcond = lin, scale, options, rcond
        self.solver, self.name, self.reason, self.keep, self.time = BY_NAME[name], name, reason, keep, time
        self.mu = [float(dampings.get(b, 0.0)) for b in range(lin.count)]
        self._factor = None
        self.refines = name in ("dual", "primal") and self.solver.refines(lin)   # which is done for one member at a time

    @property
    def possible(self) -> bool:
        """Whether one call does it."""
        if self.name == "cg":
            return self.options.preconditioner is None and not self.options.truncate
        if not self.lin.separates or self.name not in ("dual", "primal"):
            return False
        return self.scale is None and self.lin.row_layout() is not None if self.name == "dual" else True

    def run(self, group: list[int], is_wide: bool) -> dict[int, Solution]:
        """{member: Solution} of those that are settled."""
        lin, affords = self.lin, affords_float64(self.lin)
        if self.name == "cg":
            # The longest first, so that the cores end together: as many iterations as last time, or nearly.
            group = sorted(group, key=lambda b: -self.keep[b].get("iterations", 0))
            return self._solutions(group, *self._call(group, for_iterations(lin, self.options)))
        if lin.dtype != torch.float32:
            return self._solutions(group, *self._call(group, lin))
        settled: dict[int, Solution] = {}
        if not (is_wide and affords):
            trying = [b for b in group if self.time % _TRY_AGAIN == 0 or not (self.refines and self.keep[b].get("alone"))]
            if trying:
                steps, outcomes = self._call(trying, lin)
                done = [
                    (b, o) for b, o in zip(trying, outcomes, strict=True)
                    if o[0] == "solved" and o[5] <= NARROW_CONDITION
                ]
                settled = self._solutions([b for b, _ in done], steps, [o for _, o in done])
            if not affords or self.refines:   # to be refined, or as far as this precision goes: one by one
                return settled
            group = [b for b in group if b not in settled]
        if group:
            settled |= self._solutions(group, *self._call(group, lin.widened()), widened=True)
        return settled

    def _call(self, group: list[int], lin):
        """(steps (B, P), the numbers of these members' Outcomes), in the precision of `lin`."""
        scale, count, penalties = None if self.scale is None else self.scale.to(lin.dtype), lin.count, []
        q = start = None
        if lin.penalties:
            penalties = [lin.penalties.get(k, 0.0) for k in range(len(lin.params))]
            q = torch.cat([
                c * p.detach().reshape(count, -1).to(lin.dtype) for c, p in zip(penalties, lin.params, strict=True)
            ], 1)
        if self.name == "cg" and self.options.warm_start:
            start = lin.residual.new_zeros(count, lin.num_parameters)
            for b in range(count):
                kept = self.keep[b].get("start")
                if kept is not None and kept.shape == (lin.num_parameters,):
                    start[b] = kept
        inverse = None if scale is None or self.name != "cg" else 1 / scale
        mu = torch.tensor(self.mu, dtype=torch.float64)
        if not lin.separates:
            d = mu[:, None].to(lin.device, lin.dtype) * (1.0 if scale is None else scale)
            if penalties:
                d = d + torch.cat([
                    p.new_full((p.numel() // count,), c, dtype=lin.dtype) for c, p in zip(penalties, lin.params, strict=True)
                ])
            return self._cg(lin, d.expand(count, lin.num_parameters), q, inverse, start, group)
        kernels = lin.kernels(0)
        if self.name == "dual":
            lin.row_layout()
        steps, numbers = kernels.members_solve(
            self.name, group, lin.residual.contiguous(), mu, penalties, scale, q, self.options, inverse, start
        )
        return steps, numbers

    def _cg(self, lin, d, q, inverse, start, group):
        b = lin.vjp(lin.residual)
        x, *numbers, _ = conjugate_gradients(
            lambda x: lin.vjp(lin.jvp(x)) + d * x, b if q is None else b + q,
            (lambda x: x) if inverse is None else (lambda x: inverse * x), self.options, MANY, start, None, group,
        )
        rows = torch.stack([number.double() for number in numbers], 1)[group].tolist()
        return x, [
            (STATUS[int(status)], int(iterations), norm, gain, square, 0.0, slack)
            for status, iterations, norm, gain, square, slack in rows
        ]

    def _solutions(self, group, steps, outcomes, widened: bool = False) -> dict[int, Solution]:
        lin, name, scale, mu, found = self.lin, self.name, self.scale, self.mu, {}
        steps = steps if steps.dtype is lin.dtype else steps.to(lin.dtype)
        keep, starts = {}, name == "cg" and self.options.warm_start
        rows = steps.unbind()
        for b, numbers in zip(group, outcomes, strict=True):
            problem = Problem(partial(lin.member, b), mu[b], None if scale is None else scale[b], None)
            if name == "cg":
                keep = {"iterations": numbers[1]}
            again, wide = partial(self._again, b, widened), widened and numbers[5] > NARROW_CONDITION
            one = Outcome(rows[b], *numbers), again, wide, keep, (), 0   # as Found has it
            found[b] = made = solution(name, self.reason, problem, one, lin.dtype)
            if made.status == "not_finite":
                steps[b] = 0
            elif starts:
                made.keep["start"] = made.step
        return found

    def _again(self, b: int, widened: bool, u: torch.Tensor) -> torch.Tensor:
        """Member b's solve once more for another residual; the factor is made at the first, and kept until another's is."""
        if self._factor is None or self._factor[0] != b:
            scale = None if self.scale is None else self.scale[b]
            problem = Problem.of(self.lin.member(b), self.mu[b], scale)
            self._factor = b, self.solver.solve(problem, self.options, self.rcond, widened, None, 0).again
        return self._factor[1](u)
