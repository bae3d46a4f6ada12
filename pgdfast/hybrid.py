"""LM first, then a first-order optimizer, as one torch.optim.Optimizer."""

from __future__ import annotations

import copy
import inspect
import math
from time import perf_counter

import torch

from .lm import LM, _hooked
from .report import Report
from .switches import switch as choose_switch

LM_PHASE, FIRST_ORDER_PHASE = "lm", "first_order"
_STATE = ("phase", "steps", "switched_at", "why", "switch_kind", "switch", "lm", "first_order")


class Hybrid(torch.optim.Optimizer):
    """LM until a switch says that its phase is over, a first-order optimizer from then on; the same closure for both.

    lm: a pgdfast.LM. first_order: a torch.optim.Optimizer over the same parameters whose step() needs no closure (Adam,
    AdamW, SGD, ...; not LBFGS). switch: a number of LM steps, or an object that measures a sign: pgdfast.KernelDrift,
    Alignment, Plateau, or one of your own (pgdfast.switches). It is asked before the first step and after every LM step.

    Attributes: lm, first_order; phase, "lm" or "first_order": whose turn the next step is; steps, taken in all; switched_at,
    the number of LM steps taken at the switch, or None; why, the switch's reason, or ""; report, LM's in the first phase and
    after that a short one with the loss (None until the first such step).

    param_groups, defaults and state are those of the active optimizer; they change at the switch. Give a learning-rate
    scheduler one of the two optimizers and step it while that one is active. A scheduler over the Hybrid itself needs equally
    many groups in both; those that multiply the present lr (StepLR, ExponentialLR) then act on the active optimizer, but those
    that compute from the first lr (LambdaLR, OneCycleLR) would carry LM's over to the other.

    Source: arXiv 2601.03162: preconditioned steps through the lazy phase, then a first-order method.
    Raises TypeError or ValueError for optimizers that do not fit and for a switch that is none.
    """

    def __init__(self, lm: LM, first_order: torch.optim.Optimizer, switch=2000):
        _check(lm, first_order)
        # Optimizer.__init__ would make groups of its own; what else it sets up, __setstate__ does too.
        self.__setstate__({
            "lm": lm, "first_order": first_order, "switch": choose_switch(switch), "phase": LM_PHASE, "steps": 0,
            "switched_at": None, "why": "", "_short": None,
        })

    def __getstate__(self) -> dict:
        """Everything, for copies and pickles; torch.optim's own keeps only what every optimizer has."""
        names = ("lm", "first_order", "switch", "phase", "steps", "switched_at", "why", "_short")
        return {name: getattr(self, name) for name in names}

    @property
    def active(self) -> torch.optim.Optimizer:
        """The optimizer that takes the next step."""
        return self.lm if self.phase == LM_PHASE else self.first_order

    @property
    def param_groups(self) -> list[dict]:
        """Those of the active optimizer."""
        return self.active.param_groups

    @property
    def state(self):
        """That of the active optimizer."""
        return self.active.state

    @property
    def defaults(self) -> dict:
        """A copy of those of the active optimizer."""
        return dict(self.active.defaults)

    @property
    def report(self) -> Report | None:
        """What the last step did."""
        return self.lm.report if self.phase == LM_PHASE or self.steps == self.switched_at else self._short

    def add_param_group(self, param_group: dict) -> None:
        """Refused: the two optimizers' groups have different options."""
        raise ValueError(
            "pgdfast.Hybrid.add_param_group: one group cannot carry the options of two optimizers; add the parameters to "
            "both, hybrid.lm.add_param_group(...) and hybrid.first_order.add_param_group(...)."
        )

    @_hooked
    def step(self, closure=None) -> torch.Tensor:
        """Take one step with the active optimizer and return the loss before it, a 0-dim tensor.

        closure: as for LM.step, without backward(). In the second phase it runs once, under grad; residuals are taken as
        1/2 sum of squares; the gradients are cleared before the backward pass and stay until the next.
        Raises ValueError (bad closure, non-finite loss) or whatever the closure raises; the parameters are left unchanged.
        What a switch raises while it measures reaches you too; the LM step before it then stands and is counted.
        """
        if closure is None:
            raise ValueError(
                "pgdfast.Hybrid.step: needs a closure that returns the loss or the residuals; pass step(closure)."
            )
        if self.phase == LM_PHASE and self.steps == 0:
            self._consider()
        if self.phase == LM_PHASE:
            loss = self.lm.step(closure)
            self.steps += 1
            self._consider()
        else:
            loss = self._first_order_step(closure)
            self.steps += 1
        return loss

    def _consider(self) -> None:
        why = self.switch.over(self.steps, self.lm)
        if why:
            self.phase, self.switched_at, self.why = FIRST_ORDER_PHASE, self.steps, str(why)

    def _first_order_step(self, closure) -> torch.Tensor:
        start = perf_counter()
        with torch.enable_grad():
            loss, empty = _half_square(closure(), self.lm.returned_loss)
        value = loss.item()
        sizes = [p.numel() * (1 + p.is_complex()) for p in _parameters(self.first_order) if p.requires_grad]
        report = Report(value, parameters=sum(sizes))
        report.solver, report.reason = type(self.first_order).__name__, self.why
        if empty:
            report.status, report.advice = "empty", "the closure's batch has no residuals; nothing was changed"
        elif not math.isfinite(value):
            raise ValueError(
                f"pgdfast.Hybrid: the loss before the step is {value}; nothing was changed. Check the data and the parameters "
                "for NaN or infinity."
            )
        elif not loss.requires_grad:
            raise ValueError(
                "pgdfast.Hybrid: the closure's result does not depend on any parameter; return the loss or the residuals with "
                "their graph."
            )
        else:
            self.first_order.zero_grad()
            loss.backward()
            self.first_order.step()
        report.seconds = {"first_order": perf_counter() - start}
        self._short = report
        return loss.detach()

    def state_dict(self) -> dict:
        """Both optimizers, the phase, the step count and the switch's own state; what a resumed run needs, bit for bit."""
        return {
            "phase": self.phase, "steps": self.steps, "switched_at": self.switched_at, "why": self.why,
            "switch_kind": type(self.switch).__name__, "switch": self.switch.state_dict(), "lm": self.lm.state_dict(),
            "first_order": self.first_order.state_dict(),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore what `state_dict` gave, into optimizers and a switch of the same kinds; thresholds are the constructor's.

        Raises ValueError for a state of another optimizer or switch; nothing is changed then.
        """
        missing = [name for name in _STATE if name not in state_dict]
        if missing:
            raise ValueError(
                f"pgdfast.Hybrid.load_state_dict: the state lacks {', '.join(missing)}; give one that Hybrid.state_dict() made."
            )
        own, saved = type(self.switch).__name__, state_dict["switch_kind"]
        if saved != own:
            raise ValueError(
                f"pgdfast.Hybrid.load_state_dict: the state was saved with a switch of kind {saved}, this one's is {own}; "
                "build the Hybrid with the switch it was saved with."
            )
        before = [(each, each.state, each.param_groups) for each in (self.lm, self.first_order)]
        switch = self.switch.state_dict()
        try:
            self.lm.load_state_dict(state_dict["lm"])
            self.first_order.load_state_dict(state_dict["first_order"])
            self.switch.load_state_dict(copy.deepcopy(state_dict["switch"]))
        except BaseException:
            for each, state, groups in before:
                each.__setstate__({"state": state, "param_groups": groups})
            self.switch.load_state_dict(switch)
            raise
        self.phase, self.steps = state_dict["phase"], state_dict["steps"]
        self.switched_at, self.why = state_dict["switched_at"], state_dict["why"]
        self._short = None

    def __repr__(self) -> str:
        when = f"switch {self.switch!r}" if self.switched_at is None else f"switched at {self.switched_at}: {self.why}"
        inner = f"{self.lm!r}\n{self.first_order!r}".replace("\n", "\n    ")
        return f"Hybrid (\n    phase {self.phase}, step {self.steps}, {when}\n    {inner}\n)"


def _half_square(result, scalar: bool) -> tuple[torch.Tensor, bool]:
    """The loss that LM would minimize, and whether it has no residuals; scalar: did LM take such a result for the loss."""
    if isinstance(result, torch.Tensor) and (result.dim() == 0 or scalar and result.numel() == 1):
        return result.reshape(()), False
    parts = list(result) if isinstance(result, (tuple, list)) else [result]
    if not parts or not all(isinstance(part, torch.Tensor) for part in parts):
        raise ValueError(
            f"pgdfast.Hybrid: the closure returned {type(result).__name__}; return the loss or the residual tensors."
        )
    return 0.5 * sum(part.square().sum() for part in parts), not any(part.numel() for part in parts)


def _parameters(optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _check(lm, first_order) -> None:
    if not isinstance(lm, LM):
        raise TypeError(f"pgdfast.Hybrid: lm is {_kind(lm)}; it must be a pgdfast.LM.")
    if lm.ensemble is not None:
        raise ValueError(
            f"pgdfast.Hybrid: lm trains an ensemble of {lm.ensemble}, whose members would switch apart; build one Hybrid per "
            "network, or an LM without ensemble."
        )
    if lm._in_group:
        raise ValueError(
            "pgdfast.Hybrid: lm steps in a process group, and first_order would step in every process by its own rows; take "
            "LM's steps first, then those of first_order on a DistributedDataParallel model, which averages gradients."
        )
    if lm._options.balance is not None:
        raise ValueError(
            "pgdfast.Hybrid: lm weights the terms of the loss (balance), and first_order would minimize them unweighted; use "
            "balance=None and multiply the residuals by roots of fixed weights in the closure."
        )
    if not isinstance(first_order, torch.optim.Optimizer):
        raise TypeError(
            f"pgdfast.Hybrid: first_order is {_kind(first_order)}; it must be a torch.optim.Optimizer over LM's parameters."
        )
    if isinstance(first_order, (LM, Hybrid)) or _needs_closure(first_order):
        raise TypeError(
            f"pgdfast.Hybrid: first_order is {_kind(first_order)}, whose step needs a closure; give one that steps on "
            "gradients alone, such as torch.optim.AdamW."
        )
    lacking = [
        _differing(name, mine, theirs)
        for name, mine, theirs in (("first_order", lm, first_order), ("lm", first_order, lm))
    ]
    if any(lacking):
        raise ValueError(
            f"pgdfast.Hybrid: {' and '.join(filter(None, lacking))}; build both over the same parameters."
        )


def _kind(given) -> str:
    kind = given if isinstance(given, type) else type(given)
    return f"the class {kind.__name__}" if given is kind else f"of type {kind.__name__}"


def _needs_closure(optimizer) -> bool:
    """Whether step() has an argument without a default."""
    _, *arguments = inspect.signature(type(optimizer).step).parameters.values()
    return any(a.default is a.empty and a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD) for a in arguments)


def _differing(name: str, mine, theirs) -> str:
    """Which parameters of `mine` the optimizer `theirs`, called `name`, lacks; at most three by name or place."""
    known = {id(p) for p in _parameters(theirs)}
    lacking = []
    for index, group in enumerate(mine.param_groups):
        names = group.get("param_names") or [f"parameter {k} of group {index}" for k in range(len(group["params"]))]
        lacking += [
            f"{called} {tuple(p.shape)}" for called, p in zip(names, group["params"], strict=True) if id(p) not in known
        ]
    if not lacking:
        return ""
    more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
    return f"{name} lacks {', '.join(lacking[:3])}{more} of {type(mine).__name__}"
