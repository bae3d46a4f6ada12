"""What one step of LM asks of the network, or networks, that it trains: linearization, solve, losses at trial points."""

from __future__ import annotations

import torch

from .linear import half_square, loss_at, losses_of
from .solve import solve, solve_members


class OneNetwork:
    """One network: `lin`, its loss, and the door to its solver.

    losses: the loss as a list of one number. separates: do the kernels know members apart?
    """

    __slots__ = ("_solve", "lin", "loss", "losses")
    separates = True

    def __init__(self, lin, solve):
        self.lin, self.loss, self._solve = lin, lin.loss, solve
        exact = lin.scalar or lin.loss.dtype == torch.float64   # else a trial at the same point may find another last digit
        self.losses = (float(lin.loss if exact else half_square(lin.residual)),)

    def member(self, b: int):
        """The linearization."""
        return self.lin

    def solve(self, members: list, scale, options, time: int) -> None:
        """Give the one step.host.Member its Solution; Solutions where the rule sweeps. options: step.host.StepOptions."""
        m, rule = members[0], options.rule
        m.solution = self._solve(
            self.lin, rule.dampings(m.state.mu) if rule.sweeps else m.state.mu, scale=scale, solver=options.solver,
            cg=options.cg, rcond=options.rcond, wide=m.wide, keep=m.keep, time=time, prior=m.prior,
        )

    def losses_at(self, result) -> tuple[float, ...]:
        """The loss, as a list of one number, of what the closure returned at a trial point."""
        return (float(loss_at(result, self.lin.scalar)),)

    def residuals_at(self, run) -> tuple:
        """((loss, residual (M,)),) of what `run` returns, comparable with those of the linearization."""
        return (self.lin.residual_at(run),)

    def unchanged(self) -> None:
        """Say that the parameters are, bit for bit, those of the linearization again."""
        self.lin.parameters_unchanged()


class NetworkInParts(OneNetwork):
    """One network whose rows come in parts, linearized as a parts.Parts."""

    __slots__ = ()

    def __init__(self, lin, solve):
        self.lin, self.loss, self.losses, self._solve = lin, lin.loss, (lin.value,), solve

    def losses_at(self, result) -> tuple[float, ...]:
        """The loss, as a list of one number, of what the batches returned at a trial point."""
        return (self.lin.loss_of(result),)


class ManyNetworks:
    """An ensemble: as OneNetwork, for B members."""

    __slots__ = ("lin", "loss", "losses")

    def __init__(self, lin):
        self.lin, self.loss, self.losses = lin, lin.loss, lin.losses

    @property
    def separates(self) -> bool:
        """Whether the kernels know members apart."""
        return self.lin.separates

    def member(self, b: int):
        """Member b's linearization."""
        return self.lin.member(b)

    def solve(self, members: list, scale, options, time: int) -> None:
        """Give these step.host.Members their Solution; Solutions where the rule sweeps. options: step.host.StepOptions."""
        named = dict(solver=options.solver, cg=options.cg, rcond=options.rcond, time=time)
        if options.rule.sweeps:
            for m in members:
                m.solution = solve(
                    self.lin.member(m.number), options.rule.dampings(m.state.mu),
                    scale=None if scale is None else scale[m.number], wide=m.wide, keep=m.keep, prior=m.prior, **named,
                )
            return
        wide, keep = [False] * self.lin.count, [{}] * self.lin.count
        for m in members:
            wide[m.number], keep[m.number] = m.wide, m.keep
        found = solve_members(
            self.lin, {m.number: m.state.mu for m in members}, scale=scale, wide=wide, keep=keep,
            priors={m.number: m.prior for m in members if m.prior is not None}, factors=options.acceleration is not None,
            **named,
        )
        for m in members:
            m.solution = found[m.number]

    def losses_at(self, result) -> list[float]:
        """All members' losses, as numbers, of what the closure returned at a trial point."""
        return losses_of(result, self.lin.count)

    def residuals_at(self, run) -> list[tuple]:
        """(loss, residual (M,)) of every member."""
        return list(zip(*self.lin.residual_at(run), strict=True))

    def unchanged(self) -> None:
        """Say that the parameters are, bit for bit, those of the linearization again."""
        self.lin.parameters_unchanged()
