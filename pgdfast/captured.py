"""Full LM steps with no host-device synchronization, captured as a CUDA graph where the parameters are on a GPU."""

from __future__ import annotations

import math

import torch

from .linear import Linearizer
from .lm import LM
from .report import LateReport
from .solve import direct
from .step import first_damping, gradient_curvature
from .step.graph import GraphStep, StepPlan

_SCALED = "scaling='marquardt'"
_WARM_UP = 3   # steps on the stream that is then captured, as torch.cuda.graphs wants them


class CapturedStep:
    """Steps of an LM optimizer as one CUDA graph: `step()` launches it and returns without waiting for the GPU.

    A step tries one damping: a rejected one changes nothing but mu, and the next step goes on from there, through the same
    sequence of mu that LM.step runs through in one call. The first step looks at the closure's problem by two more runs of
    it; the first three run operation by operation, the fourth is captured. On a CPU all run operation by operation.
    Learning rates, weight decay and schedules of mu may change between steps. mu and its like live on the device;
    `optimizer.report`, `state_dict` and LM.step fetch them when they are used. Hooks of the optimizer's step are not called.

    Args:
        optimizer: a pgdfast.LM with direct solves, mu > 0, a damping rule that does not sweep, and none of ensemble,
            line_search, acceleration, momentum, norm_constraint, xtol and gtol (whose tests need products with J; the report
            says "converged" by the loss test alone) and Marquardt scaling (its scaling="auto" means the identity here, and
            from then on). A rule of one's own must compute by operations that tensors have, too.
        closure: as for LM.step. A graph repeats what it did when it was captured, so it reads its batch from tensors that stay
            where they are (copy_ new data into them), draws no random numbers where trials are judged, and does not branch on
            values.

    Raises TypeError or ValueError for other optimizers and closures.
    """

    def __init__(self, optimizer: LM, closure):
        _check(optimizer)
        self._optimizer, self._closure = optimizer, closure
        self._params, _, _ = optimizer._trainable()
        self._device, self._tries = self._params[0].device, optimizer._options.rule.tries
        groups = [k for k, group in enumerate(optimizer.param_groups) for p in group["params"] if p.requires_grad]
        linearizer = Linearizer(self._params, optimizer._tools.backend.name)
        self._linearizer = linearizer
        options = optimizer._options
        self._numbers = GraphStep(closure, self._params, groups, options.rule.captured, linearizer, options.tolerances)
        self._host: dict = {}   # what the device holds of rates, decays and the mu that is given
        self._graph = self._stream = self._addresses = self._memory = self._first = None
        self._pending = self._known = self._steps = 0

    def step(self) -> torch.Tensor:
        """Take one step and return the loss before it, a 0-dim tensor that nobody has waited for.

        What happened stands in `optimizer.report`, whose numbers come when they are read. Raises what the closure raises, and
        ValueError where it cannot be captured; the parameters are left unchanged. A loss that is not finite changes
        nothing, and the report says so.
        """
        optimizer, device_step = self._optimizer, self._numbers
        self._check_parameters()
        if optimizer._captured is not self or self._outdated():
            optimizer._settle()
            self._load()
            optimizer._captured = self
        self._set_numbers()
        if device_step.plan is None:
            device_step.plan = self._find_plan()
        self._first = None
        if self._device.type == "cuda":
            self._launch()
        else:
            device_step.take()
        self._pending += 1
        self._steps += 1
        optimizer._opt_called = True   # for learning-rate schedulers
        numbers = device_step.numbers.clone()
        optimizer.report = LateReport(lambda: device_step.report(numbers))
        return numbers[len(device_step.fields)].to(self._params[0].dtype.to_real())

    def settle(self) -> None:
        """Bring mu, the rule's memory and the count of steps into the optimizer's memory. Waits for the device."""
        if self._pending and not self._outdated():
            memory, member = self._memory, dict(self._memory["members"][0])
            state = self._numbers.fetch()
            if self._tries:
                member["damping"] = state["mu"]
            own = {name: state[name] for name in self._numbers.remembered}
            member["rule"] = self._optimizer._options.rule.interrupted(member["rule"] | own)
            member.update(rejected=int(state["rejected"]), curvature=state["curvature"], scaled=False)
            self._known = memory["step"] + self._pending
            member["captured"] = state | {"step": self._known}
            memory.update(step=self._known, members=[member])
        self._pending = 0

    def _outdated(self) -> bool:
        """Whether an ordinary step was taken, or another state loaded, since the device's numbers were."""
        groups = self._optimizer.param_groups
        memory = self._optimizer.state.get(next(group["params"][0] for group in groups if group["params"]))
        return memory is not self._memory or memory["step"] != self._known

    def _load(self) -> None:
        memory = self._optimizer._memory()
        member = memory["members"][0]
        mu = member["damping"] if self._tries else self._optimizer._scheduled(memory["step"])[0]
        curvature = member.get("curvature", math.nan)
        if member.get("scaled"):
            raise ValueError(
                f"pgdfast.CapturedStep: {_SCALED} does not work in it, and this LM's ordinary steps have chosen it for few "
                "parameters; make the LM with scaling='identity', or take ordinary steps, optimizer.step(closure)."
            )
        if self._tries and curvature != curvature:
            curvature = gradient_curvature(self._look()) or 1.0
            mu = mu if mu == mu else first_damping(curvature, self._optimizer._options.rule)
        _check_positive(mu)
        state = {
            "mu": mu, "start": mu, "attempt": 0, "rejected": member["rejected"], "promised": math.nan, "curvature": curvature,
            **member["rule"],
        }
        kept = member.get("captured")
        if kept is not None and kept["step"] == memory["step"]:   # amid attempts that were rejected
            state = state | kept
        self._numbers.load(state)
        self._memory, self._known, self._pending = memory, memory["step"], 0

    def _set_numbers(self) -> None:
        """Learning rates, decays and the mu that is given, on the device, where they changed."""
        groups, device_step = self._optimizer.param_groups, self._numbers
        if not device_step.decaying and any(group["weight_decay"] for group in groups):
            device_step.decaying, self._graph = True, None
        for k, group in enumerate(groups[: len(device_step.rates)]):
            rate = group["lr"]
            if isinstance(rate, torch.Tensor):
                device_step.rates[k].copy_(rate)
                device_step.decays[k].copy_(rate * group["weight_decay"])
                continue
            self._set("rate", device_step.rates, k, rate)
            self._set("decay", device_step.decays, k, rate * group["weight_decay"])
        if not self._tries:
            mu, = self._optimizer._scheduled(self._known + self._pending)
            _check_positive(mu)
            self._set("mu", device_step.given, 0, mu)

    def _set(self, name: str, target: torch.Tensor, k: int, value: float) -> None:
        if self._host.get((name, k)) != value:
            target[k].fill_(value)
            self._host[name, k] = value

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

    def _look(self):
        """The closure's problem, read as the host may: finite, of a form that is known, by rules that agree with autograd."""
        if self._first is None:
            backend = self._optimizer._tools.backend
            with torch.enable_grad():
                self._first = Linearizer(self._params, backend.name, backend.check).read(self._closure())
        return self._first

    def _find_plan(self) -> StepPlan:
        """Look at the closure's problem once: two runs of it."""
        optimizer, first, before = self._optimizer, self._look(), _generators(self._device)
        with torch.enable_grad():
            result = self._closure()
        after = _generators(self._device)
        moved = [name for name, state in before.items() if not torch.equal(state, after[name])]
        if moved and (self._tries or moved != [self._device.type]):
            raise ValueError(
                f"pgdfast.CapturedStep: the closure draws random numbers ({', '.join(moved)}), and a graph cannot draw the "
                "same ones again; draw before the step, into tensors that the closure reads, or take ordinary steps."
            )
        lin = self._linearizer.read(result, allow_sync=False)
        _check_problem(first)
        _check_problem(lin)
        numbers, options = self._numbers, optimizer._options
        mu = float(numbers.numbers[0] if self._tries else numbers.given[0])
        found = direct(lin, mu, options.solver, options.cg, self._memory["members"][0]["wide"])
        return StepPlan(found, lin.num_residuals, lin.num_parameters)

    def _launch(self) -> None:
        """The step on a GPU: on a stream of its own for a while, then as a graph."""
        if self._graph is None and self._steps < _WARM_UP:
            here = torch.cuda.current_stream(self._device)
            self._stream = self._stream or torch.cuda.Stream(self._device)
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):
                self._numbers.take()
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
                self._numbers.take()
        except RuntimeError as error:
            raise ValueError(
                "pgdfast.CapturedStep: the step cannot be captured as a CUDA graph; nothing was changed. A closure must not "
                "wait for the GPU (.item(), .cpu(), print, branches on values, masks as indices, tensors made from numbers); "
                f"change it, or take ordinary steps. PyTorch says: {error.__context__ or error}"
            ) from error
        return graph


