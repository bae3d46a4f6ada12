"""A whole step without a word to the host, captured as a CUDA graph where the parameters are on a GPU.

Linearise, solve, try, keep or undo, and the damping rule are operations on tensors alone here: the verdict is a `where`, and mu
a number on the device. lm.py is the same step, with the host deciding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .globalize import LARGEST, judged_on_device, on_device
from .linear import Linearizer
from .lm import LM
from .lockstep import ATTEMPTS
from .report import LateReport, Report, advice, stall
from .solve import ADVICE, Direct, direct, solve_direct

_WARM_UP = 3   # steps on the stream that is then captured, as torch.cuda.graphs wants them
_STATUS = ("accepted", "rejected", "failed", "stalled", "not finite")
_ACCEPTED, _REJECTED, _FAILED, _STALLED, _NOT_FINITE = range(5)
# What a step leaves for the next one, and what it tells besides, side by side in one tensor.
_STATE = ("mu", "nu", "start", "attempt", "rejected", "promised")
_TOLD = ("loss", "after", "ratio", "predicted", "damping", "status", "tried", "in_a_row", "first_promise")


class _Way(NamedTuple):
    """What was found out before the first step: how to solve, and whether trials run without a tape."""

    solve: Direct
    tapeless: bool
    residuals: int
    parameters: int


class CapturedStep:
    """Steps of an LM optimizer as one CUDA graph: `step()` launches it and returns without waiting for the GPU.

    optimizer: a pgdfast.LM with direct solves, damping_rule "gain-ratio", "delayed" or "constant", mu > 0, and none of
    ensemble, line_search, acceleration, momentum, norm_constraint and Marquardt scaling. closure: as for LM.step; a graph
    repeats what it did when it was captured, so it reads its batch from tensors that stay where they are (copy_ new data into
    them), draws no random numbers where trials are judged, and does not branch on values. Raises ValueError for other
    optimizers and closures.

    A step tries one damping: a rejected one changes nothing but mu, and the next step goes on from there, through the same
    sequence of mu that LM.step runs through in one call. The first step looks at the closure's problem by three more runs of
    it; the first three run operation by operation, the fourth is captured. On a CPU all run operation by operation.
    Learning rates, weight decay and schedules of mu may change between steps. mu and its like live on the device;
    `optimizer.report`, `state_dict` and LM.step fetch them when they are used. Hooks of the optimizer's step are not called.
    """

    def __init__(self, optimizer: LM, closure):
        _check(optimizer)
        self._optimizer, self._closure = optimizer, closure
        self._params, rates, _ = optimizer._trainable()
        self._device, self._rule = self._params[0].device, on_device(optimizer._rule)
        self._tries = optimizer._rule.tries
        self._groups = [k for k, group in enumerate(optimizer.param_groups) for p in group["params"] if p.requires_grad]
        self._linearizer = Linearizer(self._params, optimizer._backend.name)   # its own: a graph holds its plans' memory
        count = len(optimizer.param_groups)
        self._numbers = torch.zeros(len(_STATE) + len(_TOLD), dtype=torch.float64, device=self._device)
        self._rates, self._decays, self._given = (self._numbers.new_zeros(n) for n in (count, count, 1))
        self._host: dict = {}   # what those hold
        self._way: _Way | None = None
        self._decaying = False   # a graph without weight decay is shorter
        self._graph = self._stream = self._addresses = self._memory = None
        self._pending = self._known = self._steps = 0

    # --- around the device ------------------------------------------------------------------------------------------------

    def step(self) -> torch.Tensor:
        """Take one step and return the loss before it, a 0-dim tensor that nobody has waited for.

        What happened stands in `optimizer.report`, whose numbers come when they are read. Raises what the closure raises, and
        ValueError where it cannot be captured; the parameters are then as they were. A loss that is not finite changes
        nothing, and the report says so.
        """
        optimizer = self._optimizer
        self._check_parameters()
        if optimizer._captured is not self or self._outdated():
            optimizer._settle()
            self._load()
            optimizer._captured = self
        self._set_numbers()
        if self._way is None:
            self._way = self._find_way()
        if self._device.type == "cuda":
            self._launch()
        else:
            self._take()
        self._pending += 1
        self._steps += 1
        optimizer._opt_called = True   # for learning-rate schedulers
        told = self._numbers.clone()
        optimizer.report = LateReport(lambda: self._report(told))
        return told[len(_STATE)].to(self._params[0].dtype)

    def settle(self) -> None:
        """Bring mu, the rule's state and the count of steps into the optimizer's memory. Waits for the device."""
        if self._pending and not self._outdated():
            memory, rule = self._memory, self._optimizer._rule
            state = dict(zip(_STATE, self._numbers.tolist(), strict=False))
            memory["step"] += self._pending
            if self._tries:
                memory["damping"] = state["mu"]
            if "nu" in memory["rule"]:
                memory["rule"] = {"nu": state["nu"]}
                rule.load_state_dict(memory["rule"])
            memory["rejected"] = int(state["rejected"])
            memory["captured"] = {"step": memory["step"], **state}
            self._known = memory["step"]
        self._pending = 0

    def _outdated(self) -> bool:
        """Whether an ordinary step was taken, or another state loaded, since the device's numbers were."""
        groups = self._optimizer.param_groups
        memory = self._optimizer.state.get(next(group["params"][0] for group in groups if group["params"]))
        return memory is not self._memory or memory["step"] != self._known

    def _load(self) -> None:
        memory = self._optimizer._memory()
        mu = memory["damping"] if self._tries else self._optimizer._scheduled(memory["step"])
        _check_positive(mu)
        state = {"mu": mu, "nu": memory["rule"].get("nu", 2.0), "start": mu, "attempt": 0.0,
                 "rejected": memory.get("rejected", 0), "promised": math.nan}
        kept = memory.get("captured")
        if kept is not None and kept["step"] == memory["step"]:   # amid attempts that were rejected
            state = {name: kept[name] for name in _STATE}
        self._numbers[: len(_STATE)].copy_(torch.tensor([float(state[name]) for name in _STATE], dtype=torch.float64))
        self._memory, self._known, self._pending = memory, memory["step"], 0

    def _set_numbers(self) -> None:
        """Learning rates, decays and the mu that is given, on the device, where they changed."""
        groups = self._optimizer.param_groups
        if not self._decaying and any(group["weight_decay"] for group in groups):
            self._decaying, self._graph = True, None
        for k, group in enumerate(groups):
            rate = group["lr"]
            if isinstance(rate, torch.Tensor):
                self._rates[k].copy_(rate)
                self._decays[k].copy_(rate * group["weight_decay"])
                continue
            self._set(self._rates, k, rate)
            self._set(self._decays, k, rate * group["weight_decay"])
        if not self._tries:
            mu = self._optimizer._scheduled(self._known + self._pending)
            _check_positive(mu)
            self._set(self._given, 0, mu)

    def _set(self, target: torch.Tensor, k: int, value: float) -> None:
        if self._host.get((id(target), k)) != value:
            target[k].fill_(value)
            self._host[id(target), k] = value

    def _check_parameters(self) -> None:
        trained = [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]
        same = len(trained) == len(self._params) and all(a is b for a, b in zip(trained, self._params, strict=True))
        if same and self._addresses is not None:
            same = self._addresses == [p.data_ptr() for p in trained]
        if not same:
            raise ValueError(
                "pgdfast.CapturedStep: the parameters, or where they lie in memory, have changed since it was made; nothing "
                "was changed. Make a new pgdfast.CapturedStep(optimizer, closure)."
            )

    def _find_way(self) -> _Way:
        """Look at the closure's problem once, as the host may: two runs of it."""
        optimizer, before = self._optimizer, _generators(self._device)
        with torch.enable_grad():
            Linearizer(self._params, optimizer._backend.name).read(self._closure())   # finite, of a form that is known
            result = self._closure()
        after = _generators(self._device)
        moved = [name for name, state in before.items() if not torch.equal(state, after[name])]
        if moved and (self._tries or moved != [self._device.type]):
            raise ValueError(
                f"pgdfast.CapturedStep: the closure draws random numbers ({', '.join(moved)}), and a graph cannot draw the "
                "same ones again; draw before the step, into tensors that the closure reads, or take ordinary steps."
            )
        lin = self._linearizer.read(result, allow_sync=False)
        _check_problem(lin)
        mu = float(self._numbers[0] if self._tries else self._given[0])
        found = direct(lin, mu, optimizer._solver, optimizer._cg, self._memory["wide"])
        return _Way(found, lin.tapeless and self._runs_without_tape(), lin.num_residuals, lin.num_parameters)

    def _runs_without_tape(self) -> bool:
        try:
            self._loss_here(tapeless=True)
        except RuntimeError:   # one that differentiates with respect to the parameters; other errors come again with the tape
            return False
        return True

    def _launch(self) -> None:
        """The step on a GPU: on a stream of its own for a while, then as a graph."""
        if self._graph is None and self._steps < _WARM_UP:
            here = torch.cuda.current_stream(self._device)
            self._stream = self._stream or torch.cuda.Stream(self._device)
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):
                self._take()
            here.wait_stream(self._stream)
            return
        with torch.cuda.device(self._device):
            if self._graph is None:
                self._graph = self._captured()
                self._addresses = [p.data_ptr() for p in self._params]
            self._graph.replay()
        torch.autograd.graph.increment_version(self._params)

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._take()
        except RuntimeError as error:
            raise ValueError(
                "pgdfast.CapturedStep: the step cannot be captured as a CUDA graph; nothing was changed. A closure must not "
                "wait for the GPU (.item(), .cpu(), print, branches on values, masks as indices, tensors made from numbers); "
                f"change it, or take ordinary steps. PyTorch says: {error.__context__ or error}"
            ) from error
        return graph

    # --- on the device ----------------------------------------------------------------------------------------------------

    def _take(self) -> None:
        """One attempt at a step, by operations on tensors alone."""
        old = self._numbers[: len(_STATE)]
        mu, nu, start, attempt, rejected, promised = old.unbind()
        with torch.enable_grad():
            result = self._closure()
        with torch.no_grad():
            lin = self._linearizer.read(result, allow_sync=False)
            del result
            loss = lin.loss.double()
            alive, fresh = torch.isfinite(loss), attempt == 0
            mu = mu if self._tries else torch.where(fresh, self._given[0], mu)
            start = torch.where(fresh, mu, start)
            found = solve_direct(lin, mu, self._way.solve.method, self._way.solve.wide)
            usable, predicted = found.usable & alive, self._predicted(lin, found)
            before = [p.detach().clone() for p in self._params]
            self._move(found.step)
            if self._tries:
                after = self._trial(before)
                kept, ratio, stalled = judged_on_device(loss, after, predicted, fresh, lin.loss.dtype)
                kept, stalled = kept & usable, stalled & usable
            else:
                after = ratio = torch.full_like(loss, math.nan)
                kept, stalled = usable, torch.zeros_like(usable)
            self._settle_at(kept, before)
            missed, last = ~kept & ~stalled, attempt + 1 >= ATTEMPTS
            rule = self._rule
            both = zip(rule.exhausted(start, nu), rule.rejected(mu, nu), strict=True)
            after_miss = [torch.where(last, most, more) for most, more in both]
            mu_next, nu_next = (
                torch.where(kept, good, torch.where(missed, bad, as_it_was))
                for good, bad, as_it_was in zip(rule.accepted(mu, nu, ratio), after_miss, (mu, nu), strict=True)
            )
            in_a_row = torch.where(missed, torch.where(last, torch.where(usable, rejected + 1, 0.0), rejected), 0.0)
            first_promise = torch.where(missed & usable & torch.isnan(promised), predicted, promised)
            between = missed & ~last
            state = (mu_next, nu_next, start, torch.where(between, attempt + 1, 0.0), in_a_row,
                     torch.where(between, first_promise, math.nan))
            status = torch.where(kept, float(_ACCEPTED), torch.where(usable, float(_REJECTED), float(_FAILED)))
            status = torch.where(alive, torch.where(stalled, float(_STALLED), status), float(_NOT_FINITE))
            told = (loss, torch.where(kept, after, loss), torch.where(usable, ratio, math.nan), predicted, mu, status,
                    attempt + 1, torch.where(last, in_a_row, 0.0), first_promise)
            self._numbers.copy_(torch.cat([torch.where(alive, torch.stack(state), old), torch.stack(told)]))

    def _predicted(self, lin, found) -> torch.Tensor:
        """The predicted reduction of theta - rates * delta."""
        if len(self._rates) == 1:
            rate = self._rates[0]
            reduction = rate * found.gain - 0.5 * rate * rate * (found.gain - found.damped)
            return torch.where(rate <= 2, reduction.clamp_min(0.0), reduction)   # where only rounding makes it negative
        parts = found.step.split([p.numel() for p in self._params])
        d = torch.cat([self._rates[k] * part for k, part in zip(self._groups, parts, strict=True)])
        return torch.dot(lin.gradient(), d).double() - 0.5 * torch.dot(d, lin.ggn(d)).double()

    def _move(self, step: torch.Tensor) -> None:
        parts = step.split([p.numel() for p in self._params])
        for p, part, k in zip(self._params, parts, self._groups, strict=True):
            p.sub_((self._rates[k] * part).view(p.shape).to(p.dtype))

    def _settle_at(self, kept: torch.Tensor, before: list[torch.Tensor]) -> None:
        """Stay, with the weight decay that is wanted, or return bit for bit."""
        for p, old, k in zip(self._params, before, self._groups, strict=True):
            new = p - (self._decays[k] * old).to(p.dtype) if self._decaying else p
            p.copy_(torch.where(kept, new, old))

    def _trial(self, before: list[torch.Tensor]) -> torch.Tensor:
        """The loss where the parameters were moved to; they return where the closure raises."""
        try:
            return self._loss_here(self._way.tapeless)
        except BaseException:
            if not (self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()):   # a capture moves nothing
                for p, old in zip(self._params, before, strict=True):
                    p.copy_(old)
            raise

    def _loss_here(self, tapeless: bool) -> torch.Tensor:
        """The loss at the parameters' present values, 0-dim, float64."""
        try:
            if tapeless:
                for p in self._params:
                    p.requires_grad_(False)
            with torch.enable_grad():   # for closures that differentiate with respect to their inputs
                result = self._closure()
        finally:
            for p in self._params:
                p.requires_grad_(True)
        if isinstance(result, torch.Tensor) and result.dim() == 0:
            return result.detach().double()
        parts = result if isinstance(result, (tuple, list)) else [result]
        return 0.5 * sum(part.detach().double().square().sum() for part in parts)

    # --- for people -------------------------------------------------------------------------------------------------------

    def _report(self, told: torch.Tensor) -> Report:
        """The Report of the step whose numbers these are; one transfer."""
        values = dict(zip(_STATE + _TOLD, told.tolist(), strict=True))
        way, status, dtype = self._way, _STATUS[int(values["status"])], self._params[0].dtype
        seen = {name: None if math.isnan(values[name]) else values[name] for name in ("ratio", "first_promise")}
        failed = status in ("failed", "not finite")
        tried = self._tries and not failed
        report = Report(
            values["loss"], values["after"] if self._tries else None, seen["ratio"], values["predicted"] if tried else None,
            values["damping"], values["mu"], "failed" if failed else status, solver=way.solve.method, reason=way.solve.reason,
            solve_status="not_positive_definite" if failed else "solved", attempts=int(values["tried"]),
            trials=int(self._tries), residuals=way.residuals, parameters=way.parameters,
        )
        if status == "not finite":
            report.solve_status = "not_finite"
            report.advice = "the loss before the step is not finite; nothing was changed. Check the data and the parameters"
            return report
        report.advice = advice(report, _Solved(report.solve_status), 0, dtype)
        why = stall(report, seen["first_promise"], int(values["in_a_row"]), values["mu"] >= LARGEST, dtype)
        if why:
            report.status, report.advice = "stalled", why
        return report


