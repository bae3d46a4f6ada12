"""Levenberg-Marquardt as a torch.optim.Optimizer: linearise, solve, try, keep or undo."""

from __future__ import annotations

import functools
import math
from time import perf_counter

import torch
from torch.optim import optimizer

from . import globalize
from .backend import backend as choose_backend
from .kernels import requested
from .linear import check_stacked
from .lockstep import ATTEMPTS, Lockstep, each_of, joined, share_of
from .report import Report, advice, stall
from .solve import CG, SOLVERS

_NO_SQUARES = (
    "pgdfast.LM: acceleration corrects residuals, and the closure's loss has a cross-entropy, which is none; nothing was "
    "changed. Use acceleration=None for it."
)

_SWEEPS_ALONE = (
    "pgdfast.LM: damping_rule 'sweep' compares plain steps of several dampings, and a line_search or acceleration would shape "
    "the winner only; use line_search=None and acceleration=None with it, or another rule."
)


def _hooked(step):
    """Step with torch.optim's hooks and profiler label, at their cost only where there are any.

    Optimizer wraps `step` itself unless it is marked as wrapped; its wrapper opens a profiler record at every call, which
    takes a tenth of a small step.
    """
    wrapped = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def hooked(self, *args, **kwargs):
        wanted = (
            torch.autograd._profiler_enabled() or self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
            or optimizer._global_optimizer_pre_hooks or optimizer._global_optimizer_post_hooks
        )
        return (wrapped if wanted else step)(self, *args, **kwargs)

    hooked.hooked = True
    return hooked


