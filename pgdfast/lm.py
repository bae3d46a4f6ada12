"""Levenberg-Marquardt as a torch.optim.Optimizer: linearize, solve, try, keep or undo."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from itertools import compress
from operator import is_, itemgetter
from typing import Any, Generic, Literal, TypeVar, cast, overload

import torch
from torch.optim import optimizer

from .backend import backend as choose_backend
from .linear import as_operations, check_stacked, checked_check
from .parts import Batched, checked_memory, chosen_group, on_all_rows, refuse_distributed
from .report import EnsembleReport, Report
from .solve import CG, SOLVERS
from .step import (
    Acceleration,
    Balance,
    DampingRule,
    HostStep,
    LineSearch,
    Parameters,
    StepOptions,
    StepTools,
    Tolerances,
    Weighted,
    check_balance,
    checked,
    checked_constraint,
    checked_momentum,
    chosen_balance,
    chosen_search,
    chosen_together,
    each_of,
    joined,
    new_memory,
    out_of_memory,
    share_of,
)

_Step = TypeVar("_Step", bound=Callable[..., Any])
_Params = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]
_Mu = float | torch.Tensor | list[float] | Callable[[int], Any]
_Result = torch.Tensor | tuple[torch.Tensor, ...] | list[torch.Tensor]
R = TypeVar("R", Report, EnsembleReport)   # Report for one network
Rule = Literal["auto", "gain-ratio", "delayed", "longest", "sweep", "constant"] | DampingRule
Correction = Literal["auto", "geodesic", "chord"] | Acceleration | None
Search = Literal["armijo"] | LineSearch | None
Scaling = Literal["auto", "identity", "marquardt"]
Weights = Literal["trace", "gradient"] | Balance | None
Solver = Literal["auto", "dual", "primal", "cg", "lsmr", "eigh"]
Check = Literal["first", "every", "never"]
Backend = Literal["auto", "native", "triton", "torch", "reference"]


def _hooked(step: _Step) -> _Step:
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

    hooked.hooked = True   # type: ignore[attr-defined]
    return cast(_Step, hooked)


_DAMPING = itemgetter("damping")


class LM(torch.optim.Optimizer, Generic[R]):
    """Damped Gauss-Newton steps, (mu D + J^T J) delta = J^T r, theta <- theta - lr delta.

    A scalar loss is minimized as written: for F.mse_loss (mean), J^T J carries the factor 2 / (N O), and mu is relative
    to that. Residual tensors give L = 1/2 ||r||^2 un-normalized. Cross-entropies, robust losses and any other sum of convex
    functions of the model's outputs take the generalized Gauss-Newton matrix.

    Args:
        params: tensors or parameter groups; groups may have their own lr and weight_decay. A group at lr 0 is left out of
            the solve, as if frozen. A complex tensor counts as its real
            and imaginary parts, as in torch.optim: two numbers for each entry, each with a column of J.
        lr (float or tensor, default 1): step length. 1 is the full step; smaller for new batches at every step. A rate kept
            from Adam, such as 1e-3, makes LM a thousand times slower.
        damping (None, float >= 0 or callable, default None): mu to begin with. None finds it at the first step: 1e-4 with
            Marquardt's D, else 1e-3 times the loss's curvature along its gradient, for two products with J; then c times the
            residuals take the same steps. For "constant", None is 1e-2; a callable step -> mu goes with that rule alone. 0
            means Gauss-Newton, with the pseudo-inverse cut at `rcond`.
        damping_rule (str or DampingRule, default "auto"): how mu follows the steps. "auto" is "gain-ratio", and finds out
            whether corrected steps with a faster falling mu pay; "gain-ratio" and "delayed" adapt mu; "longest" takes the
            smallest mu that gives a quarter of the predicted reduction; "sweep" tries several mu a step and takes the best.
            None of these goes uphill. "constant" is the paper's plain LM.
        acceleration ("auto", None, "geodesic", "chord" or an Acceleration, default "auto"): second-order corrections, for
            losses that are sums of squares. "auto" leaves them to damping_rule="auto", which for any other choice here is
            "gain-ratio"; with other rules, in ensembles, with a line search or momentum it is None.
        scaling ("auto", "identity" or "marquardt", default "auto"): D. "marquardt" is the running maximum of diag(J^T J), for
            parameters of very different size. "auto" takes it where the rule adapts mu and the first step meets up to 32
            parameters whose diag(J^T J) differs by a factor of 1e6 or more, as in curve fits; elsewhere the identity.
            `report.scaling` says which.
        weight_decay (float >= 0, default 0): decoupled, as in AdamW.
        solver ("auto", "dual", "primal", "cg", "lsmr" or "eigh", default "auto"): "auto" compares predicted costs.
        line_search (None, "armijo" or a LineSearch): backtracking along the step.
        cg (CG): limits of CG and LSMR; preconditioner, warm start, truncation.
        rcond (float in (0, 1), default 1e-8): of the pseudo-inverse, relative to the largest eigenvalue of J J^T.
        ensemble (None or int): B networks of one shape trained at once, each as it would be alone. Every parameter has the
            members on its first dimension, the closure returns B losses, (B,), or residuals, (B, ...), `step` returns (B,),
            `report[b]` is member b's, and lr and damping may be B numbers. See pgdfast.functional_ensemble.
        backend ("auto", "native", "triton", "torch" or "reference", default "auto"): PGDFAST_BACKEND does the same from
            outside. "reference" is slow, plain, float64: to check against.
        momentum (float in [0, 1), default 0): beta of SPRING, for batches that change from step to step: + mu D beta
            delta_last on the right. Two more products with J a solve.
        norm_constraint (None or float > 0): the largest ||lr delta||^2; longer moves are shortened to it, corrections of
            acceleration included.
        balance (None, "trace", "gradient" or a Balance): weights w_k of the terms of a closure that returns several
            residual tensors, found from step to step. `step` returns the weighted loss, sum_k w_k/2 ||r_k||^2, which it
            minimizes; the report has `weights` and the unweighted `terms`. See pgdfast.Balance.
        check ("first", "every" or "never", default "first"): when products with J are compared with autograd, <J v, w> with
            <v, J^T w> and J^T r with the gradient of the loss: at the first tape of every structure, at every step, or never
            but where hooks or Functions of one's own take part. Rules that disagree are left for autograd, with a warning. The
            closure does not run again; a check takes three products and a backward pass. Not part of the state_dict.
        ftol, xtol, gtol (None, or floats in [0, 1), default None): MINPACK's loss, step and gradient tests, relative and free
            of units, by which `converged` speaks; LM does not stop by itself. None: what the loss's rounding allows; 0: no such
            test. Numbers as in SciPy (1e-8) make it speak earlier. ftol: the loss changed, and the model without damping
            promises, at most this part of it. xtol: the step without damping is at most this part of the parameters, each in
            units of its column of J. gtol: the largest cosine of the residuals with a column of J. The tests take a gradient
            and diag(J^T J) at steps where the numbers at hand allow them to hold. Not part of the state_dict.
        process_group (None or a torch.distributed process group): each process's closure has rows of its own, and the step is
            that of the closure on all of them, in every process. See pgdfast.Ranks.
        memory (None or bytes): what steps over batches may keep of their tapes in this process, a quarter of what is available
            unless given; closures whose tapes do not fit run again for every product with J.

    Raises ValueError or TypeError for options out of these ranges; RuntimeError for a backend that cannot be used here.

    Source: Levenberg (1944), Marquardt (1963); the constant rule is arXiv 2601.03162, section 2; momentum 2401.10190.
    """

    returned_loss = False   # did the closure of the last step return the loss, in one number?
    _in_group = False
    _captured = None   # the CapturedStep whose steps the memory may not know of yet
    report: R

    @overload
    def __init__(
        self: LM[Report], params: _Params, lr: float | torch.Tensor = 1.0, damping: _Mu | None = None, *,
        damping_rule: Rule = "auto", acceleration: Correction = "auto", scaling: Scaling = "auto",
        weight_decay: float = 0.0, solver: Solver = "auto", line_search: Search = None, cg: CG | None = None,
        rcond: float = 1e-8, ensemble: None = None, backend: Backend = "auto", momentum: float = 0.0,
        norm_constraint: float | None = None, balance: Weights = None, check: Check = "first", ftol: float | None = None,
        xtol: float | None = None, gtol: float | None = None, process_group: Any = None, memory: float | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self: LM[EnsembleReport], params: _Params, lr: float | torch.Tensor | list[float] = 1.0,
        damping: _Mu | None = None, *,
        damping_rule: Rule = "auto", acceleration: Correction = "auto", scaling: Scaling = "auto",
        weight_decay: float = 0.0, solver: Solver = "auto", line_search: Search = None, cg: CG | None = None,
        rcond: float = 1e-8, ensemble: int, backend: Backend = "auto", momentum: float = 0.0,
        norm_constraint: float | None = None, balance: Weights = None, check: Check = "first", ftol: float | None = None,
        xtol: float | None = None, gtol: float | None = None, process_group: Any = None, memory: float | None = None,
    ) -> None: ...

    def __init__(
        self, params, lr=1.0, damping=None, *, damping_rule="auto", acceleration="auto", scaling="auto",
        weight_decay=0.0, solver="auto", line_search=None, cg=None, rcond=1e-8, ensemble=None, backend="auto", momentum=0.0,
        norm_constraint=None, balance=None, check="first", ftol=None, xtol=None, gtol=None, process_group=None, memory=None,
    ):
        _check_options(lr, damping, damping_rule, scaling, weight_decay, solver, cg, rcond, ensemble)
        search, momentum = chosen_search(line_search), checked_momentum(momentum)
        plain = ensemble is not None or search is not None or momentum > 0
        rule, acceleration = chosen_together(damping_rule, acceleration, plain)
        self._options = StepOptions(
            rule, search, acceleration, momentum, checked_constraint(norm_constraint), scaling, solver, cg or CG(), rcond,
            Tolerances(ftol, xtol, gtol), chosen_balance(balance),
        )
        _check_together(self._options)
        group = chosen_group(process_group)
        self._tools = StepTools(choose_backend(backend, checked_check(check, "LM"), group, checked_memory(memory)))
        self._in_group = process_group is not None
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        refuse_distributed([p for each in self.param_groups for p in each["params"]])
        if self._in_group:
            self._check_parts(ensemble, "a process group")
            group.check([p for each in self.param_groups for p in each["params"]])
            told = dict(
                lr=lr, damping=damping, damping_rule=damping_rule, acceleration=acceleration, scaling=scaling, cg=cg,
                weight_decay=weight_decay, solver=solver, rcond=rcond, momentum=momentum, norm_constraint=norm_constraint,
                ftol=ftol, xtol=xtol, gtol=gtol,
            )
            plain = int, float, str, CG
            group.agree("options", {name: value if isinstance(value, plain) else None for name, value in told.items()})
        if ensemble is not None:
            check_stacked([p for group in self.param_groups for p in group["params"]], ensemble)
        self._damping: Any = _GIVEN if damping is None and not self._options.rule.tries else damping
        self.ensemble: int | None = ensemble
        none = [Report(math.nan, status="none", advice="no step was taken yet") for _ in range(ensemble or 1)]
        self.report = none[0] if ensemble is None else EnsembleReport(none, {})

    @_hooked
    def step(   # type: ignore[override]
        self, closure: Callable[..., _Result] | None = None, batches: Iterable | None = None, *,
        progress: bool | Callable[[str, int], None] = False,
    ) -> torch.Tensor:
        """Take one step and return the loss before it, a 0-dim tensor; (B,) for an ensemble.

        Args:
            closure: callable that computes and returns a scalar loss or residual tensors, without calling backward(); it
                runs once, and once more per trial point.
            batches: None, or an iterable of batches, the same each time it is gone through: a list, a DataLoader. The closure
                is then called with each of them, and the step is that of the closure on all rows as one batch.
            progress: with batches, True for a line on standard error, or a callable (what runs, batches done).

        What happened stands in `report`. Raises ValueError (bad closure, non-finite loss, batches that change), MemoryError or
        whatever the closure raises; the parameters are left unchanged.
        """
        if closure is None:
            raise ValueError("pgdfast.LM.step: needs a closure that returns the loss or the residuals; pass step(closure).")
        if batches is not None or self._in_group:
            closure = self._parts(closure, batches, progress)
        return as_operations(self._step, closure)

    def _parts(self, closure, batches, progress):
        """The closure over all batches, of this process."""
        self._check_parts(self.ensemble, "batches")
        if self._tools.backend.name == "reference":
            return on_all_rows(closure, batches)
        return Batched(closure, batches, progress=progress)

    def _check_parts(self, ensemble, what: str) -> None:
        """Raise ValueError for options that do not go with parts of rows."""
        if ensemble is not None:
            raise ValueError(f"pgdfast.LM: ensemble and {what} do not work together; use one of them.")
        if self._options.balance is not None:
            raise ValueError(f"pgdfast.LM: balance and {what} do not work together; weight the terms in the closure.")
        if self._in_group and self._tools.backend.name == "reference":
            raise ValueError("pgdfast.LM: backend 'reference' runs in one process; use another backend in a process group.")

    def _step(self, closure) -> torch.Tensor:
        step = self._begin(closure)
        try:
            step.linearize()
            while step.pending:
                step.solve()
                step.attempt()
                step.decide()
            step.commit()
        except BaseException as error:
            step.undo()
            if self._in_group:
                self._tools.backend.group.left(error)
            if isinstance(error, RuntimeError) and out_of_memory(error) and not isinstance(error, torch.OutOfMemoryError):
                raise MemoryError(f"pgdfast.LM.step: memory ran out; the parameters are unchanged. {error}") from error
            raise
        finally:
            step.release()
        self.report, self.returned_loss = step.report, step.scalar
        return step.loss

    @property
    def predicts(self) -> bool:
        """Whether steps are tried before they are kept, and the report predicts their reduction."""
        return self._options.predicts

    @property
    def converged(self) -> bool | list[bool]:
        """Whether the last step's report says "converged"; a list of B for an ensemble, False before the first step.

        Of a captured step it waits for the device.
        """
        status = self.report.status
        return [each == "converged" for each in status] if isinstance(status, list) else status == "converged"

    def state_dict(self) -> dict:
        """Everything that a resumed run needs."""
        self._settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore what `state_dict` gave. Raises ValueError, with nothing changed, for the state of another kind of LM."""
        for values in state_dict.get("state", {}).values():
            if "step" in values:
                checked(values, self._options.rule, self.ensemble or 1)
                check_balance(values, self._options.balance)
        super().load_state_dict(state_dict)

    def member_state_dicts(self) -> list[dict]:
        """A state_dict for each member of the ensemble, as an LM has that trains the member alone: to go on alone with it.

        Raises ValueError without an ensemble.
        """
        if self.ensemble is None:
            raise ValueError("pgdfast.LM.member_state_dicts: this LM trains one network; use state_dict().")
        state = self.state_dict()
        return [share_of(state, b) for b in range(self.ensemble)]

    def load_member_state_dicts(self, states: list[dict]) -> None:
        """Go on as an ensemble with members that were trained alone, or in other company, for equally many steps.

        states: B state_dicts, of LMs that each trained one member, or out of `member_state_dicts`.
        Raises ValueError without an ensemble, for another number of states, and for members of different step counts.
        """
        if self.ensemble is None or len(states) != self.ensemble:
            wanted = "one network; use load_state_dict()" if self.ensemble is None else f"{self.ensemble} members"
            raise ValueError(f"pgdfast.LM.load_member_state_dicts: got {len(states)} states, and this LM trains {wanted}.")
        self.load_state_dict(joined(states))

    def __getstate__(self) -> dict:
        """Everything, for copies and pickles; torch.optim's own keeps only what every optimizer has."""
        if self._in_group:
            raise ValueError(
                "pgdfast.LM: an LM in a process group cannot be copied or pickled; make one with process_group= where it is "
                "needed, and load its state_dict()."
            )
        self._settle()
        own = {name: getattr(self, name) for name in ("_options", "_damping", "ensemble", "_in_group")}
        report = getattr(self.report, "now", lambda: self.report)()   # a captured step's, with its numbers
        return super().__getstate__() | own | {"report": report, "_tools": StepTools(self._tools.backend)}

    # --- what a step starts from --------------------------------------------------------------------------------------------

    def _begin(self, closure) -> HostStep:
        """The step from here: parameters with their rates, and what the optimizer remembers."""
        if self._captured is not None:
            self._captured.settle()
        params, rates, decays = self._trainable()
        if 0.0 in rates[0]:
            params, rates, decays = _moving(params, rates, decays)
        memory, tools = self._memory(), self._tools
        parameters = tools.parameters
        if parameters is None or len(parameters.params) != len(params) or not all(map(is_, parameters.params, params)):
            tools.parameters = Parameters(params, self.ensemble)
        if self._options.rule.tries:
            mus = list(map(_DAMPING, memory["members"]))
        else:
            mus = self._scheduled(memory["step"])
        if max(mus) > _FLOAT32:
            _check_range(max(mus), params)
        if self._options.balance is not None:
            closure = Weighted(closure, self._options.balance, memory["members"], params[0], self.ensemble is not None)
        return HostStep(self._options, tools, closure, rates, decays, memory, self.state, mus)

    def _trainable(self) -> tuple[list[torch.Tensor], list[list[float]], list[list[float]]]:
        """Parameters that require gradients; by member, the lr and lr * weight_decay of each."""
        params, groups = [], []
        for group in self.param_groups:
            before = len(params)
            for p in group["params"]:
                if p.requires_grad:
                    params.append(p)
            groups.append((group["lr"], group["weight_decay"], len(params) - before))
        if not params:
            raise ValueError("pgdfast.LM: no parameter requires a gradient; unfreeze one or pass others.")
        rates, decays = [], []
        for b in range(self.ensemble or 1):
            rates.append([])
            decays.append([])
            for lr, decay, count in groups:
                rate = float(lr) if self.ensemble is None else each_of(lr, self.ensemble, "lr")[b]
                rates[b] += [rate] * count
                decays[b] += [rate * decay] * count
        return params, rates, decays

    def _memory(self) -> dict:
        """What must survive a restart, kept where state_dict finds it: beside the first parameter."""
        for group in self.param_groups:
            if group["params"]:
                memory = self.state[group["params"][0]]
                break
        if "step" not in memory:
            count, rule = self.ensemble or 1, self._options.rule
            mus = [None] * count
            if rule.tries:   # NaN: the first step finds it
                mus = [math.nan] * count if self._damping is None else each_of(self._damping, count, "damping")
            memory.update(new_memory(rule, mus))
        return memory

    def _settle(self) -> None:
        """Bring what a captured step keeps on the device into the memory."""
        if self._captured is not None:
            self._captured.settle()

    def _scheduled(self, step: int) -> list[float]:
        """The given mu of every member at a step."""
        mu = self._damping(step) if callable(self._damping) else self._damping
        if self.ensemble is not None:
            return each_of(mu, self.ensemble, f"damping at step {step}")
        if not isinstance(mu, (int, float)) or not 0 <= mu < math.inf:
            raise ValueError(f"pgdfast.LM: damping at step {step} is {mu!r}; it must be finite and not negative.")
        return [float(mu)]