def _generators(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _check(optimizer) -> None:
    """Raise TypeError or ValueError, naming it, for what a captured step cannot do."""
    if not isinstance(optimizer, LM):
        raise TypeError(f"pgdfast.CapturedStep: got {type(optimizer).__name__}; it takes steps of a pgdfast.LM.")
    options = optimizer._options
    refused = {
        "an ensemble": optimizer.ensemble is not None,
        "process_group": optimizer._in_group,
        "a line_search": options.search is not None,
        "acceleration": options.acceleration is not None and not options.rule.learns,
        "momentum": bool(options.momentum),
        "balance": options.balance is not None,
        "norm_constraint": options.constraint is not None,
        _SCALED: options.scaling == "marquardt",
        "xtol or gtol": bool(options.tolerances.xtol or options.tolerances.gtol),
        f"solver={options.solver!r}": options.solver in ("cg", "lsmr", "eigh"),
        "backend='reference'": optimizer._tools.backend.name == "reference",
        f"damping rule {type(options.rule).__name__}": options.rule.sweeps,
    }
    for what, given in refused.items():
        if given:
            raise ValueError(
                f"pgdfast.CapturedStep: {what} does not work in it; make the LM without, or take ordinary steps, "
                "optimizer.step(closure)."
            )
    if optimizer._damping is not None and not callable(optimizer._damping):
        _check_positive(optimizer._damping)


def _check_positive(mu: float) -> None:
    if not mu > 0:
        raise ValueError(
            f"pgdfast.CapturedStep: damping is {mu!r}; it factors mu I + J J^T and needs mu > 0. Take ordinary steps for "
            "Gauss-Newton."
        )


def _check_problem(lin) -> None:
    """Raise ValueError for linearizations that need the host at every step."""
    if lin.num_residuals == 0:
        raise ValueError("pgdfast.CapturedStep: the closure's batch has no residuals; give it some before steps are captured.")
    why = lin.sync_reason
    if why:
        raise ValueError(f"pgdfast.CapturedStep: {why}; take ordinary steps, optimizer.step(closure), or change the closure.")
