"""What one step of LM asks of the network, or networks, that it trains: linearisation, solve, losses at trial points."""

from __future__ import annotations

from .linear import losses_of
from .solve import solve, solve_members
from .step.evaluate import loss_of


class OneNetwork:
    """One network's problem: `lin`, its loss, and the door to its solver.

    losses: the loss as a list of one number. separates: do the kernels know members apart?
    """

    __slots__ = ("_solve", "lin", "loss", "losses")
    separates = True

    def __init__(self, lin, solve):
        self.lin, self.loss, self._solve = lin, lin.loss, solve
        self.losses = (float(lin.loss),)

    def member(self, b: int):
        """The linearisation."""
        return self.lin

    def solve(self, members: dict, scale, options, time: int) -> dict:
        """{0: Solution}; Solutions where the rule sweeps. members: {0: step.host.Member}; options: step.host.StepOptions."""
        m, rule = members[0], options.rule
        mu = rule.dampings(m.state.mu) if rule.sweeps else m.state.mu
        return {0: self._solve(
            self.lin, mu, scale=scale, solver=options.solver, cg=options.cg, rcond=options.rcond, wide=m.wide, keep=m.keep,
            time=time, prior=m.prior,
        )}

    def losses_at(self, result) -> tuple[float, ...]:
        """The loss, as a list of one number, of what the closure returned at a trial point."""
        return (loss_of(result),)

    def residuals_at(self, run) -> tuple:
        """((loss, residual (M,)),) of what `run` returns, comparable with those of the linearisation."""
        return (self.lin.residual_at(run),)

    def unchanged(self) -> None:
        """Say that the parameters are, bit for bit, those of the linearisation again."""
        self.lin.parameters_unchanged()

    def release(self) -> None:
        """Let go of the tape."""
        self.lin.release()


class ManyNetworks:
    """An ensemble's problem: as OneNetwork, for B members."""

    __slots__ = ("lin", "loss", "losses")

    def __init__(self, lin):
        self.lin, self.loss, self.losses = lin, lin.loss, lin.losses

    @property
    def separates(self) -> bool:
        """Whether the kernels know members apart."""
        return self.lin.separates

    def member(self, b: int):
        """Member b's linearisation."""
        return self.lin.member(b)

    def solve(self, members: dict, scale, options, time: int) -> dict:
        """{member: Solution}, or Solutions where the rule sweeps."""
        named = dict(solver=options.solver, cg=options.cg, rcond=options.rcond, time=time)
        if options.rule.sweeps:
            return {
                b: solve(self.lin.member(b), options.rule.dampings(m.state.mu), scale=None if scale is None else scale[b],
                         wide=m.wide, keep=m.keep, prior=m.prior, **named)
                for b, m in members.items()
            }
        wide, keep = [False] * self.lin.count, [{}] * self.lin.count
        for b, m in members.items():
            wide[b], keep[b] = m.wide, m.keep
        priors = {b: m.prior for b, m in members.items() if m.prior is not None}
        return solve_members(
            self.lin, {b: m.state.mu for b, m in members.items()}, scale=scale, wide=wide, keep=keep, priors=priors,
            factors=options.acceleration is not None, **named,
        )

    def losses_at(self, result) -> list[float]:
        """All members' losses, as numbers, of what the closure returned at a trial point."""
        return losses_of(result, self.lin.count)

    def residuals_at(self, run) -> list[tuple]:
        """(loss, residual (M,)) of every member."""
        return self.lin.residuals_at(run)

    def unchanged(self) -> None:
        """Say that the parameters are, bit for bit, those of the linearisation again."""
        self.lin.parameters_unchanged()

    def release(self) -> None:
        """Let go of the tape."""
        self.lin.release()
