"""One step of LM, decided on the host: linearize; solve, attempt and decide until every member has its step; commit, or undo.

A single network is an ensemble of one. Members that have their step wait for the others where they stand.
"""

from __future__ import annotations

import math
from functools import partial
from time import perf_counter

import torch

from ..parts import Batched
from ..report import SUMS, EnsembleReport, Report
from ..solve import Solutions
from .attempt import STATUS, Trial, advance, demanded, judge
from .corrected import CorrectedStep
from .cost import step_cost
from .evaluate import LARGE_TAPE, SPARED, restore_modes
from .member import Member
from .momentum import KEY, kept, prior
from .multi_damping import best_of
from .options import StepOptions, StepTools
from .parameters import Point
from .quadratic_model import curvature, gradient_curvature, slope_and_bend
from .rng_replay import RandomReplay
from .rules import HELD, first_damping, largest
from .scaling import is_scaled, marquardt
from .stopping import in_vain, looked_into, promised_without_damping, say, tested

_NO_SQUARES = (
    "pgdfast.LM: acceleration corrects residuals, and the closure's loss is not a sum of squares with constant weights (a "
    "cross-entropy, a robust loss or a norm is not); nothing was changed. Use acceleration=None for it."
)


class HostStep:
    """One step: `undo` it where an exception leaves it, `release` it at its end.

    closure: LM's, a balance.Weighted with `balance`, a parts.Batched over batches and in a process group. rates, decays: by
    member, by parameter. memory: what the optimizer remembers; state: by parameter. mus: each member's damping to begin with.
    """

    def __init__(self, options: StepOptions, tools: StepTools, closure, rates, decays, memory: dict, state, mus: list[float]):
        self.options, self.tools, self.closure, self.memory, self.optimizer_state = options, tools, closure, memory, state
        self.parameters, self._rates, self._decays, self._mus = tools.parameters, rates, decays, mus
        self.seconds = {"linearize": 0.0, "solve": 0.0, "trial": 0.0}
        self.pending: list[Member] = []
        self.members: list[Member] = []
        self.networks = self._replay = self._scale = self.loss = self.report = None
        self.scalar = self._corrects = False
        self._step, self._decaying = memory["step"], any(map(any, decays))
        self._scales: list[torch.Tensor] = []
        self._written: list[tuple] = []
        self._settled: dict[int, Point] = {}
        self.eps = self._looked_at = 0.0   # relative promises up to the latter are looked at closely
        self._modes = torch.is_grad_enabled(), torch._C._len_torch_function_stack()

    def undo(self) -> None:
        """Leave everything as it was before the step, unless that stood already."""
        restore_modes(self._modes)
        if self.memory["step"] != self._step:
            return
        self.parameters.all_back()
        for own, name, value in self._written:
            own[name] = value
            if value is None:
                del own[name]
        if self._replay is not None:
            self._replay.finish()

    def release(self) -> None:
        """Let go of the tape."""
        self.parameters.away.clear()
        if self.networks is not None:
            self.networks.lin.release()

    # --- linearize --------------------------------------------------------------------------------------------------------

    def linearize(self) -> None:
        """Run the closure, read its tape, and see which members can take a step."""
        start, options, parameters = perf_counter(), self.options, self.parameters
        in_parts = isinstance(self.closure, Batched)
        again = options.predicts or options.acceleration is not None or in_parts
        if again:
            self._replay = RandomReplay(self.tools.replays, self.closure, parameters.params[0].device)
            if in_parts:
                self.closure.around = self._replay.repeated
        self.networks = networks = self.tools.backend.networks(self.closure, parameters)
        self.scalar = networks.lin.scalar
        self._corrects = options.acceleration is not None and networks.lin.has_squares_only
        if options.acceleration is not None and not self._corrects and not options.rule.learns:
            raise ValueError(_NO_SQUARES)
        if self._corrects and options.rule.learns and networks.lin.residuals_need_tape:
            self._corrects = networks.lin.tape_bytes <= SPARED   # a trial would hold a second tape, which nobody asked for
        if again:
            self._replay.linearized()
        self.loss, lin = networks.loss, networks.lin
        self.eps, wanted = torch.finfo(self.loss.dtype).eps, options.tolerances
        self._looked_at = wanted.looked_at(self.eps) if options.asks else SUMS * self.eps
        empty = lin.num_residuals == 0 and not lin.penalties
        for b, loss in enumerate(networks.losses):
            report = Report(loss, residuals=lin.num_residuals, parameters=lin.num_parameters, seconds=self.seconds)
            member = Member(b, self.memory["members"][b], self._mus[b], report)
            self.members.append(member)
            if options.rule.learns:
                member.begin(options.rule, self._corrects)
            if self._corrects and options.rule.corrects(member.state.memory):
                member.acceleration = options.acceleration
            if empty:
                report.status, report.advice = "empty", "the closure's batch has no residuals; nothing was changed"
            elif not math.isfinite(loss):
                report.status = "failed"
                report.advice = (
                    f"its loss is {loss}: it is left as it is, and the others go on; check its data and parameters, or "
                    "give it new ones"
                )
            else:
                self.pending.append(member)
                if options.balance is not None:
                    self.closure.note(report, b, networks.member(b).residual)
        self.seconds["linearize"] = perf_counter() - start
        if not self.pending:
            return
        parameters.begin(self._rates, options.constraint)
        scaled = False
        for m in self.pending:
            if m.scaled is None or options.scaling != "auto":
                m.scaled = is_scaled(options.scaling, m.scaled, options.rule.tries, networks.member(m.number))
            scaled |= m.scaled
            if m.curvature != m.curvature and options.rule.tries:
                self._first_look(m)
        if scaled:
            self._scale, self._scales = marquardt(lin.diagonal(), parameters, self.optimizer_state, self.pending)
        if options.momentum:
            for member in self.pending:
                if member.memory["momentum"]:
                    member.prior = prior(options.momentum, parameters, self.optimizer_state, member.number)

    def _first_look(self, m: Member) -> None:
        """The scale of member m's mu, where it is not known yet, and mu from it where none was given."""
        scale = 1.0 if m.scaled else gradient_curvature(self.networks.member(m.number))
        if scale:
            m.curvature = scale
        if m.state.mu != m.state.mu:
            mu = first_damping(scale, self.options.rule, m.scaled)
            m.state = m.state._replace(mu=mu, start=mu)

    # --- solve ------------------------------------------------------------------------------------------------------------

    def solve(self) -> None:
        """Solve the pending members' damped systems; after a rejection, an earlier iterate of CG may answer first."""
        start, options, pending = perf_counter(), self.options, self.pending
        unsolved = [m for m in pending if not self._shortened(m)] if options.cg.truncate else pending
        if unsolved:
            there = self._at_linearization() if self.parameters.touched else None
            for m in unsolved:
                m.solution = None   # the memory of its factor serves the next
            self.networks.solve(unsolved, self._scale, options, self._step)
            if self._corrects and options.rule.learns:
                for m in unsolved:
                    m.cost = step_cost(self.networks.member(m.number), m.solution, options.cg)
            if options.balance is not None:
                self.closure.measure(unsolved, self.networks, self._step)
            if there is not None:
                self.parameters.forward(there)
        self.seconds["solve"] += perf_counter() - start

    @staticmethod
    def _shortened(m: Member) -> bool:
        """Whether an iterate was kept that is shorter than the rejected step: then that is tried, without a new solve."""
        shorter = m.solution.shortened() if m.solution is not None and m.solution.usable else None
        if shorter is not None:
            m.solution = shorter
        return shorter is not None

    def _at_linearization(self):
        """Make products with J possible; the members that have to return to theta for that, to be brought `forward` again.

        Those that ask for products are at theta. Others must be only where the kernels do not know members apart.
        """
        there = None if self.networks.separates else self.parameters.set_aside()
        self.networks.unchanged()
        self.parameters.touched = False
        return there

    # --- attempt ----------------------------------------------------------------------------------------------------------

    def attempt(self) -> None:
        """Go to the trial points: the steps, or where a correction or a search along them ends; see the losses there."""
        start, options, parameters = perf_counter(), self.options, self.parameters
        self.networks.lin.before_trial()
        proposals, points = {}, {}
        for m in self.pending:
            if isinstance(m.solution, Solutions):   # not where the best of them was shortened
                proposals[m.number] = self._swept(m)
                continue
            self._note(m, m.state.mu, m.solution)
            if m.solution.status != "solved" and not m.solution.usable:
                m.trial = Trial(m.report.loss, math.nan, math.nan, False, m.state.mu)
            elif m.acceleration is not None and m.solution.status != "truncated":
                proposals[m.number] = self._corrected(m)
            elif options.search is not None:
                proposals[m.number] = self._searched(m)
            else:
                points[m.number] = Point(m.solution.step)
        if proposals:
            self._drive(proposals)
        if points:
            predicted = dict.fromkeys(points, math.nan)
            if options.predicts:
                for b in points:   # before the parameters move: it may take products with J
                    predicted[b] = self._predicted(self.members[b])
                losses = self._losses(points)
            else:
                losses = predicted
                parameters.go(points)
            for b in points:
                self.members[b].trial = self._trial(self.members[b], losses[b], predicted[b])
        self.seconds["trial"] += perf_counter() - start

    def _note(self, m: Member, mu: float, solution) -> None:
        """Put on record what is about to be tried."""
        report = m.report
        m.solution, m.wide, m.keep = solution, solution.wide, solution.keep
        report.attempts, report.damping = m.state.attempt + 1, mu
        report.momentum = 0.0 if m.prior is None else self.options.momentum
        report.solver, report.reason, report.solve_status = solution.solver, solution.reason, solution.status
        report.iterations, report.residual_norm, report.cut = solution.iterations, solution.known_residual_norm, solution.cut
        if solution.status == "not_finite":
            self.networks.lin.doubt()
        if self.options.constraint is not None:
            self.parameters.constrain(m.number, solution.step)

    def _predicted(self, m: Member, t: float = 1.0) -> float:
        """The predicted reduction at theta - t d, d the step times its learning rates."""
        rate = self.parameters.common_rates[m.number]
        if rate is None:
            direction = self.parameters.scaled(m.number, m.solution.step)
            slope, bend = self._with_products(m, lambda: slope_and_bend(self.networks.member(m.number), direction))
            return t * slope - 0.5 * t * t * bend
        reduction = m.solution.reduction(rate * t)
        # Up to a rate of 2 and without a prior only rounding makes this negative.
        return max(reduction, 0.0) if m.prior is None and rate <= 2 else reduction

    def _trial(self, m: Member, after: float, predicted: float, found: bool = True) -> Trial:
        """The trial of member m; after: the loss there."""
        solution, loss = m.solution, m.report.loss
        promise = predicted if self.options.predicts else 0.5 * solution.gain
        possible = math.inf if abs(promise) > self._looked_at * abs(loss) else promised_without_damping(self, m, solution)
        return Trial(
            loss, after, predicted, True, m.report.damping, found, m.prior is not None, solution.status == "truncated", possible
        )

    def _drive(self, proposals: dict[int, object]) -> None:
        """Run generators of trial points side by side: a round is one run of the closure, for all that still ask.

        With corrections, which ask for products with J, the members are at theta between the rounds.
        """
        corrected = self.members[next(iter(proposals))].acceleration is not None   # all or none
        there = self._at_linearization() if corrected and self.parameters.touched else None
        answers: dict[int, float | None] = dict.fromkeys(proposals)
        while answers:
            points = {}
            for b, answer in answers.items():
                try:
                    points[b] = proposals[b].send(answer)
                except StopIteration as end:
                    self.members[b].trial, settled = end.value
                    if settled is not None:
                        self._settled[b] = settled
            answers = {}
            if points:
                losses = self._residuals(points) if corrected else self._losses(points)
                answers = {b: losses[b] for b in points}
        self.parameters.forward(there)
        if self._settled:
            self.parameters.go(self._settled)
            self._settled = {}

    def _losses(self, points: dict[int, Point]) -> list[float]:
        """All members' losses with these at their points, where they stay. Cost: one run of the closure."""
        self.parameters.go(points)
        for b in points:
            self.members[b].report.trials += 1
        return self.networks.losses_at(self.run())

    def run(self):
        """What the closure returns where the parameters are."""
        lin = self.networks.lin
        return self.tools.evaluator.run(
            self.closure, self.parameters.params, lin.tape_bytes >= LARGE_TAPE and lin.tapeless, self._replay
        )

    def _searched(self, m: Member):
        """Line search along member m's step."""
        rate = self.parameters.common_rates[m.number]
        if rate is None:
            direction = self.parameters.scaled(m.number, m.solution.step)
            slope = float(torch.dot(self.networks.member(m.number).gradient(), direction))
        else:
            slope = rate * m.solution.gain
        search = self.options.search.search(m.report.loss, slope)
        last, losses, answer = None, {}, None
        while True:
            try:
                last = search.send(answer)
            except StopIteration as end:
                t = m.report.line_search = end.value
                break
            answer = losses[last] = yield Point(m.solution.step, last)
        if t is not None and t != last:   # the parameters stand at the last one tried
            losses[t] = yield Point(m.solution.step, t)
        # Products with J may call the parameters back: they go there again.
        settled = None if rate is not None or t is None else Point(m.solution.step, t)
        return self._trial(m, m.report.loss if t is None else losses[t], self._predicted(m, t or 1.0), t is not None), settled

    def _swept(self, m: Member):
        """The best of several dampings' steps."""
        solutions = m.solution
        number, loss = yield from best_of(self, m, solutions)
        self._note(m, solutions.damping[number], solutions[number])
        if not m.solution.usable:
            return Trial(m.report.loss, math.nan, math.nan, False, m.report.damping), None
        return self._trial(m, loss, self._predicted(m)), Point(m.solution.step)

    def batched_losses(self, displacements: list[torch.Tensor]) -> list[float] | None:
        """One network's losses at theta - e for these e, in one run of the closure; None where that cannot be."""
        report, evaluator = self.members[0].report, self.tools.evaluator
        if not evaluator.batches(self.closure):
            return None
        report.trials += 1
        return evaluator.batched(
            self.closure, self.parameters.params, displacements, self._replay, self.networks.lin.scalar
        )

    def agrees(self, batched: float, alone: float) -> bool:
        """Whether a batched loss is the closure's own."""
        return self.tools.evaluator.agrees(self.closure, batched, alone, self.loss)

    def _corrected(self, m: Member):
        """The second-order correction of member m's step."""
        parameters, b = self.parameters, m.number
        delta = parameters.scaled(b, m.solution.step)
        model = CorrectedStep(self.networks.member(b), m.solution, parameters, b, m.report.loss)
        correct, answer = m.acceleration.correct(model, delta), None
        while True:
            try:
                model.tried = parameters.fitting(correct.send(answer))
            except StopIteration as end:
                e, after = end.value
                break
            answer, model.residual = yield Point(model.tried, displacement=True)
        e = parameters.fitting(e)
        m.report.correction = model.size(e - delta) / max(model.size(delta), 1e-300)
        predicted = self._predicted(m) if self.options.predicts else math.nan
        return self._trial(m, after, predicted), Point(e, displacement=True)

    def _residuals(self, points: dict[int, Point]) -> dict[int, tuple[float, torch.Tensor]]:
        """(loss, residual) of the members at their points, from which they return."""
        self.parameters.go(points)
        for b in points:
            self.members[b].report.trials += 1
        lin, params = self.networks.lin, self.parameters.params
        tapeless = lin.tapeless and not lin.residuals_need_tape and lin.tape_bytes >= LARGE_TAPE
        run = partial(self.tools.evaluator.run, self.closure, params, tapeless, self._replay)
        found = self.networks.residuals_at(run)
        self.parameters.back(points)
        self.networks.unchanged()
        return found

    # --- decide -----------------------------------------------------------------------------------------------------------

    def decide(self) -> None:
        """Keep or undo; the next damping; who is done."""
        options, pending = self.options, []
        for m in self.pending:
            report, trial, state = m.report, m.trial, m.state
            first = state.promised != state.promised and not trial.with_momentum
            if options.constraint is not None:   # a step that this shortened says nothing
                first = first and not self.parameters.shortened(m.number)
            falls = state.mu > options.rule.smallest
            verdict = judge(trial, first, options.predicts, self.eps, state.rejected > 0, falls)
            if options.rule.target:
                verdict = demanded(options.rule, state, verdict)
            if verdict.ended or first and (verdict.tiny or report.loss == 0):
                verdict = looked_into(self, m, verdict, falls)
            elif verdict.kept and options.asks:
                verdict = tested(self, m, verdict)
            if not verdict.kept:
                self.parameters.back((m.number,))
            m.state, over = advance(options.rule, state, trial, verdict, partial(self._curvature, m))
            report.status = STATUS[verdict.status]
            if trial.usable:
                report.loss_after = None if m.acceleration is None else trial.after
                if options.predicts:
                    report.predicted_reduction = trial.predicted
                    report.gain_ratio = None if verdict.ratio != verdict.ratio else verdict.ratio
                    report.loss_after = trial.after if verdict.kept else trial.loss
            else:
                m.failures += 1
            if over and report.status == "rejected" and not verdict.ended and options.rule.tries:
                in_vain(self, m)
            if not over:
                if trial.usable and trial.with_momentum:
                    m.prior = None
                if m.state.mu > HELD:
                    m.state = m.state._replace(mu=min(m.state.mu, largest(self.loss.dtype)))
                pending.append(m)
        self.pending = pending

    def at_theta(self, m: Member, find):
        """find(), which takes products with member m's J, and the member where it was."""
        with self.parameters.home(m.number):
            return self._with_products(m, find)

    def _curvature(self, m: Member) -> float:
        return self._with_products(m, partial(curvature, partial(self.networks.member, m.number), m.solution))

    def _with_products(self, m: Member, find):
        """find(), which takes products with member m's J: the member returns to theta for them."""
        self.parameters.back((m.number,))
        there = self._at_linearization() if self.parameters.touched else None
        found = find()
        self.parameters.forward(there)
        return found

    # --- the end ----------------------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Make the step stand: weight decay, the report, and what the next step starts from, in one go."""
        options, parameters, dtype, tries = self.options, self.parameters, self.loss.dtype, self.options.rule.tries
        memories, steps = [], {}
        for m in self.members:
            memory, report, state = dict(m.memory), m.report, m.state
            memories.append(memory)
            if m.trial is None:
                continue
            moved = m.number in parameters.away
            if m.cost is not None:
                state = m.learn(options.rule, options.balance is None or self.closure.keeps(m.number))
            memory.update(rule=state.memory, wide=m.wide, keep=m.keep, rejected=state.rejected, momentum=moved)
            memory.pop("captured", None)
            if options.balance is not None:
                memory["weights"] = self.closure.next[m.number]
            mu, at_bound = report.damping, False
            report.scaling, memory["scaled"] = "marquardt" if m.scaled else "identity", m.scaled
            if tries:
                mu, at_bound = m.settled(dtype)
                memory["curvature"] = m.curvature
                if m.curvature == m.curvature or memory["damping"] == memory["damping"]:   # else the next step looks for both
                    memory["damping"] = mu
            report.next_damping = mu
            if isinstance(self.closure, Batched):
                self.networks.lin.tell(report)
            if report.status != "accepted" or m.failures or m.why or m.solution.status != "solved":
                say(m, at_bound, self.eps, dtype)
            if moved:
                steps[m.number] = m.solution.step
        if self._decaying and parameters.away:
            parameters.decay(self._decays)
        momenta = kept(steps, parameters, self.optimizer_state) if options.momentum and steps else ()
        for name, values in (("scale", self._scales), (KEY, momenta)):
            for p, value in zip(parameters.params, values, strict=False):
                own = self.optimizer_state[p]
                self._written.append((own, name, own.get(name)))
                own[name] = value
        if parameters.stacked:
            self.report = EnsembleReport([m.report for m in self.members], self.seconds)
        else:
            self.report = self.members[0].report
        self.memory.update(step=self._step + 1, members=memories)