_GIVEN = 1e-2   # mu of the constant rule
_FLOAT32 = torch.finfo(torch.float32).max


def _moving(params, rates, decays) -> tuple[list[torch.Tensor], list[list[float]], list[list[float]]]:
    """The parameters that some member has a learning rate above 0 for, as if the others were frozen; all, if there are none."""
    kept = [any(each) for each in zip(*rates, strict=True)]
    if not any(kept):
        return params, rates, decays
    rates, decays = ([list(compress(each, kept)) for each in lists] for lists in (rates, decays))
    return list(compress(params, kept)), rates, decays


def _check_range(mu: float, params: list[torch.Tensor]) -> None:
    """Raise ValueError for a mu that the parameters' type does not hold."""
    for p in params:
        if mu > torch.finfo(p.dtype).max:
            raise ValueError(
                f"pgdfast.LM: damping is {mu!r}, more than {str(p.dtype).removeprefix('torch.')} holds; nothing was changed. "
                "Use a smaller damping, or a float64 model."
            )


def _check_options(lr, damping, rule, scaling, weight_decay, solver, cg, rcond, ensemble) -> None:
    if ensemble is not None:
        if not isinstance(ensemble, int) or isinstance(ensemble, bool) or ensemble < 1:
            raise ValueError(f"pgdfast.LM: ensemble is {ensemble!r}; it must be None or the number of members, 1 or more.")
        each_of(lr, ensemble, "lr")
        if damping is not None and not callable(damping):
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
    elif damping is not None and not (isinstance(damping, (int, float)) and 0 <= damping < math.inf):
        raise ValueError(f"pgdfast.LM: damping is {damping!r}; it must be None, a finite number >= 0 or a callable step -> mu.")
    if scaling not in ("auto", "identity", "marquardt"):
        raise ValueError(f"pgdfast.LM: unknown scaling {scaling!r}; use 'auto', 'identity' or 'marquardt'.")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"pgdfast.LM: weight_decay is {weight_decay!r}; it must be a finite number that is not negative.")
    if solver not in SOLVERS:
        raise ValueError(f"pgdfast.LM: solver {solver!r} is not available; use one of {', '.join(SOLVERS)}.")
    if cg is not None and not isinstance(cg, CG):
        raise ValueError(f"pgdfast.LM: cg is {cg!r}; it must be pgdfast.CG(max_iterations=..., tolerance=...).")
    if not 0 < rcond < 1:
        raise ValueError(f"pgdfast.LM: rcond is {rcond!r}; it must lie between 0 and 1.")


def _check_together(options: StepOptions) -> None:
    """Raise ValueError for options that exclude each other."""
    if options.search is not None and options.acceleration is not None:
        raise ValueError("pgdfast.LM: line_search and acceleration both shape the step; use one of them.")
    if options.rule.sweeps and (options.search is not None or options.acceleration is not None):
        raise ValueError(
            "pgdfast.LM: damping_rule 'sweep' compares plain steps of several dampings, and a line_search or acceleration "
            "would shape the winner only; use line_search=None and acceleration=None with it, or another rule."
        )
    if options.momentum and options.cg.truncate:
        raise ValueError(
            "pgdfast.LM: CG(truncate=True) shortens a rejected step along CG's path from zero, and with momentum that path "
            "starts elsewhere; use truncate=False or momentum=0."
        )