class _Solved:
    """As much of a Solution as advice asks for."""

    def __init__(self, status: str):
        self.status, self.advice = status, ADVICE.get(status, "")


def _generators(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _check(optimizer) -> None:
    """Raise TypeError or ValueError, naming it, for what a captured step cannot do."""
    if not isinstance(optimizer, LM):
        raise TypeError(f"pgdfast.CapturedStep: got {type(optimizer).__name__}; it takes steps of a pgdfast.LM.")
    refused = {
        "an ensemble": optimizer._lockstep is not None,
        "a line_search": optimizer._search is not None,
        "acceleration": optimizer._acceleration is not None,
        "momentum": bool(optimizer._momentum.beta),
        "norm_constraint": optimizer._constraint is not None,
        "scaling='marquardt'": optimizer._scaling != "identity",
        f"solver={optimizer._solver!r}": optimizer._solver in ("cg", "lsmr", "eigh"),
        "backend='reference'": not hasattr(optimizer._backend, "name"),
        f"damping rule {type(optimizer._rule).__name__}": on_device(optimizer._rule) is None,
    }
    for what, given in refused.items():
        if given:
            raise ValueError(
                f"pgdfast.CapturedStep: {what} does not work in it; make the LM without, or take ordinary steps, "
                "optimizer.step(closure)."
            )
    if not callable(optimizer._damping):
        _check_positive(optimizer._damping)


def _check_positive(mu: float) -> None:
    if not mu > 0:
        raise ValueError(
            f"pgdfast.CapturedStep: damping is {mu!r}; it factors mu I + J J^T and needs mu > 0. Take ordinary steps for "
            "Gauss-Newton."
        )


def _check_problem(lin) -> None:
    """Raise ValueError for linearisations that need the host at every step."""
    if lin.num_residuals == 0:
        raise ValueError("pgdfast.CapturedStep: the closure's batch has no residuals; give it some before steps are captured.")
    why = lin.sync_reason
    if why:
        raise ValueError(f"pgdfast.CapturedStep: {why}; take ordinary steps, optimizer.step(closure), or change the closure.")