class LM(torch.optim.Optimizer):
    """Damped Gauss-Newton steps, (mu D + J^T J) delta = J^T r, theta <- theta - lr delta.

    params: tensors or parameter groups; groups may have their own lr and weight_decay. lr: step length. damping: mu, a
    number or a callable step -> mu (with damping_rule="constant"); 0 means Gauss-Newton with the pseudo-inverse cut at
    `rcond` (relative to the largest eigenvalue of J J^T). damping_rule: "gain-ratio", "delayed", "sweep" (several mu a step,
    the best taken; all three never uphill), "constant" (the paper's plain LM) or an object (pgdfast.globalize.damping).
    acceleration: None, "geodesic", "chord" or an object (pgdfast.globalize.acceleration): corrections of second order, for
    losses that are sums of squares. scaling: "identity" or "marquardt", D the running maximum of diag(J^T J). weight_decay:
    decoupled, as in AdamW. solver: "auto", "dual", "primal", "cg", "lsmr" or "eigh". line_search: None, "armijo" or an object.
    cg: options of CG and LSMR. backend: "auto", "native", "triton", "torch" or "reference"; PGDFAST_BACKEND does the same from
    outside. momentum: beta of SPRING, for batches that change from step to step: + mu D beta delta_last on the right; two more
    products with J a solve. norm_constraint: the largest ||lr delta||^2; longer moves are shortened to it, corrections of
    acceleration included. ensemble: B networks of one shape trained at once, each as it would be alone: every parameter has
    the members on its first dimension, the closure returns B losses, (B,), or residuals, (B, ...), `step` returns (B,),
    `report[b]` is member b's, and lr and damping may be B numbers. See pgdfast.functional_ensemble.

    A scalar loss is minimised as written: for F.mse_loss (mean), J^T J carries the factor 2 / (N O), and mu is relative
    to that. Residual tensors give L = 1/2 ||r||^2 un-normalised. Cross-entropy takes the generalised Gauss-Newton matrix.

    Source: Levenberg (1944), Marquardt (1963); the constant rule is arXiv 2601.03162, section 2; momentum 2401.10190.
    """

    _captured = None   # the CapturedStep whose steps the memory may not know of yet

    def __init__(
        self, params, lr: float = 1.0, damping=1e-2, *, damping_rule="gain-ratio", acceleration=None,
        scaling: str = "identity", weight_decay: float = 0.0, solver: str = "auto", line_search=None,
        cg: CG | None = None, rcond: float = 1e-8, ensemble=None, backend: str = "auto",
        momentum: float = 0.0, norm_constraint: float | None = None,
    ):
        _check_options(lr, damping, damping_rule, scaling, weight_decay, solver, cg, rcond, ensemble)
        self._rule = globalize.damping_rule(damping_rule)
        self._search, self._acceleration = globalize.line_search(line_search), globalize.acceleration(acceleration)
        if self._search is not None and self._acceleration is not None:
            raise ValueError("pgdfast.LM: line_search and acceleration both shape the step; use one of them.")
        self._sweeps = hasattr(self._rule, "dampings")
        if self._sweeps and (self._search is not None or self._acceleration is not None):
            raise ValueError(_SWEEPS_ALONE)
        self._momentum, self._constraint = globalize.Momentum(momentum), globalize.checked_constraint(norm_constraint)
        if momentum and cg is not None and cg.truncate:
            raise ValueError(
                "pgdfast.LM: CG(truncate=True) shortens a rejected step along CG's path from zero, and with momentum that path "
                "starts elsewhere; use truncate=False or momentum=0."
            )
        self._lockstep = None if ensemble is None else Lockstep(
            _alone(ensemble, acceleration, momentum, norm_constraint, cg, self._sweeps, self._search, backend), self._rule,
            self._search, requested(backend),
        )
        self._backend, self._generators = choose_backend(backend), globalize.Generators()
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        if ensemble is not None:
            check_stacked([p for group in self.param_groups for p in group["params"]], ensemble)
        self._damping, self._scaling, self._solver = damping, scaling, solver
        self._cg, self._rcond = cg or CG(), rcond
        self.report: Report | None = None

    def __getstate__(self) -> dict:
        """Everything, for copies and pickles; torch.optim's own keeps only what every optimizer has."""
        self._settle()
        own = (
            "_rule", "_search", "_acceleration", "_sweeps", "_momentum", "_constraint", "_backend", "_generators", "_damping",
            "_scaling", "_solver", "_cg", "_rcond", "_lockstep", "report",
        )
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def state_dict(self) -> dict:
        """Everything that a resumed run needs."""
        self._settle()
        return super().state_dict()

    @property
    def ensemble(self) -> int | None:
        """The number of members, None for one network."""
        return self._lockstep and self._lockstep.count

    @property
    def predicts(self) -> bool:
        """Whether steps are tried before they are kept, and the report predicts their reduction."""
        return self._rule.tries or self._search is not None

    @property
    def _runs_again(self) -> bool:
        return self.predicts or self._acceleration is not None

    @_hooked
    def step(self, closure=None) -> torch.Tensor:
        """Take one step and return the loss before it, a 0-dim tensor.

        closure: callable that computes and returns a scalar loss or residual tensors, without calling backward(); it
        runs once, and once more per trial point. What happened stands in `report`.
        Raises ValueError (bad closure, non-finite loss), MemoryError or whatever the closure raises; the parameters are
        then as they were.
        """
        if closure is None:
            raise ValueError("pgdfast.LM.step: needs a closure that returns the loss or the residuals; pass step(closure).")
        params, rates, decays = self._trainable()
        memory = self._memory()
        if self._lockstep is not None:
            return self._step_together(closure, params, rates, decays, memory)
        start = perf_counter()
        draws = self._generators.draws(closure, params[0].device) if self._runs_again else None
        lin = self._backend.linearize(closure, params)
        if self._acceleration is not None and not lin.has_squares_only:
            raise ValueError(_NO_SQUARES)
        if draws is not None:
            draws.linearised()
        loss = float(lin.loss)
        report = Report(loss, residuals=lin.num_residuals, parameters=lin.num_parameters)
        report.seconds = {"linearize": perf_counter() - start, "solve": 0.0, "trial": 0.0}
        if lin.num_residuals == 0 and not lin.penalties:
            report.status, report.advice = "empty", "the closure's batch has no residuals; nothing was changed"
        else:
            trials = globalize.Trials(closure, lin, draws, globalize.Move(params, rates))
            self._descend(trials, decays, memory, report)
            report.trials = trials.count
        memory["step"] += 1
        memory["rule"] = self._rule.state_dict()
        self.report = report
        return lin.loss

    def _step_together(self, closure, params, rates, decays, memory) -> torch.Tensor:
        """The step of an ensemble: the losses before it, (B,)."""
        mus = memory["damping"] if memory["damping"] is not None else self._scheduled(memory["step"])
        losses, self.report = self._lockstep.step(
            closure, params, rates, decays, memory, self._generators, mus, lambda lin: self._scale(lin, params), self._solver,
            self._cg, self._rcond,
        )
        return losses

    def _descend(self, trials, decays, memory, report) -> None:
        """Try dampings until one gives a step that is kept."""
        lin, move = trials.lin, trials.move
        mu = start = memory["damping"] if memory["damping"] is not None else self._scheduled(memory["step"])
        scale, prior = self._scale(lin, move.params), self._momentum.prior(move.params, self.state)
        if self._runs_again or any(decays):
            move.save()
        failures, promised, solution = 0, None, None
        try:
            for report.attempts in range(1, ATTEMPTS + 1):
                at, solution = self._shorter(mu, solution, report) or self._solve(trials, mu, scale, prior, memory, report)
                report.damping, report.momentum = at, 0.0 if prior is None else self._momentum.beta
                move.constrain(solution.step, self._constraint)
                if not solution.usable:
                    failures += 1
                    report.status = "failed"
                    mu = self._rule.invalid(at, globalize.curvature(lin, solution))
                elif self._try(trials, solution, report, mu == start and prior is None):
                    if solution.status != "truncated":   # mu stays where the rejection put it: the step says nothing for less
                        mu = self._rule.accepted(at, report.gain_ratio)
                    break
                elif prior is not None:   # more damping would only lead to the prior: without it, to ever shorter steps
                    lin.parameters_unchanged()
                    prior = None
                elif report.status == "stalled" or not self._rule.tries:
                    break
                else:
                    lin.parameters_unchanged()
                    promised = report.predicted_reduction if promised is None else promised
                    mu = self._rule.rejected(at, report.gain_ratio, globalize.curvature(lin, solution))
            else:
                mu = self._rule.exhausted(start)
        except BaseException:
            move.undo()
            raise
        self._momentum.keep(solution.step if move.moved else None, move.params, self.state)
        if move.moved and any(decays):
            move.decay(decays)
        report.next_damping = mu if self._rule.tries else report.damping
        if self._rule.tries:
            memory["damping"] = mu
        report.advice = advice(report, solution, failures, lin.loss.dtype)
        memory["rejected"] = memory.get("rejected", 0) + 1 if report.status == "rejected" and self._rule.tries else 0
        stalled = stall(report, promised, memory["rejected"], mu >= globalize.LARGEST, lin.loss.dtype)
        if stalled:
            report.status, report.advice = "stalled", stalled

    def _solve(self, trials, mu, scale, prior, memory, report):
        """(mu, solution): for mu, or for the best of the dampings that the rule wants to be tried around it."""
        start = perf_counter()
        solution = found = self._backend.solve(
            trials.lin, self._rule.dampings(mu) if self._sweeps else mu, scale=scale, solver=self._solver, cg=self._cg,
            rcond=self._rcond, wide=memory["wide"], keep=memory["keep"], time=memory["step"], prior=prior,
        )
        solved = perf_counter()
        report.seconds["solve"] += solved - start
        if self._sweeps:
            best = globalize.best(trials, found, self._constraint)
            mu, solution = found.damping[best], found[best]
            report.seconds["trial"] += perf_counter() - solved
        memory["wide"], memory["keep"] = solution.wide, solution.keep
        report.of(solution)
        return mu, solution

    def _shorter(self, mu, rejected, report):
        """(mu, an earlier iterate of the solve whose step was rejected) where one was kept: no new solve."""
        solution = rejected.shortened() if rejected is not None and rejected.usable else None
        if solution is None:
            return None
        report.of(solution)
        return mu, solution

    def _try(self, trials, solution, report, first: bool) -> bool:
        """Take the step, or what a search along it finds; keep it if the loss falls or nobody asks, else undo it."""
        start, kept = perf_counter(), True
        if not self.predicts:
            report.loss_after, report.status = self._go(trials, solution, report), "accepted"
        else:
            reduction, slope = globalize.predictions(trials.lin, trials.move, solution)
            if self._search is None:
                t, after = 1.0, self._go(trials, solution, report)
            else:
                t, after, _ = self._search.search(functools.partial(trials.along, solution.step), report.loss, slope)
                report.line_search = t
            kept = globalize.judged(report, after, reduction(t or 1.0), t is not None, first, trials.lin.loss.dtype)
            if not kept:
                trials.move.undo()
        report.seconds["trial"] += perf_counter() - start
        return kept

    def _go(self, trials, solution, report) -> float | None:
        """Move along the step, with its second-order correction if that is wanted; the loss there, None where nobody asks."""
        if self._acceleration is not None and solution.status != "truncated":
            delta = trials.move.scaled(solution.step)
            e, after = self._acceleration.take(trials.of(solution), delta)
            e = trials.move.shift(e)
            report.correction = trials.size(e - delta) / max(trials.size(delta), 1e-300)
            return after
        if self.predicts:
            return trials.along(solution.step)
        trials.move.to(solution.step)
        return None

    def member_state_dicts(self) -> list[dict]:
        """A state_dict for each member of the ensemble, as an LM has that trains the member alone: to go on alone with it.

        Raises ValueError without an ensemble.
        """
        if self._lockstep is None:
            raise ValueError("pgdfast.LM.member_state_dicts: this LM trains one network; use state_dict().")
        state = self.state_dict()
        return [share_of(state, b) for b in range(self._lockstep.count)]

    def load_member_state_dicts(self, states: list[dict]) -> None:
        """Go on as an ensemble with members that were trained alone, or in other company, for equally many steps.

        states: B state_dicts, of LMs that each trained one member, or out of `member_state_dicts`.
        Raises ValueError without an ensemble, for another number of states, and for members of different step counts.
        """
        if self._lockstep is None or len(states) != self._lockstep.count:
            wanted = "one network; use load_state_dict()" if self._lockstep is None else f"{self._lockstep.count} members"
            raise ValueError(f"pgdfast.LM.load_member_state_dicts: got {len(states)} states, and this LM trains {wanted}.")
        self.load_state_dict(joined(states))

    def _trainable(self):
        """Parameters that require gradients, with the lr and lr * weight_decay of their groups."""
        params, rates, decays = [], [], []
        for group in self.param_groups:
            rate = float(group["lr"]) if self._lockstep is None else each_of(group["lr"], self._lockstep.count, "lr")
            trained = [p for p in group["params"] if p.requires_grad]
            params += trained
            rates += [rate] * len(trained)
            decay = group["weight_decay"]
            decays += [[r * decay for r in rate] if isinstance(rate, list) else rate * decay] * len(trained)
        if not params:
            raise ValueError("pgdfast.LM: no parameter requires a gradient; unfreeze one or pass others.")
        return params, rates, decays

    def _memory(self) -> dict:
        """What must survive a restart, kept where state_dict finds it: beside the first parameter."""
        self._settle()
        memory = self.state[next(group["params"][0] for group in self.param_groups if group["params"])]
        if self._lockstep is not None:
            self._lockstep.begin(memory, self._damping)
            return memory
        if "step" not in memory:
            adaptive = self._rule.tries
            memory.update(step=0, wide=False, damping=float(self._damping) if adaptive else None, rule=self._rule.state_dict())
        memory.setdefault("keep", {})   # CG's last solution and its preconditioner, where it wants them
        self._rule.load_state_dict(memory["rule"])
        return memory

    def _settle(self) -> None:
        """Bring what a captured step keeps on the device into the memory."""
        if self._captured is not None:
            self._captured.settle()

    def _scheduled(self, step: int):
        mu = self._damping(step) if callable(self._damping) else self._damping
        if self._lockstep is not None:
            return each_of(mu, self._lockstep.count, f"damping at step {step}")
        if not isinstance(mu, (int, float)) or not 0 <= mu < math.inf:
            raise ValueError(f"pgdfast.LM: damping at step {step} is {mu!r}; it must be finite and not negative.")
        return float(mu)

    def _scale(self, lin, params) -> torch.Tensor | None:
        """Marquardt's D: the running maximum of diag(J^T J), 1 where the loss does not reach a parameter."""
        if self._scaling == "identity":
            return None
        rows = () if self._lockstep is None else (self._lockstep.count,)
        size = max(math.prod(rows), 1)
        parts = lin.diagonal().split([p.numel() // size for p in params], -1)
        scales = []
        for p, part in zip(params, parts, strict=True):
            state = self.state[p]
            seen = part.reshape(p.shape).to(p.dtype)
            state["scale"] = torch.maximum(state["scale"], seen) if "scale" in state else seen.clone()
            scales.append(state["scale"].reshape(*rows, -1))
        scale = torch.cat(scales, -1)
        return torch.where(scale > 0, scale, 1.0)


def _check_options(lr, damping, rule, scaling, weight_decay, solver, cg, rcond, ensemble) -> None:
    if ensemble is not None:
        if not isinstance(ensemble, int) or isinstance(ensemble, bool) or ensemble < 1:
            raise ValueError(f"pgdfast.LM: ensemble is {ensemble!r}; it must be None or the number of members, 1 or more.")
        each_of(lr, ensemble, "lr")
        if not callable(damping):
            damping = max(each_of(damping, ensemble, "damping"))
        lr = 1.0
    if not (isinstance(lr, (int, float, torch.Tensor)) and 0 <= float(lr) < math.inf):
        raise ValueError(f"pgdfast.LM: lr is {lr!r}; it must be a finite number that is not negative.")
    if callable(damping):
        if rule != "constant":
            raise ValueError(
                f"pgdfast.LM: damping is a schedule but damping_rule is {rule!r}, which sets mu itself; use "
                "damping_rule='constant' with a schedule."
            )
    elif not (isinstance(damping, (int, float)) and 0 <= damping < math.inf):
        raise ValueError(f"pgdfast.LM: damping is {damping!r}; it must be a finite number >= 0 or a callable step -> mu.")
    if scaling not in ("identity", "marquardt"):
        raise ValueError(f"pgdfast.LM: unknown scaling {scaling!r}; use 'identity' or 'marquardt'.")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"pgdfast.LM: weight_decay is {weight_decay!r}; it must be a finite number that is not negative.")
    if solver not in SOLVERS:
        raise ValueError(f"pgdfast.LM: solver {solver!r} is not available; use one of {', '.join(SOLVERS)}.")
    if cg is not None and not isinstance(cg, CG):
        raise ValueError(f"pgdfast.LM: cg is {cg!r}; it must be pgdfast.CG(max_iterations=..., tolerance=...).")
    if not 0 < rcond < 1:
        raise ValueError(f"pgdfast.LM: rcond is {rcond!r}; it must lie between 0 and 1.")


def _alone(ensemble, acceleration, momentum, norm_constraint, cg, sweeps, search, backend) -> int:
    """The number of members, where no option is for one network alone; ValueError names one that is."""
    refused = {
        "acceleration": acceleration, "momentum": momentum, "norm_constraint": norm_constraint,
        "cg=pgdfast.CG(truncate=True)": cg is not None and cg.truncate,
        "damping_rule='sweep'": sweeps,
        "a line search of one's own": search is not None and not isinstance(search, globalize.Armijo),
        "backend='reference'": requested(backend) == "reference",
    }
    for what, given in refused.items():
        if given:
            raise ValueError(
                f"pgdfast.LM: {what} does not work with ensemble={ensemble}; leave it out, or train the members one by one."
            )
    return ensemble
